"""What is measured on a GPU alone: throughput at large batches, and several seeds side by side."""

from functools import partial

import torch

from .interleave import Comparison, Contestant, Task, interleave
from .section import Section, Settings
from .stats import spread
from .training import BF16_TOLERANCE, ModelSpec, build_step
from .versus import EXPERTS

BATCHES = (32, 512)
SEEDS = (1, 2, 4)
EAGER, COMPILED, SPARSE = "dense, bf16", "dense, bf16, compiled", "S2D, bf16, compiled"


def measure_throughput(section: Section, settings: Settings, spec: ModelSpec) -> None:
    """Add the training throughput of a ViT-S in bf16 at the recipe's batch and at a large one.

    Args:
        section: gets comparisons and measures.
        settings: with a CUDA device.
        spec: of the dense model.
    """
    for batch in BATCHES:
        own = spec.but(batch=settings.pick(batch, 2), precision="bf16")
        comparison = interleave(
            f"batch {batch}",
            [
                Contestant(EAGER, partial(build_step, own), tolerance=BF16_TOLERANCE),
                Contestant(COMPILED, partial(build_step, own.but(compile=True)), tolerance=BF16_TOLERANCE),
                Contestant(
                    SPARSE, partial(build_step, own.but(compile=True, experts=EXPERTS)), tolerance=BF16_TOLERANCE
                ),
            ],
            title=f"{spec.name}: training step in bf16, batch {own.batch}, {own.points} points",
            start=settings.apart(),
            base=COMPILED,
            samples=own.batch,
            **settings.interleaving(10, warmup=5, min_seconds=0.5),
        )
        section.comparisons.append(comparison)
        section.add_rate(f"batch_{batch}.samples_per_second", comparison, COMPILED)
        section.add_ratio(f"batch_{batch}.s2d", comparison, SPARSE, COMPILED)
    own = spec.but(precision="bf16", batch=settings.pick(BATCHES[0], 2))
    seeds = _seeds_side_by_side(settings, own)
    section.comparisons.append(seeds)
    for count in SEEDS:
        times = seeds.times[f"{count} seeds"]
        section.add(f"seeds_{count}.samples_per_second", spread([count * own.batch / seconds for seconds in times]))


def _seeds_side_by_side(settings: Settings, spec: ModelSpec) -> Comparison:
    """Time a step of 1, 2, 4 models at once, each on a stream of its own."""
    return interleave(
        "seeds",
        [
            Contestant(f"{count} seeds", partial(build_seeds, spec, count), same_math=False, note=f"{count} runs")
            for count in SEEDS
        ],
        title=f"{spec.name}: a step of each of several runs, a stream each, batch {spec.batch}",
        start=settings.apart(),
        **settings.interleaving(10, warmup=5, min_seconds=0.5),
    )


def build_seeds(spec: ModelSpec, count: int) -> Task:
    """Make the task of one step of `count` runs of different seeds, each on a stream of its own."""
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
