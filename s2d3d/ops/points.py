"""Point operations in plain torch: farthest point sampling, nearest neighbours, gathering and grouping.

No compiled extension: the same code runs on CPU and GPU, under autograd and `torch.compile`. On a CPU numpy searches
maxima and smallest values, several times as fast as torch. Farthest point sampling has a Triton form for GPUs, used
where Triton is installed, and is one operation of a compiled graph.
Data sets (prefix sampling) and backbones (grouping) both use this file.
"""

import importlib.util

import numpy as np
import torch
from torch import Tensor

ORIGIN_RADIUS_SQ = 1e-3
"""Squared norm up to which the widely used CUDA sampler never picks a point."""
CACHED_DISTANCES = 2**20
"""Distances that a CPU computes at once. They bound the memory of a search, whatever the size of the clouds."""
SEARCHED_DISTANCES = 2**16
"""Distances that a CPU searches at once, in its second cache."""
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@torch.no_grad()
def farthest_point_sample(points: Tensor, num_samples: int, *, skip_origin: bool = False) -> Tensor:
    """Select points greedily, each as far as possible from those selected before.

    Args:
        points: (B, N, 3) coordinates.
        num_samples: how many points to select, in [1, N].
        skip_origin: never select a point whose squared norm is at most 1e-3, as the CUDA operator
            of Point-BERT and Point-MAE does. The first point, index 0, is selected in any case, and
            again whenever no other point may be.

    Returns:
        (B, num_samples) int64 indices; the first is 0, and a prefix is the selection of a smaller `num_samples`.

    Raises:
        ValueError: the shape is not (B, N, 3), or `num_samples` is outside [1, N].

    Source: Eldar et al. 1997, "The Farthest Point Strategy for Progressive Image Sampling"; Qi et al. 2017, PointNet++.

    Example:
        >>> farthest_point_sample(torch.tensor([[[0., 0, 0], [1, 0, 0], [5, 0, 0]]]), 2)
        tensor([[0, 2]])
    """
    _check_points(points, "points")
    batch, num_points, _ = points.shape
    if not 1 <= num_samples <= num_points:
        raise ValueError(f"num_samples is {num_samples}, must be between 1 and the {num_points} points of a cloud")
    if torch.compiler.is_compiling() and not is_exporting():
        return _farthest_points(points, num_samples, skip_origin)
    if points.is_cuda and _HAS_TRITON:
        from . import triton as ops_triton

        if num_points <= ops_triton.LARGEST_CLOUD:
            planes = points.detach().float().transpose(1, 2).contiguous()
            return ops_triton.farthest_point_sample(planes, num_samples, ORIGIN_RADIUS_SQ if skip_origin else -1.0)
    # Separate coordinate planes keep every pass over memory contiguous: about 5x the speed of (B, N, 3) on a CPU.
    planes = points.detach().float().permute(2, 0, 1).contiguous()
    if is_exporting():
        from . import export as ops_export

        return ops_export.farthest_point_sample(planes, num_samples, ORIGIN_RADIUS_SQ if skip_origin else -1.0)
    if _can_use_numpy(planes):
        parts = planes.split(max(1, SEARCHED_DISTANCES // num_points), dim=1)
        return torch.cat([_farthest_on_cpu(part, num_samples, skip_origin) for part in parts])
    distance = torch.full((batch, num_points), torch.inf, device=points.device)
    if skip_origin:
        distance.masked_fill_(planes.square().sum(0) <= ORIGIN_RADIUS_SQ, -1.0)
    selected = torch.zeros(batch, num_samples, dtype=torch.int64, device=points.device)
    newest = selected[:, :1]
    difference, squared = torch.empty_like(distance), torch.empty_like(distance)
    for step in range(1, num_samples):
        center = planes.gather(2, newest.expand(3, -1, -1))
        torch.sub(planes[0], center[0], out=difference)
        torch.mul(difference, difference, out=squared)
        for axis in (1, 2):
            torch.sub(planes[axis], center[axis], out=difference)
            squared.addcmul_(difference, difference)
        torch.minimum(distance, squared, out=distance)
        newest = distance.argmax(1, keepdim=True)
        selected[:, step] = newest[:, 0]
    return selected


def _farthest_on_cpu(planes: Tensor, num_samples: int, skip_origin: bool) -> Tensor:
    """Do the same with (3, B, N) planes by numpy, whose calls cost a tenth of torch's: small arrays, in cache."""
    xyz = np.ascontiguousarray(planes.numpy())
    _, batch, num_points = xyz.shape
    distance = np.full((batch, num_points), np.inf, dtype=np.float32)
    if skip_origin:
        distance[planes.square().sum(0).numpy() <= ORIGIN_RADIUS_SQ] = -1.0
    selected = np.zeros((batch, num_samples), dtype=np.int64)
    clouds, squared = np.arange(batch), np.empty_like(xyz)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite distances count as torch counts them
        for step in range(1, num_samples):
            center = xyz[:, clouds, selected[:, step - 1]]
            np.subtract(xyz, center[..., None], out=squared)
            np.multiply(squared, squared, out=squared)
            np.add(squared[0], squared[1], out=squared[0])
            np.add(squared[0], squared[2], out=squared[0])
            np.minimum(distance, squared[0], out=distance)
            selected[:, step] = distance.argmax(1)
    return torch.from_numpy(selected)


@torch.library.custom_op("s2d3d::farthest_points", mutates_args=())
def _farthest_points(points: Tensor, num_samples: int, skip_origin: bool) -> Tensor:
    """Do the same as one operation of a compiled graph: torch 2.11 computes the unrolled loop wrongly."""
    return farthest_point_sample(points, num_samples, skip_origin=skip_origin)


@_farthest_points.register_fake
def _(points: Tensor, num_samples: int, skip_origin: bool) -> Tensor:
    return points.new_empty((points.shape[0], num_samples), dtype=torch.int64)


@torch.no_grad()
def nearest_neighbours(query: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Find the nearest points of each query point.

    Args:
        query: (B, M, 3) coordinates.
        points: (B, N, 3) coordinates.
        num_neighbors: how many, in [1, N].

    Returns:
        (B, M, num_neighbors) int64 indices into `points`, in no particular order (a set of neighbours).

    Raises:
        ValueError: shapes do not fit, or `num_neighbors` is outside [1, N].
    """
    _check_points(query, "query")
    _check_points(points, "points")
    if not 1 <= num_neighbors <= points.shape[1]:
        raise ValueError(
            f"num_neighbors is {num_neighbors}, must be between 1 and the {points.shape[1]} points of a cloud"
        )
    query, points = query.detach().float(), points.detach().float()
    if is_exporting() or torch.jit.is_tracing():  # a program for any number of clouds
        return _nearest(query, points, num_neighbors)
    # A CPU takes few clouds at a time, whose distances stay in its cache: a third faster on clouds of 1024 points.
    on_cpu, num_queries = query.device.type == "cpu", query.shape[1]
    clouds = CACHED_DISTANCES // (num_queries * points.shape[1]) if on_cpu and num_queries else query.shape[0]
    rows = max(1, CACHED_DISTANCES // points.shape[1]) if on_cpu else max(1, num_queries)
    parts = zip(query.split(max(1, clouds)), points.split(max(1, clouds)))
    # Autocast would round the coordinates in the product, and find other neighbours.
    with torch.autocast(query.device.type, enabled=False):
        found = (
            torch.cat([_nearest(some, others, num_neighbors) for some in centers.split(rows, 1)], 1)
            for centers, others in parts
        )
        return torch.cat(list(found))


def _nearest(query: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    # |q - p|^2 without |q|^2, which does not change the order of a query's neighbours.
    distance = torch.baddbmm(points.square().sum(-1).unsqueeze(1), query, points.transpose(1, 2), alpha=-2.0)
    if _can_use_numpy(distance) and distance.shape[2] <= 64 * num_neighbors:  # for fewer, torch keeps a heap
        return _smallest(distance, num_neighbors)
    return distance.topk(num_neighbors, dim=-1, largest=False, sorted=False).indices


def _smallest(distance: Tensor, number: int) -> Tensor:
    """Return the indices (B, M, number) of the smallest of (B, M, N) distances, in ascending order without ties.

    Numpy's partition is several times as fast as torch's `topk` on a CPU, but returns values: the indices are those
    up to the last value. Rows where more share it, or with NaN, are left to `topk`.
    """
    batch, num_queries, num_points = distance.shape
    found = torch.empty(batch * num_queries, number, dtype=torch.int64)
    rows = max(1, SEARCHED_DISTANCES // num_points)
    starts = np.repeat(np.arange(rows) * num_points, number)
    for part, result in zip(distance.flatten(0, 1).split(rows), found.split(rows)):
        values = part.numpy()
        last = np.partition(values, number - 1, axis=1)[:, number - 1 : number]
        index = np.flatnonzero(values <= last)
        if len(index) == result.numel():
            index -= starts[: len(index)]
            if index.min() >= 0 and index.max() < num_points:  # as many in each row
                result.copy_(torch.from_numpy(index).view_as(result))
                continue
        torch.topk(part, number, dim=1, largest=False, sorted=False, out=(torch.empty(0), result))
    return found.view(batch, num_queries, number)


def _can_use_numpy(tensor: Tensor) -> bool:
    """Tell whether numpy may compute on a tensor: with values, on a CPU, where no program is made of the operations."""
    return (
        type(tensor) is Tensor
        and tensor.numel() > 0
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # of torch.func.grad and its like
    )


def gather_points(features: Tensor, index: Tensor) -> Tensor:
    """Pick rows of each cloud.

    Args:
        features: (B, N, C).
        index: (B, ...) int64, values in [0, N).

    Returns:
        (B, ..., C): `features[b, index[b, ...]]`.

    Example:
        >>> gather_points(torch.arange(4.).view(1, 4, 1), torch.tensor([[[3, 0]]])).flatten().tolist()
        [3.0, 0.0]
    """
    batch, num_points, channels = features.shape
    offset = torch.arange(batch, device=index.device).view(-1, *[1] * (index.dim() - 1)) * num_points
    rows = features.reshape(batch * num_points, channels).index_select(0, (index + offset).flatten())
    return rows.view(*index.shape, channels)


def group_points(
    points: Tensor, num_group: int, group_size: int, *, skip_origin: bool = False
) -> tuple[Tensor, Tensor]:
    """Cut clouds into overlapping patches: farthest-point centres, each with its nearest points.

    Args:
        points: (B, N, C), the first three channels are the coordinates.
        num_group: patches per cloud, G.
        group_size: points per patch, S.
        skip_origin: see `farthest_point_sample`.

    Returns:
        groups (B, G, S, C), coordinates relative to the centre; centres (B, G, 3).

    Source: Yu et al. 2022, Point-BERT.
    """
    xyz = points[..., :3]
    centers = gather_points(xyz, farthest_point_sample(xyz, num_group, skip_origin=skip_origin))
    groups = gather_points(points, nearest_neighbours(centers, xyz, group_size))
    relative = groups[..., :3] - centers.unsqueeze(2)
    if points.shape[-1] > 3:
        relative = torch.cat([relative, groups[..., 3:]], dim=-1)
    return relative, centers


def is_exporting() -> bool:
    """Return whether this code is being exported, and not compiled: torch 2.11 reports both as exporting.

    `torch.export` with `strict=True` traces as compiling does, and is taken for it.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _check_points(points: Tensor, name: str) -> None:
    if points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"{name} has shape {tuple(points.shape)}, must be (B, N, 3)")
