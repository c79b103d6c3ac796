"""The whole training step: S2D compared with dense, this package compared with the reference modules, and memory."""

from functools import partial
from statistics import median

from .hardware import missing_bf16
from .interleave import DEFAULT, KEPT, Contestant, interleave
from .losses import loss_ratio
from .presets import PUBLIC_BERT, PUBLIC_TRANSFORMER, SMALL_BERT, SPARSE_TRANSFORMER, spec_for
from .section import Section, Settings, new_section
from .stats import estimate
from .training import ModelSpec, build_step, expert_bytes, step_flops
from .versus import (
    DENSE,
    EXPERTS,
    REFERENCE_A,
    SPARSE,
    VERSUS_PAIRS,
    add_rates,
    add_versus,
    contestants,
    measure_package,
)
from .worker import WorkerRunner

AGAIN = "ours, dense again"
PROCESSES = 3
"""Processes of each kind. Fragmentation by the allocator differs by about 50 MiB between processes."""


def measure(settings: Settings) -> Section:
    """Measure training steps and their peak memory.

    Raises:
        InputError: contestants of equal mathematics disagree, or a process dies.
    """
    section = new_section("step", "Training step", settings)
    add_rates(section, settings)
    bert, transformer = (spec_for(preset, settings) for preset in (PUBLIC_BERT, PUBLIC_TRANSFORMER))
    _against_reference(section, settings, "point_bert", bert)
    _against_reference(section, settings, "point_transformer", transformer)
    presets = {"point_bert": PUBLIC_BERT, "point_bert_small": SMALL_BERT, "point_transformer_ffn": SPARSE_TRANSFORMER}
    for name, preset in presets.items():
        _dense_and_sparse(section, settings, name, spec_for(preset, settings))
    _memory(section, settings, bert)
    reason = None if settings.force_bf16 else missing_bf16(settings.device)
    small = spec_for(SMALL_BERT, settings)
    section.add("point_bert_small.bf16_loss", None if reason else loss_ratio(small, settings), reason)
    return section


def _against_reference(section: Section, settings: Settings, name: str, spec: ModelSpec) -> None:
    comparison = interleave(
        f"{name} step",
        contestants(build_step, spec, settings),
        title=f"{name}: training step, batch {spec.batch}, {spec.points} points",
        start=settings.apart(),
        base=REFERENCE_A,
        samples=spec.batch,
        pairs=VERSUS_PAIRS,
        **settings.interleaving(8, min_seconds=0.2),
    )
    section.comparisons.append(comparison)
    add_versus(section, settings, name, comparison, step_flops(spec))
    measure_package(section, settings, name, "step", build_step, spec)


def _dense_and_sparse(section: Section, settings: Settings, name: str, spec: ModelSpec) -> None:
    comparison = interleave(
        f"{name} step, S2D",
        [
            Contestant(DENSE, partial(build_step, spec)),
            Contestant(
                SPARSE,
                partial(build_step, spec.but(experts=EXPERTS)),
                note=f"{EXPERTS} experts in every second FFN, EWA included",
            ),
            Contestant(AGAIN, partial(build_step, spec), note="the same once more: its ratio is noise"),
        ],
        title=f"{name}: S2D training step, batch {spec.batch}, {spec.points} points",
        start=settings.apart(),
        samples=spec.batch,
        **settings.interleaving(12, min_seconds=0.2),
    )
    section.comparisons.append(comparison)
    section.add_ratio(f"{name}.s2d", comparison, SPARSE, DENSE)
    section.add_ratio(f"{name}.noise", comparison, AGAIN, DENSE)
    if name != "point_bert":  # its rate is that of the comparison with the reference
        section.add_rate(f"{name}.samples_per_second", comparison, DENSE)


def _memory(section: Section, settings: Settings, spec: ModelSpec) -> None:
    """Compare the peak memory of a few steps of fresh processes with what the additional experts need."""
    sparse = spec.but(experts=EXPERTS)
    allowed = expert_bytes(sparse)
    section.add("memory.experts_mib", allowed / 2**20)
    allocators = (KEPT,) if settings.device.type == "cuda" else (KEPT, DEFAULT)
    for allocator in allocators:
        suffix = "" if allocator == KEPT else "_default"
        rounds = [
            tuple(peak_of_steps(own, allocator, settings) for own in (spec, sparse))
            for _ in range(settings.pick(PROCESSES, 1))
        ]
        extra = estimate([(ours - base) / allowed for base, ours in rounds], logarithmic=False)
        dense_peak, sparse_peak = (median(peaks) for peaks in zip(*rounds))
        section.add(f"memory.dense_mib{suffix}", dense_peak / 2**20)
        section.add(f"memory.s2d_mib{suffix}", sparse_peak / 2**20)
        section.add(f"memory.extra{suffix}", extra)


def peak_of_steps(spec: ModelSpec, allocator: str, settings: Settings, steps: int = 3) -> float:
    """Return the peak memory in bytes of a fresh process over a few training steps, minus that before the model.

    On a CPU this is resident memory, including memory that the allocator keeps or fragments; on a GPU, its tensors.
    """
    runner = WorkerRunner(spec.name, partial(build_step, spec), allocator, settings.device, settings.num_threads)
    try:
        runner.run(steps)
        return runner.facts()["peak_bytes_above_start"]
    finally:
        runner.close()
