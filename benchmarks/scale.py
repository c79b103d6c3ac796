"""Cost against size: tokens, experts, width, points, batch, and ranks."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import Mlp

from s2d3d.ops.points import farthest_point_sample, nearest_neighbours
from s2d3d.s2d import RUPMoF

from .interleave import Contestant, Task, interleave
from .layer import layer_task
from .parallel import ONE_PROCESS, RANKS, SIDE_BY_SIDE, all_cores, exchanged_bytes, weak_scaling
from .presets import PUBLIC_BERT, SMALL_BERT, spec_for
from .section import Section, Series, Settings, new_section, series_from
from .training import build_step, clouds, step_flops
from .versus import EXPERTS

GROUPS = 64
NEIGHBOURS = 32


def measure(settings: Settings) -> Section:
    """Measure how the cost grows with each size, and with ranks."""
    section = new_section("scale", "Cost against size", settings)
    section.series += [
        _tokens(settings),
        _experts(settings),
        _width(settings),
        *_points(settings),
        _batch(settings),
    ]
    for series in section.series:
        section.add(f"exponent.{series.name}", series.exponent)
        section.add(f"last_exponent.{series.name}", series.last_exponent)
    spec = spec_for(SMALL_BERT, settings).but(experts=EXPERTS)
    on_cpu = settings.device.type == "cpu"
    if (settings.num_threads if on_cpu else torch.cuda.device_count()) >= 2:
        scaling = weak_scaling(settings, spec)
        section.comparisons.append(scaling)
        one, two = scaling.times
        section.add_speedup("weak_scaling_efficiency", scaling, two, one)
    else:
        section.add("weak_scaling_efficiency", None, "needs 2 threads" if on_cpu else "needs 2 GPUs")
    if on_cpu and settings.num_threads > 1:
        for name, preset in (("point_bert_small", SMALL_BERT), ("point_bert", PUBLIC_BERT)):
            cores = all_cores(settings, spec_for(preset, settings).but(experts=EXPERTS))
            section.comparisons.append(cores)
            section.add_speedup(f"all_cores.{name}.ranks", cores, RANKS, ONE_PROCESS)
            section.add_speedup(f"all_cores.{name}.side_by_side", cores, SIDE_BY_SIDE, ONE_PROCESS)
    _plan(section, settings)
    return section


def _series(
    name: str, title: str, sizes: Sequence[int], build: Callable[[int], Task], settings: Settings, *,
    expected: float, rounds: int = 8, note: str = "",
) -> Series:  # fmt: skip
    comparison = interleave(
        name,
        [Contestant(f"{size:,}", partial(build, size), same_math=False) for size in sizes],
        title=title,
        start=settings.here(),
        **settings.interleaving(rounds, min_seconds=0.02),
    )
    return series_from(comparison, sizes, expected=expected, note=note)


def _layer(settings: Settings, *, tokens: int, dim: int, num_experts: int) -> Task:
    torch.manual_seed(settings.seed)
    layer = RUPMoF(Mlp(dim, 4 * dim), num_experts)
    return layer_task(layer, x=torch.randn(1, tokens, dim), device=settings.device)


def _tokens(settings: Settings) -> Series:
    sizes = settings.pick((260, 520, 1040, 2080, 4160, 8320), (16, 32))
    build = lambda tokens: _layer(settings, tokens=tokens, dim=settings.pick(384, 8), num_experts=EXPERTS)  # noqa: E731
    title = f"RUP-MoF layer of width {settings.pick(384, 8)}, {EXPERTS} experts, forward + backward"
    return _series("tokens", title, sizes, build, settings, expected=1.0)


def _experts(settings: Settings) -> Series:
    sizes = settings.pick((1, 2, 4, 8, 16, 32), (1, 2))
    tokens, dim = settings.pick((2080, 384), (16, 8))
    build = lambda experts: _layer(settings, tokens=tokens, dim=dim, num_experts=experts)  # noqa: E731
    note = "the arithmetic is the same; weights and their gradients are read and written for every expert"
    title = f"RUP-MoF layer of width {dim}, {tokens} tokens, forward + backward"
    return _series("experts", title, sizes, build, settings, expected=0.0, note=note)


def _width(settings: Settings) -> Series:
    sizes = settings.pick((96, 192, 384, 768), (8, 16))
    tokens = settings.pick(2080, 16)
    build = lambda dim: _layer(settings, tokens=tokens, dim=dim, num_experts=EXPERTS)  # noqa: E731
    title = f"RUP-MoF layer, {tokens} tokens, {EXPERTS} experts, forward + backward"
    note = "activations and dispatch grow with the width itself, matrix products with its square"
    return _series("width", title, sizes, build, settings, expected=2.0, note=note)


def _points(settings: Settings) -> list[Series]:
    """Time sampling and neighbours from 1k to 100k points, and the step that contains them."""
    sizes = settings.pick((1024, 4096, 16384, 102400), (64, 128))
    batch = settings.pick(4, 2)

    def grouping(points: int) -> Task:
        xyz, _ = clouds(batch, points, settings.seed, settings.device)
        groups, neighbours = settings.pick((GROUPS, NEIGHBOURS), (4, 4))

        def run() -> None:
            index = farthest_point_sample(xyz, groups)
            centers = xyz.gather(1, index.unsqueeze(2).expand(-1, -1, 3))
            nearest_neighbours(centers, xyz, neighbours)

        return Task(run)

    def sampling(points: int) -> Task:
        xyz, _ = clouds(1, points, settings.seed, settings.device)
        return Task(lambda: farthest_point_sample(xyz, points // 16))

    small = spec_for(SMALL_BERT, settings).but(batch=batch)
    return [
        _series(
            "points, grouping", f"farthest points and neighbours of {GROUPS} groups, {batch} clouds", sizes, grouping,
            settings, expected=1.0,
        ),
        _series(
            "points, sampling a sixteenth", "farthest point sampling of one point in 16, one cloud",
            settings.pick((1024, 4096, 16384), (64, 128)), sampling, settings, expected=2.0, rounds=4,
            note="each of N / 16 steps passes over N points; short passes cost their start",
        ),
        _series(
            "points, step", f"point_bert_small: training step, batch {batch}", sizes,
            lambda points: build_step(small.but(points=points)), settings, expected=1.0, rounds=5,
            note="tokens do not grow with the points: only grouping does, a small part until clouds are large",
        ),
    ]  # fmt: skip


def _batch(settings: Settings) -> Series:
    small = spec_for(SMALL_BERT, settings)
    sizes = settings.pick((8, 16, 32, 64, 128), (2, 4))
    return _series(
        "batch", "point_bert_small: training step", sizes, lambda batch: build_step(small.but(batch=batch)), settings,
        expected=1.0, rounds=5,
    )  # fmt: skip


def _plan(section: Section, settings: Settings) -> None:
    """Record the inputs for planning with many ranks: bytes of state and exchange, arithmetic of a step."""
    spec = spec_for(PUBLIC_BERT, settings)
    for name, own in (("dense", spec), ("s2d", spec.but(experts=EXPERTS))):
        exchanged, state = exchanged_bytes(own)
        section.add(f"plan.{name}.exchanged_mib", exchanged / 2**20)
        section.add(f"plan.{name}.state_mib", state / 2**20)
        section.add(f"plan.{name}.gflop_per_sample", step_flops(own) / own.batch / 1e9)
