"""Batch transforms of point clouds: (B, N, C) in, a new (B, N, C) out, randomness from an explicit generator.

Every transform is called as `transform(points, generator)`. Numbers are drawn on the generator's device and moved
to that of the points, so that a CPU generator gives the same augmentation on every device. They do not depend on the
channels: coordinates are the same with and without normals and colours. Normals turn with the points, colours stay.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..channels import WIDTH, XYZ, by_group, check_channels
from ..errors import InputError
from .precision import FAR_RADII

Transform = Callable[[Tensor, Generator], Tensor]


def coordinates(points: Tensor) -> Tensor:
    """Return x, y, z of clouds (..., C), contiguous where there are more channels: results do not depend on these."""
    return points if points.shape[-1] == WIDTH else points[..., :WIDTH].contiguous()


def replace_coordinates(points: Tensor, xyz: Tensor) -> Tensor:
    """Return clouds (..., C) with other coordinates (..., 3); the further channels stay."""
    return xyz if points.shape[-1] == WIDTH else torch.cat([xyz, points[..., WIDTH:]], dim=-1)


def turn(points: Tensor, channels: str, rotation: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a rotation or reflection about the origin to the coordinates and normals of clouds (..., C).

    Args:
        points: (..., C), not changed.
        channels: of a point.
        rotation: maps vectors (..., 3) to vectors (..., 3).
    """
    parts = [part if group == "rgb" else rotation(part) for group, part in by_group(points, channels).items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def scale_axes(points: Tensor, factors: Tensor, channels: str) -> Tensor:
    """Multiply the axes of clouds (..., C) by factors above 0, (..., 3); normals stay perpendicular to the surface.

    The normal of a stretched surface is the normal times the inverse of the (here diagonal) matrix, at unit length.
    """
    parts = by_group(points, channels)
    parts["xyz"] = parts["xyz"] * factors
    if "normal" in parts:
        parts["normal"] = F.normalize(parts["normal"] / factors, dim=-1)
    return parts["xyz"] if len(parts) == 1 else torch.cat(list(parts.values()), dim=-1)


def turn_up_axis(points: Tensor, source: str, target: str = "z", *, channels: str = XYZ) -> Tensor:
    """Rotate clouds so that what pointed along `source` points along `target`.

    y to z is (x, y, z) -> (x, -z, y), a quarter turn about x; z to y is its inverse, (x, y, z) -> (x, z, -y).
    Both are proper rotations (determinant 1): nothing is mirrored.

    Args:
        points: (..., C).
        source: "y" or "z", the present vertical.
        target: "y" or "z", the wanted one.
        channels: of a point; normals are turned too.

    Raises:
        InputError: another axis.

    Example:
        >>> turn_up_axis(torch.tensor([1., 2., 3.]), "y", "z").tolist()
        [1.0, -3.0, 2.0]
    """
    if source not in ("y", "z") or target not in ("y", "z"):
        raise InputError(f"up axis is {source!r} to {target!r}, must be 'y' or 'z'")
    if source == target:
        return points.clone()

    def quarter(vectors: Tensor) -> Tensor:
        x, y, z = vectors.unbind(-1)
        return torch.stack((x, -z, y) if target == "z" else (x, z, -y), dim=-1)

    return turn(points, channels, quarter)


def normalize_unit_sphere(points: Tensor) -> Tensor:
    """Move the mean of each cloud to the origin and scale its farthest point to distance 1.

    Args:
        points: (B, N, 3), returned in the dtype it came in. Computed in float32; a cloud that is far from the origin,
            see `FAR_RADII`, is centred in float64 first. A cloud of equal points becomes zeros.

    Example:
        >>> normalize_unit_sphere(torch.tensor([[[0., 0, 0], [4, 0, 0]]])).tolist()
        [[[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]
    """
    center, radius = unit_sphere_frame(points)
    normalized = ((points.float() - center) / radius).to(points.dtype)
    far = (center.norm(dim=-1, keepdim=True) > FAR_RADII * radius).flatten()
    if far.any():
        moved = points[far].double()
        moved = (moved - moved.mean(dim=1, keepdim=True)).float()
        normalized[far] = normalize_unit_sphere(moved).to(points.dtype)
    return normalized


def unit_sphere_frame(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (B, 1, 3) of clouds (B, N, 3) and the distance (B, 1, 1) of the point farthest from it, float32.

    The distance is at least the smallest normal number, so that one may divide by it.
    """
    center = points.float().mean(dim=1, keepdim=True)
    radius = (points.float() - center).norm(dim=-1).amax(dim=1).view(-1, 1, 1)
    return center, radius.clamp_min(torch.finfo(torch.float32).tiny)


def normalize_stored(points: Tensor) -> Tensor:
    """Normalise each cloud, except float16 clouds already normalised up to rounding: rounding twice would add error.

    Args:
        points: (n, P, C) float16 or float32. What becomes of a cloud does not depend on the others. Channels other than
            the coordinates stay.
    """
    parts = []
    for part in coordinates(points).split(512):
        normalized = normalize_unit_sphere(part)
        if part.dtype == torch.float16:
            change = (normalized.float() - part.float()).abs().amax(dim=(1, 2), keepdim=True)
            normalized = torch.where(change <= torch.finfo(torch.float16).eps, part, normalized)
        parts.append(normalized)
    return replace_coordinates(points, torch.cat(parts))


@dataclass(frozen=True)
class Scale:
    """Multiply each axis of each cloud by its own factor from U(low, high); see `scale_axes`."""

    low: float = 2 / 3
    high: float = 3 / 2
    channels: str = XYZ

    def __post_init__(self) -> None:
        _check(0 < self.low <= self.high < math.inf, f"scale is ({self.low}, {self.high}), must be 0 < low <= high")

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        factors = _uniform(points, (len(points), 1, WIDTH), self.low, self.high, generator)
        return scale_axes(points, factors, self.channels)


@dataclass(frozen=True)
class Shift:
    """Add to each axis of each cloud its own offset from U(-limit, limit)."""

    limit: float = 0.2

    def __post_init__(self) -> None:
        _check(0 <= self.limit < math.inf, f"shift is {self.limit}, must be at least 0")

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        offsets = _uniform(points, (len(points), 1, WIDTH), -self.limit, self.limit, generator)
        return replace_coordinates(points, points[..., :WIDTH] + offsets)


@dataclass(frozen=True)
class RotateVertical:
    """Turn each cloud about the vertical axis by its own angle from U(-limit, limit), in radians; normals with it."""

    limit: float = math.pi
    up_axis: str = "z"
    channels: str = XYZ

    def __post_init__(self) -> None:
        _check(0 <= self.limit <= math.pi, f"rotation limit is {self.limit}, must be in [0, pi]")
        _check(self.up_axis in ("y", "z"), f"up_axis is {self.up_axis!r}, must be 'y' or 'z'")

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        angle = _uniform(points, (len(points), 1), -self.limit, self.limit, generator)
        cos, sin = angle.cos(), angle.sin()

        def about_vertical(vectors: Tensor) -> Tensor:
            x, y, z = vectors.unbind(-1)
            if self.up_axis == "z":
                return torch.stack((cos * x - sin * y, sin * x + cos * y, z), dim=-1)
            return torch.stack((cos * x + sin * z, y, cos * z - sin * x), dim=-1)

        return turn(points, self.channels, about_vertical)


@dataclass(frozen=True)
class Jitter:
    """Add normal noise of deviation `std` to every coordinate, cut at `clip` (default 5 deviations)."""

    std: float = 0.01
    clip: float | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.std < math.inf, f"jitter is {self.std}, must be at least 0")
        _check(self.clip is None or self.clip >= 0, f"jitter clip is {self.clip}, must be at least 0")

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        clip = 5 * self.std if self.clip is None else self.clip
        noise = torch.randn((*points.shape[:-1], WIDTH), generator=generator, device=generator.device)
        return replace_coordinates(points, points[..., :WIDTH] + noise.mul_(self.std).clamp_(-clip, clip).to(points))


@dataclass(frozen=True)
class PointDropout:
    """Replace points by the first of their cloud, each with a chance drawn per cloud from U(0, max_ratio).

    Source: Qi et al. 2017, PointNet++, "random input dropout".
    """

    max_ratio: float = 0.875

    def __post_init__(self) -> None:
        _check(0 <= self.max_ratio < 1, f"dropout is {self.max_ratio}, must be in [0, 1)")

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        ratio = _uniform(points, (len(points), 1), 0.0, self.max_ratio, generator)
        dropped = _uniform(points, points.shape[:2], 0.0, 1.0, generator) < ratio
        return torch.where(dropped.unsqueeze(-1), points[:, :1], points)


@dataclass(frozen=True)
class Compose:
    """Apply transforms one after the other; an empty list returns the points unchanged."""

    transforms: Sequence[Transform] = ()

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        for transform in self.transforms:
            points = transform(points, generator)
        return points


def build_augmentation(
    *,
    scale: tuple[float, float] | None = (2 / 3, 3 / 2),
    shift: float = 0.2,
    rotate: bool = False,
    jitter: float = 0.0,
    dropout: float = 0.0,
    channels: str = XYZ,
) -> Compose:
    """Build the training augmentation: rotation, scale, shift, jitter, dropout, in this order; zero or None is off.

    Normals turn with the points and stay perpendicular to a scaled surface; colours stay.

    Args:
        scale: low and high factor, drawn for each axis of each cloud.
        shift: largest offset, drawn in the same way.
        rotate: any angle about the vertical axis z.
        jitter: deviation of the noise on each coordinate, cut at 5 deviations.
        dropout: largest share of points replaced by the first, in [0, 1).
        channels: of a point.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> augment = build_augmentation(jitter=0.01)
        >>> augment(torch.rand(2, 64, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 64, 3])
    """
    check_channels(channels)
    transforms: list[Transform] = []
    if rotate:
        transforms.append(RotateVertical(channels=channels))
    if scale is not None:
        _check(len(scale) == 2, f"scale is {tuple(scale)}, must be a pair (low, high)")
        transforms.append(Scale(*scale, channels=channels))
    for value, build in ((shift, Shift), (jitter, Jitter), (dropout, PointDropout)):
        transform = build(value)  # built in any case: a negative value is an error, not "off"
        if value:
            transforms.append(transform)
    return Compose(tuple(transforms))


def _uniform(points: Tensor, shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    drawn = torch.rand(tuple(shape), generator=generator, device=generator.device)
    return drawn.mul_(high - low).add_(low).to(points)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
