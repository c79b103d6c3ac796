"""Comparison of this package with a reference module: the contestants, and the limits given by the arithmetic."""

from collections.abc import Callable
from functools import partial

import torch

from .comparison import Comparison
from .hardware import matmul_rate, missing_bf16
from .interleave import DEFAULT, Contestant, Task, interleave
from .pointcloud import NOTE
from .section import Section, Settings
from .stats import spread
from .training import BF16_TOLERANCE, ModelSpec

EXPERTS = 4
REFERENCE_A, REFERENCE_B = "reference, as users run it", "reference, our allocator"
DENSE, DENSE_DEFAULT = "ours, dense", "ours, dense, default allocator"
SPARSE, MERGED, FOLDED = "ours, S2D", "ours, merged", "ours, BatchNorm folded"
PUBLIC = "torch-pointcloud"
BF16, COMPILED = "ours, dense, bf16", "ours, dense, compiled"
VERSUS_PAIRS = ((DENSE, REFERENCE_A), (DENSE, REFERENCE_B))
"""Ratios to resolve in a comparison with a reference module."""
Build = Callable[[ModelSpec], Task]


def contestants(build: Build, spec: ModelSpec, settings: Settings) -> list[Contestant]:
    """List the dense contestants of a comparison with a reference module.

    Condition A, "as users run it": the reference with the allocator of the system and torch's default AdamW, ours as
    shipped. Condition B: allocator and optimizer as ours. On a GPU the allocator is PyTorch's own in both.

    Args:
        build: makes the task of a model.
        spec: of our dense model.
        settings: whether bf16 and compiled models take part.
    """
    on_gpu = settings.device.type == "cuda"
    reference = spec.but(source="reference")
    listed = [
        Contestant(REFERENCE_A, partial(build, reference.but(fused=False)), allocator=DEFAULT, note="system allocator"),
        Contestant(REFERENCE_B, partial(build, reference), note="allocator and optimizer as ours"),
        Contestant(DENSE, partial(build, spec), note="as shipped"),
    ]
    if not on_gpu:
        listed.append(Contestant(DENSE_DEFAULT, partial(build, spec), allocator=DEFAULT, note="system allocator"))
    if settings.force_bf16 or not missing_bf16(settings.device):
        low = partial(build, spec.but(precision="bf16"))
        listed.append(Contestant(BF16, low, tolerance=BF16_TOLERANCE, note="autocast"))
    if settings.compile or on_gpu:
        listed.append(Contestant(COMPILED, partial(build, spec.but(compile=True)), note="torch.compile"))
    return listed


def add_versus(section: Section, settings: Settings, name: str, comparison: Comparison, flops: int) -> None:
    """Note the speed-ups in both conditions and in bf16, the throughput, and the limits of the arithmetic.

    Args:
        section: gets the measures, under `name`; has those of `add_rates` already.
        settings: whether bf16 took part.
        name: of the model.
        comparison: of the contestants above.
        flops: of the matrix products of one run of our dense model.
    """
    section.add_speedup(f"{name}.A", comparison, DENSE, REFERENCE_A)
    section.add_speedup(f"{name}.B", comparison, DENSE, REFERENCE_B)
    section.add_ratio(f"{name}.allocator", comparison, DENSE_DEFAULT, DENSE)
    section.add_rate(f"{name}.samples_per_second", comparison, DENSE)
    section.add_rate(f"{name}.reference_samples_per_second", comparison, REFERENCE_A)
    reason = missing_bf16(settings.device)
    if reason and not settings.force_bf16:
        section.add(f"{name}.bf16_A", None, reason)
    else:
        section.add_speedup(f"{name}.bf16_A", comparison, BF16, REFERENCE_A)
    rate = section.measures[f"{section.device}.{section.name}.matmul_float32"].value
    assert rate is not None  # `add_rates` always measures float32
    least = flops / (rate * 1e9)
    section.add(f"{name}.gflop", flops / 1e9)
    section.add(f"{name}.limit_samples_per_second", comparison.samples / least)
    for condition, reference in (("A", REFERENCE_A), ("B", REFERENCE_B)):
        reason = comparison.missing(reference)
        limit = None if reason else spread([seconds / least for seconds in comparison.times[reference]])
        section.add(f"{name}.limit_{condition}", limit, reason)


def measure_package(section: Section, settings: Settings, name: str, work: str, build: Build, spec: ModelSpec) -> None:
    """Compare our dense model with torch-pointcloud's form of it, as users run it, and note the speed-up.

    This is a separate comparison, because all processes of a comparison are alive at the same time and need memory.

    Args:
        section: gets comparison and measure.
        settings: how long.
        name: of the model.
        work: "step" or "evaluation", for names.
        build: makes the task of a model.
        spec: of our dense model.
    """
    public = spec.but(source="torch-pointcloud", fused=False)
    comparison = interleave(
        f"{name} {work}, torch-pointcloud",
        [
            Contestant(PUBLIC, partial(build, public), allocator=DEFAULT, note=f"{NOTE}; system allocator"),
            Contestant(DENSE, partial(build, spec), note="as shipped"),
        ],
        title=f"{name}: {work} against torch-pointcloud, batch {spec.batch}, {spec.points} points",
        start=settings.apart(),
        samples=spec.batch,
        **settings.interleaving(6, min_seconds=0.2),
    )
    section.comparisons.append(comparison)
    section.add_speedup(f"{name}.torch_pointcloud", comparison, DENSE, PUBLIC)


def add_rates(section: Section, settings: Settings) -> None:
    """Note the attained rates of matrix products of the FFN's size, in GFLOP/s."""
    size = settings.pick((2080, 384, 1536), (64, 16, 32))
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        rate = matmul_rate(*size, dtype=dtype, device=settings.device, seconds=settings.pick(1.0, 0.0))
        section.add(f"matmul_{name}", rate)
