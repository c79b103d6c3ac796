"""Experts Weights Averaging as one Triton kernel: a mean and a lerp in a single pass over the weights.

Importing this file needs Triton, which comes with torch's CUDA builds: import it where a tensor is on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _average_experts(
    stacked, weight, size, NUM_EXPERTS: tl.constexpr, WEIGHT_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr
):
    if WEIGHT_IN_MEMORY:
        weight = tl.load(weight).to(tl.float32)
    size = tl.cast(size, tl.int64)  # times an expert's number it may pass 2^31
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    mean = tl.zeros((BLOCK,), dtype=tl.float32)
    for expert in tl.static_range(NUM_EXPERTS):
        mean += tl.load(stacked + expert * size + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = mean / NUM_EXPERTS
    # As torch's lerp: the second form ends at the mean exactly.
    for expert in tl.static_range(NUM_EXPERTS):
        place = stacked + expert * size + offsets
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        moved = tl.where(weight < 0.5, value + weight * (mean - value), mean - (mean - value) * (1.0 - weight))
        tl.store(place, moved.to(stacked.dtype.element_ty), mask=inside)


def average_experts_(stacked: Tensor, weight: float | Tensor) -> None:
    """Move K experts by `weight` towards their mean, in place, reading and writing each value once from memory.

    Args:
        stacked: (K, ...) contiguous, on a GPU, float32 or lower; computed in float32.
        weight: b K / (K - 1) of share rate b; a 0-d tensor on the same GPU is read when the kernel runs.
    """
    num_experts, size = stacked.shape[0], stacked[0].numel()
    grid, in_memory = (triton.cdiv(size, 1024),), isinstance(weight, Tensor)
    _average_experts[grid](stacked, weight, size, NUM_EXPERTS=num_experts, WEIGHT_IN_MEMORY=in_memory, BLOCK=1024)
