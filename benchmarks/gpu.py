"""GPU-only measurements: throughput at large batches, and several seeds in parallel."""

from functools import partial

import torch

from s2d3d.errors import InputError

from .comparison import Comparison
from .graphs import build_recorded
from .interleave import Contestant, Task, interleave
from .presets import PUBLIC_BERT, spec_for
from .section import Section, Settings, new_section
from .training import BF16_TOLERANCE, ModelSpec, build_step
from .versus import EXPERTS

BATCHES = (512, 32)
SMALL = BATCHES[1]
"""The recipe's batch size. Kernel launches dominate there, so CUDA graphs are measured too."""
SEEDS = (1, 2, 4)
EAGER, COMPILED, SPARSE = "dense, bf16", "dense, bf16, compiled", "S2D, bf16, compiled"
GRAPHS, RECORDED = f"{COMPILED}, CUDA graphs", f"{COMPILED}, step recorded"
SPARSE_RECORDED = f"{SPARSE}, step recorded"


def measure(settings: Settings) -> Section:
    """Run the GPU-only measurements.

    Raises:
        InputError: there is no GPU, contestants of equal mathematics disagree, or a process dies.
    """
    if settings.device.type != "cuda":
        raise InputError(f"gpu: needs a CUDA device, the device is '{settings.device}'; other sections run here")
    section = new_section("gpu", "Training on a GPU", settings)
    measure_throughput(section, settings, spec_for(PUBLIC_BERT, settings))
    return section


def measure_throughput(section: Section, settings: Settings, spec: ModelSpec) -> None:
    """Add the training throughput of a ViT-S in bf16: at a large batch, at the recipe's, and of several seeds at once.

    Args:
        section: gets comparisons and measures.
        settings: with a CUDA device.
        spec: of the dense model.
    """
    for batch in BATCHES:
        measure_batch(section, settings, spec, batch)
    measure_seeds(section, settings, spec)


def measure_batch(section: Section, settings: Settings, spec: ModelSpec, batch: int) -> None:
    """Add the throughput at one batch size; see `measure_throughput`."""
    own = spec.but(batch=settings.pick(batch, 2), precision="bf16")
    comparison = interleave(
        f"batch {batch}",
        _contestants(own, recorded=batch == SMALL),
        title=f"{spec.name}: training step in bf16, batch {own.batch}, {own.points} points",
        start=settings.apart(),
        base=COMPILED,
        tolerance=BF16_TOLERANCE,
        samples=own.batch,
        **settings.interleaving(10, warmup=5, min_seconds=0.5),
    )
    section.comparisons.append(comparison)
    section.add_rate(f"batch_{batch}.samples_per_second", comparison, COMPILED)
    section.add_ratio(f"batch_{batch}.s2d", comparison, SPARSE, COMPILED)
    if batch == SMALL:
        section.add_rate(f"batch_{batch}.recorded.samples_per_second", comparison, RECORDED)
        section.add_ratio(f"batch_{batch}.recorded.s2d", comparison, SPARSE_RECORDED, RECORDED)


def measure_seeds(section: Section, settings: Settings, spec: ModelSpec) -> None:
    """Add the throughput of several runs at once, at the small batch; see `measure_throughput`."""
    own = spec.but(precision="bf16", batch=settings.pick(SMALL, 2))
    seeds = _seeds_side_by_side(settings, own)
    section.comparisons.append(seeds)
    for count in SEEDS:
        for kind, suffix in (("recorded", ""), ("compiled", ".compiled"), ("eager", ".eager")):
            rate = seeds.rate(_side_by_side(count, kind), count * own.batch)
            section.add(f"seeds_{count}{suffix}.samples_per_second", rate)


def _contestants(spec: ModelSpec, recorded: bool) -> list[Contestant]:
    """List the forms of a step; `recorded` adds CUDA graphs, which save the host's time at small batches."""
    compiled = spec.but(compile=True)
    sparse = compiled.but(experts=EXPERTS)
    listed = [Contestant(EAGER, partial(build_step, spec)), Contestant(COMPILED, partial(build_step, compiled))]
    if recorded:
        graphs = compiled.but(compile_mode="reduce-overhead")
        listed += [
            Contestant(GRAPHS, partial(build_step, graphs), note="`train.compile_mode: reduce-overhead`"),
            Contestant(RECORDED, partial(build_recorded, compiled), note="forward to AdamW as one CUDA graph"),
        ]
    listed.append(Contestant(SPARSE, partial(build_step, sparse), note="EWA included"))
    if recorded:
        note = "forward to EWA as one CUDA graph"
        listed.append(Contestant(SPARSE_RECORDED, partial(build_recorded, sparse), note=note))
    return listed


def _side_by_side(count: int, kind: str) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}, {kind}"


def _seeds_side_by_side(settings: Settings, spec: ModelSpec) -> Comparison:
    """Time a step of 1, 2, 4 dense models at once, each on a separate stream: plain, compiled, recorded."""
    compiled = spec.but(compile=True)
    builds = {
        "eager": partial(build_seeds, spec),
        "compiled": partial(build_seeds, compiled),
        "recorded": partial(build_recorded, compiled),
    }
    return interleave(
        "seeds",
        [
            Contestant(
                _side_by_side(count, kind), partial(build, count=count), same_math=False,
                note="weights equal those of plain updates" if kind == "recorded" else f"{count} run(s)",
            )
            for count in SEEDS
            for kind, build in builds.items()
        ],
        title=f"{spec.name}: a step of each of several runs, a stream each, batch {spec.batch}",
        start=settings.apart(),
        **settings.interleaving(10, warmup=5, min_seconds=0.5),
    )  # fmt: skip


def build_seeds(spec: ModelSpec, count: int) -> Task:
    """Make the task of one step of `count` runs of different seeds, each on a separate stream."""
    torch._dynamo.config.recompile_limit = 64  # one entry for each seed, more than the default allows
    device = torch.device(spec.device)
    steps = [build_step(spec.but(seed=seed)).run for seed in range(count)]
    streams = [torch.cuda.Stream(device) for _ in range(count)]

    def run() -> None:
        current = torch.cuda.current_stream(device)
        for stream, step in zip(streams, steps):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            current.wait_stream(stream)

    return Task(run)
