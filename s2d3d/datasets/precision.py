"""Whether the numbers of a cloud can hold its shape: far from the origin, float32 has few steps left."""

import numpy as np

from ..errors import InputError

FEW_STEPS = 32
"""A cloud that spans at most this many steps of its numbers has lost its shape."""
FAR_RADII = 64
"""From so many of its radii off the origin on, a cloud is centred in float64: float32 would round its shape."""
MAX_COORDINATE = 1e18
"""Largest coordinate: squared distances of larger ones overflow float32."""
MIN_EXTENT = 1 / MAX_COORDINATE
"""Smallest extent of a cloud: squared distances in smaller ones are nothing in float32."""


def is_single(points: np.ndarray) -> bool:
    """Tell whether every number is one of float32, as in files of that type and texts written from it.

    Example:
        >>> is_single(np.array([0.5, 2.0])), is_single(np.array([0.1]))
        (True, False)
    """
    with np.errstate(over="ignore"):
        return all((part.astype(np.float32) == part).all() for part in np.array_split(points, len(points) // 65536 + 1))


def has_lost_shape(low: np.ndarray, high: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Tell of which clouds the extent is nothing, or a few steps of their numbers at that distance from the origin.

    Args:
        low: (..., 3) smallest coordinates.
        high: (..., 3) largest.
        dtype: of the numbers as stored.

    Returns:
        (...) bool.

    Example:
        >>> bool(has_lost_shape(np.array([5e6, 0, 0]), np.array([5e6 + 2, 1, 1]), np.float32))
        True
    """
    extent = (high.astype(np.float64) - low.astype(np.float64)).max(axis=-1)
    offset = np.maximum(np.abs(low), np.abs(high)).max(axis=-1).astype(dtype)
    return extent <= FEW_STEPS * np.spacing(offset).astype(np.float64)


def to_single(points: np.ndarray) -> np.ndarray:
    """Turn clouds to float32, after moving those to the origin that are far from it, see `FAR_RADII`.

    Args:
        points: (..., N, 3) float64, finite.

    Example:
        >>> to_single(np.array([[5e6, 0, 0], [5e6 + 1, 0, 0]])).tolist()
        [[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0]]
    """
    low, high = points.min(axis=-2, keepdims=True), points.max(axis=-2, keepdims=True)
    extent = (high - low).max(axis=-1, keepdims=True) / 2
    far = np.maximum(np.abs(low), np.abs(high)).max(axis=-1, keepdims=True) > FAR_RADII * extent
    if far.any():
        points = np.where(far, points - points.mean(axis=-2, keepdims=True), points)
    with np.errstate(over="ignore"):
        return points.astype(np.float32)


def check_extent(points: np.ndarray, where: str) -> None:
    """Refuse a cloud whose points are equal, or so far from the origin that its numbers cannot tell them apart.

    Args:
        points: (N, 3) float64, finite, at least one.
        where: the file, for the message.

    Raises:
        InputError: as said, or a coordinate is larger than `MAX_COORDINATE`, or the extent below `MIN_EXTENT`.
    """
    low, high = (np.array([bound(points[:, axis]) for axis in range(3)]) for bound in (np.min, np.max))
    if max(high.max(), -low.min()) > MAX_COORDINATE:
        raise InputError(f"{where}: holds coordinates above {MAX_COORDINATE:g}; scale it down")
    extent = float((high - low).max())
    if extent == 0:
        raise InputError(f"{where}: all {len(points)} points are equal, a cloud without extent")
    if extent < MIN_EXTENT:
        raise InputError(f"{where}: spans {extent:.3g}, must be at least {MIN_EXTENT:g}; scale it up")
    if has_lost_shape(low, high, np.float32) and (is_single(points) or has_lost_shape(low, high, np.float64)):
        raise InputError(
            f"{where}: spans {extent:.3g} at a distance of {max(high.max(), -low.min()):.3g} from the origin, a few "
            "steps of the numbers it is stored in, so its shape is lost; move it to the origin before storing it"
        )
