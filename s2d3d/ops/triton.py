"""Farthest point sampling as one Triton kernel: on a GPU the plain form is a loop of small launches.

Importing this file needs Triton, which comes with torch's CUDA builds: import it where a tensor is on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_CLOUD = 16384
"""Points of a cloud whose coordinates and distances one program keeps in registers."""


@triton.jit
def _farthest_points(planes, selected, num_points, num_samples, skip_radius_sq, BLOCK: tl.constexpr):
    cloud = tl.program_id(0)
    x_plane = planes + cloud * 3 * num_points
    y_plane = x_plane + num_points
    z_plane = y_plane + num_points
    offsets = tl.arange(0, BLOCK)
    inside = offsets < num_points
    x = tl.load(x_plane + offsets, mask=inside, other=0.0)
    y = tl.load(y_plane + offsets, mask=inside, other=0.0)
    z = tl.load(z_plane + offsets, mask=inside, other=0.0)
    distance = tl.where(x * x + y * y + z * z <= skip_radius_sq, -1.0, float("inf"))
    distance = tl.where(inside, distance, float("-inf"))
    newest = tl.zeros((), dtype=tl.int32)
    tl.store(selected + cloud * num_samples, newest.to(tl.int64))
    for step in range(1, num_samples):
        dx = x - tl.load(x_plane + newest)
        dy = y - tl.load(y_plane + newest)
        dz = z - tl.load(z_plane + newest)
        distance = tl.minimum(distance, dx * dx + dy * dy + dz * dz)
        newest = tl.argmax(distance, axis=0).to(tl.int32)
        tl.store(selected + cloud * num_samples + step, newest.to(tl.int64))


def farthest_point_sample(planes: Tensor, num_samples: int, skip_radius_sq: float) -> Tensor:
    """Select all points of a cloud in one launch; `ops.farthest_point_sample` says what.

    Args:
        planes: (B, 3, N) float32, contiguous, on a GPU; N at most `LARGEST_CLOUD`.
        num_samples: how many, in [1, N].
        skip_radius_sq: points of at most this squared norm are not selected; below 0: all may be.

    Returns:
        (B, num_samples) int64 indices, as the plain form's up to points whose distances differ by rounding.
    """
    batch, _, num_points = planes.shape
    selected = torch.empty(batch, num_samples, dtype=torch.int64, device=planes.device)
    block = triton.next_power_of_2(num_points)
    warps = min(16, max(1, block // 128))
    _farthest_points[(batch,)](
        planes, selected, num_points, num_samples, skip_radius_sq, BLOCK=block, num_warps=warps
    )  # fmt: skip
    return selected
