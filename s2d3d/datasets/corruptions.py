"""Corrupted test clouds: seven corruptions of five severities, computed on the fly as functions of a shape's number.

The parameters are those of ModelNet-C, see docs/robustness.md. Its counts of points are meant for clouds of 1024; for
other clouds they are scaled in proportion.

They are meant for coordinates alone. With more channels the corrupted coordinates are the same: normals turn with the
points and stay perpendicular to a scaled surface, noise leaves normals and colours, and an added point has those of a
point of the cloud: in a cluster of its centre, elsewhere of any.

Source: Ren et al. 2022, "Benchmarking and Analyzing Point Cloud Classification under Corruptions", arXiv 2202.03377,
and the generator published with it.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..channels import WIDTH, XYZ
from ..errors import InputError, did_you_mean
from ..ops.points import gather_points
from ..random_state import derived_generator
from .base import PointCloudDataset
from .transforms import coordinates, normalize_unit_sphere, replace_coordinates, scale_axes, turn, unit_sphere_frame

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_POINTS = 1024
"""Points of a cloud for which the published counts are meant."""
DROP_RATES = (0.25, 0.375, 0.5, 0.625, 0.75)
COUNTS = {"drop_local": 100, "add_global": 10, "add_local": 100}
"""Points dropped or added per step of severity."""
MAX_CLUSTERS = 7
CLUSTER_STD = (0.075, 0.125)


def corrupt(points: Tensor, name: str, severity: int, *, seed: int, index: int, channels: str = XYZ) -> Tensor:
    """Corrupt one cloud.

    Args:
        points: (N, C) float32, z up, unit sphere; not changed.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5; 0 returns the points as they are.
        seed: of the corrupted set.
        index: number of the shape. The result is a function of the points, name, severity, seed and index.
        channels: of a point.

    Returns:
        (M, C) float32; M is `corrupted_size(N, name, severity)`.

    Raises:
        InputError: an unknown name, or a severity outside 0 .. 5.

    Example:
        >>> corrupt(torch.rand(1024, 3), "drop_local", 2, seed=0, index=7).shape
        torch.Size([824, 3])
    """
    check_corruption(name, severity)
    if severity == 0:
        return points
    generator = derived_generator(seed, "corruption", name, severity, index)
    return CORRUPTIONS[name](points, severity, generator, channels)


def corrupted_size(num_points: int, name: str, severity: int) -> int:
    """Return how many points a corruption leaves of `num_points`; it depends on nothing else, so batches stack.

    Example:
        >>> [corrupted_size(1024, name, 5) for name in ("jitter", "drop_global", "drop_local", "add_local")]
        [1024, 256, 524, 1524]
    """
    check_corruption(name, severity)
    if severity == 0:
        return num_points
    if name == "drop_global":
        return max(1, int(num_points * (1 - DROP_RATES[severity - 1])))
    if name not in COUNTS:
        return num_points
    changed = max(1, round(COUNTS[name] * severity * num_points / REFERENCE_POINTS))
    return max(1, num_points - changed) if name == "drop_local" else num_points + changed


def parse_corruption(text: str) -> tuple[str, int]:
    """Read `NAME:SEVERITY`.

    Raises:
        InputError: another form, an unknown name, or a severity outside 1 .. 5.

    Example:
        >>> parse_corruption("jitter:3")
        ('jitter', 3)
    """
    name, colon, severity = text.partition(":")
    if not colon or not severity.isdecimal():
        raise InputError(f"corruption '{text}': write NAME:SEVERITY, such as jitter:3, or all")
    check_corruption(name, int(severity))
    if int(severity) == 0:
        raise InputError(f"corruption '{text}': severity must be 1 .. {SEVERITIES[-1]}")
    return name, int(severity)


def check_corruption(name: str, severity: int) -> None:
    """Raise InputError for an unknown name, or a severity outside 0 .. 5."""
    if name not in CORRUPTIONS:
        known = ", ".join(CORRUPTIONS)
        raise InputError(f"unknown corruption '{name}'{did_you_mean(name, CORRUPTIONS)} (known: {known})")
    if severity not in (0, *SEVERITIES):
        raise InputError(f"corruption {name}: severity is {severity}, must be 1 .. {SEVERITIES[-1]}")


class CorruptedDataset(PointCloudDataset):
    """A test set seen through a corruption; its storage is shared with the clean set.

    All samples have `corrupted_size(num_points, name, severity)` points. A shape's corruption depends on its number in
    the set as it was read: neither on batch size, order, process, nor on a `subset` taken before or after.

    Corruptions are made for clouds in the unit sphere. A cloud of a set that is not normalised is corrupted in
    its own such frame and put back.

    Votes corrupt the plain cloud first; then come the vote's order of points and its augmentation.

    Example:
        >>> test = PointCloudDataset(torch.rand(3, 256, 3), torch.zeros(3), ["any"], split="test", num_points=256)
        >>> CorruptedDataset(test, "drop_global", 3)[0][0].shape
        torch.Size([128, 3])
    """

    def __init__(self, dataset: PointCloudDataset, name: str, severity: int, *, seed: int = 0) -> None:
        """Corrupt what `dataset` samples.

        Args:
            dataset: any split but the training one.
            name: one of `CORRUPTIONS`.
            severity: 1 to 5; 0 changes nothing.
            seed: of the corrupted set; keep it for all models that are compared.

        Raises:
            InputError: an unknown name or severity, a training set, or a set that is corrupted already.
        """
        check_corruption(name, severity)
        if dataset.training or isinstance(dataset, CorruptedDataset):
            kind = "a training set" if dataset.training else "corrupted already"
            raise InputError(f"{dataset.source}: is {kind}; corruptions are for clean test sets")
        self.__dict__.update(dataset.__dict__)
        self._storage_mask = None  # would belong to the clean points
        self.corruption, self.severity, self.corruption_seed = name, severity, seed

    def sample(self, indices: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return corrupted points (B, M, C) float32 and labels (B,); a generator shuffles the order of the points."""
        points, labels = super().sample(indices)
        rows = self._rows[indices].tolist()
        seed = self.corruption_seed
        own_frame = self.severity > 0 and not self.normalized
        if own_frame:
            center, radius = unit_sphere_frame(coordinates(points))
            points = replace_coordinates(points, (points[..., :WIDTH] - center) / radius)
        corrupted = [
            corrupt(p, self.corruption, self.severity, index=i, seed=seed, channels=self.channels)
            for p, i in zip(points, rows)
        ]
        points = torch.stack(corrupted)
        if own_frame:
            points = replace_coordinates(points, points[..., :WIDTH] * radius + center)
        if generator is not None:
            points = gather_points(points, torch.rand(points.shape[:2], generator=generator).argsort(dim=1))
        return points.contiguous(), labels


def _jitter(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Add normal noise to every coordinate."""
    noise = 0.01 * severity * torch.randn((len(points), WIDTH), generator=generator)
    return replace_coordinates(points, points[:, :WIDTH] + noise)


def _scale(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Scale each axis by its own factor from U(1/S, S), then bring the cloud back into the unit sphere."""
    high = 1.5 + 0.1 * severity
    factors = 1 / high + (high - 1 / high) * torch.rand(3, generator=generator)
    points = scale_axes(points, factors, channels)
    return replace_coordinates(points, normalize_unit_sphere(coordinates(points).unsqueeze(0))[0])


def _rotate(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Rotate about each axis by its own angle from U(-a, a).

    The published order of the three turns, for clouds with y up, is z, y, x: here that is y, z (the vertical), x.
    """
    limit = math.pi / 30 * severity
    x, y, z = ((2 * torch.rand(3, generator=generator) - 1) * limit).tolist()
    matrix = _rotation(0, x) @ _rotation(2, z) @ _rotation(1, y)
    return turn(points, channels, lambda vectors: vectors @ matrix.T)


def _drop_global(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Keep a random subset."""
    kept = corrupted_size(len(points), "drop_global", severity)
    return points[torch.randperm(len(points), generator=generator)[:kept]]


def _drop_local(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Drop random clusters: one after the other, a random remaining point with its nearest neighbours."""
    total = len(points) - corrupted_size(len(points), "drop_local", severity)
    for size in _cluster_sizes(total, MAX_CLUSTERS, generator):
        xyz = coordinates(points)
        center = xyz[_randint(len(xyz), generator)]
        nearest = (xyz - center).square().sum(1).argsort(stable=True)
        points = points[nearest[size:].sort().values]
    return points


def _add_global(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Add points uniform in the unit ball."""
    added = corrupted_size(len(points), "add_global", severity) - len(points)
    directions = torch.nn.functional.normalize(torch.randn(added, WIDTH, generator=generator), dim=1)
    places = directions * torch.rand(added, 1, generator=generator) ** (1 / 3)
    if points.shape[1] == WIDTH:
        return torch.cat([points, places])
    models = points[torch.randint(len(points), (added,), generator=generator)]
    return torch.cat([points, replace_coordinates(models, places)])


def _add_local(points: Tensor, severity: int, generator: Generator, channels: str = XYZ) -> Tensor:
    """Add normal clusters around random points of the cloud.

    As published, an added point p outside the unit sphere is moved inside to p / |p|^2.
    """
    total = corrupted_size(len(points), "add_local", severity) - len(points)
    sizes = _cluster_sizes(total, min(MAX_CLUSTERS, len(points)), generator)
    centers = points[torch.randperm(len(points), generator=generator)[: len(sizes)]]
    low, high = CLUSTER_STD
    deviations = low + (high - low) * torch.rand(len(centers), generator=generator)
    cluster = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    models = centers[cluster]
    added = models[:, :WIDTH] + deviations[cluster, None] * torch.randn(len(cluster), WIDTH, generator=generator)
    added = added / added.square().sum(1, keepdim=True).clamp_min(1)
    return torch.cat([points, replace_coordinates(models, added)])


CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator, str], Tensor]] = {
    "scale": _scale,
    "jitter": _jitter,
    "rotate": _rotate,
    "drop_global": _drop_global,
    "drop_local": _drop_local,
    "add_global": _add_global,
    "add_local": _add_local,
}
"""Name -> function of (points (N, C), severity 1 .. 5, generator, channels)."""


def _cluster_sizes(total: int, max_clusters: int, generator: Generator) -> list[int]:
    """Share `total` points out among 1 to `max_clusters` clusters; each point chooses its cluster independently."""
    clusters = 1 + _randint(max_clusters, generator)
    return torch.randint(clusters, (total,), generator=generator).bincount(minlength=clusters).tolist()


def _randint(high: int, generator: Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def _rotation(axis: int, angle: float) -> Tensor:
    """Return the matrix that turns column vectors about an axis."""
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix
