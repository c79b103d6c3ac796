"""Chamfer distance between small clouds, in plain torch."""

import torch
from torch import Tensor

NORMS = ("l2", "l1")
CACHED_DISTANCES = 2**18
"""Distances computed at once: 1 MiB of float32, which stays in the cache of a core."""


def chamfer_distance(first: Tensor, second: Tensor, *, norm: str = "l2") -> Tensor:
    """Average the distance from each point to the nearest point of the other cloud, in both directions.

    With "l2" it is mean(d^2) of the points of `first` plus mean(d^2) of those of `second`; with "l1" half the sum of
    the two means of d. The nearest points are found from exact differences, without a gradient; the gradient flows
    only through the chosen pairs. So memory beyond the inputs is about 1 MiB of distances, or those of one pair of
    clouds, and three numbers for each point.

    Args:
        first: (P, N, 3) float.
        second: (P, M, 3) float, on the same device; cloud p is compared with cloud p of `first`.
        norm: "l2" or "l1".

    Returns:
        The distance, 0-d, float32 or the inputs' wider type.

    Raises:
        ValueError: the shapes do not fit, a cloud is empty, or the norm is unknown.

    Example:
        >>> square = torch.tensor([[[0., 0, 0], [1, 0, 0]]])
        >>> chamfer_distance(square, square + torch.tensor([0, 0, 2.])).item()
        8.0
    """
    shapes = tuple(first.shape), tuple(second.shape)
    fits = all(len(shape) == 3 and shape[2] == 3 and 0 not in shape for shape in shapes)
    if not fits or shapes[0][0] != shapes[1][0]:
        raise ValueError(f"clouds of shape {shapes[0]} and {shapes[1]}, must be (P, N, 3) and (P, M, 3), not empty")
    if norm not in NORMS:
        raise ValueError(f"norm is '{norm}', must be one of {', '.join(NORMS)}")
    kind = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        first, second = first.to(kind), second.to(kind)
        of_first, of_second = _nearest_both_ways(first, second)
        there = (first - _pick(second, of_first)).square().sum(-1)
        back = (second - _pick(first, of_second)).square().sum(-1)
        if norm == "l2":
            return there.mean() + back.mean()
        return (_root(there).mean() + _root(back).mean()) / 2


@torch.no_grad()
def _nearest_both_ways(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each point the index of the nearest one of the other cloud: (P, N) and (P, M) int64."""
    clouds, points, others = first.shape[0], first.shape[1], second.shape[1]
    size = max(1, CACHED_DISTANCES // (points * others)) if first.device.type == "cpu" else clouds
    of_first = torch.empty(clouds, points, dtype=torch.int64, device=first.device)
    of_second = torch.empty(clouds, others, dtype=torch.int64, device=first.device)
    parts = zip(first.split(size), second.split(size), of_first.split(size), of_second.split(size))
    for a, b, to_b, to_a in parts:
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        torch.argmin(distance, 2, out=to_b)
        torch.argmin(distance, 1, out=to_a)
    return of_first, of_second


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Return `points[p, index[p, i]]`, (P, I, 3)."""
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))


def _root(squares: Tensor) -> Tensor:
    """Return square roots whose gradient at 0 is 0, not infinite times 0."""
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
