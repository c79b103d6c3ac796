"""Normals and colours as files store them, in the form that a cloud has: unit vectors, and shares in [0, 1]."""

from collections.abc import Sequence

import numpy as np

from ..channels import WIDTH, groups, missing, num_channels
from ..errors import InputError

Extras = dict[str, np.ndarray]
"""What a reader found beside the coordinates of its N points: by "normal" and "rgb" numbers (N, 3) as stored, by
`UNNAMED` columns (N, k) whose meaning the file does not tell."""
UNNAMED = "unnamed"
NAMES = {
    "normal": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"), ("normalx", "normaly", "normalz")),
    "rgb": (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")),
}
"""Names of columns, in small letters, under which files hold normals and colours."""

UNIT_TOLERANCE = 0.02
"""Deviation from length 1 up to which a vector counts as a unit normal: two decimals, or float16, round as much."""


def unit_normals(normals: np.ndarray, where: str) -> np.ndarray:
    """Bring normals to unit length; those of length zero, which are unknown, stay zero.

    Args:
        normals: (..., 3) numbers.
        where: file and name of the normals, for the message.

    Returns:
        (..., 3) float32 for float16 and float32, else float64.

    Raises:
        InputError: a number is not finite.

    Example:
        >>> unit_normals(np.array([[0.0, 3, 4], [0, 0, 0]]), "a.ply").tolist()
        [[0.0, 0.6, 0.8], [0.0, 0.0, 0.0]]
    """
    values = normals.astype(np.float32 if normals.dtype in (np.float16, np.float32) else np.float64, copy=False)
    if not np.isfinite(values).all():
        bad = ~np.isfinite(values).all(axis=-1)
        place = ", ".join(map(str, np.unravel_index(int(bad.argmax()), bad.shape)))
        raise InputError(f"{where}: normal {place} is not three finite numbers; correct it")
    tiny = float(np.finfo(np.float32 if values.dtype == np.float32 else np.float64).tiny)
    with np.errstate(over="ignore"):
        values = values / np.maximum(np.abs(values).max(axis=-1, keepdims=True), tiny)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), tiny)


def as_announced(values: np.ndarray, kind: np.dtype | type, where: str, *, points: np.ndarray) -> np.ndarray:
    """Return numbers (N, ...) read from text in the type that the file announces.

    Args:
        values: of each point.
        kind: as announced.
        where: the file, for the message.
        points: (N, 3); those that are not finite are left out later, and their values do not matter.

    Raises:
        InputError: it is a type of whole numbers, and a value is not one of them.

    Example:
        >>> as_announced(np.array([1.0, 255.0]), np.uint8, "a.ply", points=np.zeros((2, 3)))
        array([  1, 255], dtype=uint8)
    """
    with np.errstate(invalid="ignore", over="ignore"):
        found = values.astype(kind)
    wrong = (found != values) & np.isfinite(points).all(axis=1).reshape(-1, *[1] * (values.ndim - 1))
    if found.dtype.kind in "iu" and wrong.any():
        shown = f"{values[wrong][0]:g}, its header announces {found.dtype}"
        raise InputError(f"{where}: holds {shown}; correct the type in the header")
    return found


def named_columns(names: Sequence[str]) -> dict[str, list[int]]:
    """Return which columns are normals and colours, by their names in small letters.

    Example:
        >>> named_columns(["x", "y", "z", "red", "green", "blue"])
        {'rgb': [3, 4, 5]}
    """
    found = {}
    for group, triples in NAMES.items():
        for triple in triples:
            if all(names.count(name) == 1 for name in triple):
                found[group] = [names.index(name) for name in triple]
                break
    return found


def join_channels(points: np.ndarray, extras: Extras, channels: str, where: str) -> np.ndarray:
    """Put the normals and colours of a file behind its points.

    Columns without names are taken in the order of `channels` where there are exactly as many of them as it needs, and
    the normals have unit length and the colours lie in their range: `channels` states what they are.

    Args:
        points: (N, 3).
        extras: of the file.
        channels: one of `s2d3d.channels.CHANNELS`.
        where: the file, for the message.

    Returns:
        (N, C) float64; normals as stored, colours in [0, 1].

    Raises:
        InputError: a group is not there, or its numbers cannot be such.
    """
    extras, wanted = dict(extras), groups(channels)[1:]
    unnamed = extras.pop(UNNAMED, None)
    if unnamed is not None and unnamed.shape[1] == num_channels(channels) - WIDTH and not extras:
        for number, group in enumerate(wanted):
            extras[group] = unnamed[:, WIDTH * number : WIDTH * (number + 1)]
        if "normal" in wanted and not hold_normals(unnamed, channels):
            raise InputError(
                f"{where}: its columns 4 to 6 have no names and are no unit normals, which data.channels={channels} "
                "needs; name the columns in a header, such as: x y z nx ny nz"
            )
    parts = [points]
    for group in wanted:
        if group not in extras:
            unclear = f"{unnamed.shape[1]} columns without names" if unnamed is not None and unnamed.shape[1] else ""
            advice = "estimate them by data.estimate_normals=true or --estimate-normals" if group == "normal" else ""
            raise missing(where, group, channels, stored=unclear, advice=advice)
        values = extras[group]
        parts.append(unit_colors(values, where) if group == "rgb" else values)
    return np.concatenate([part.astype(np.float64, copy=False) for part in parts], axis=1)


def hold_normals(unnamed: np.ndarray | None, channels: str) -> bool:
    """Tell whether columns without names begin with normals: as many as the channels need, and of unit length."""
    if unnamed is None or unnamed.shape[1] != num_channels(channels) - WIDTH:
        return False
    return are_unit(unnamed[np.isfinite(unnamed).all(axis=1), :WIDTH])


def are_unit(normals: np.ndarray) -> bool:
    """Tell whether vectors (n, 3) are normals: finite and of unit length, or zero, and not all zero.

    Example:
        >>> are_unit(np.array([[0.6, 0.8, 0]])), are_unit(np.array([[0.1, 0.5, 0.4]]))
        (True, False)
    """
    if not np.isfinite(normals).all():
        return False
    length = np.linalg.norm(normals.astype(np.float64, copy=False), axis=1)
    return bool((np.abs(length - 1) <= UNIT_TOLERANCE)[length > 0].all() and length.any())


def unit_colors(colors: np.ndarray, where: str, *, by_type: bool = False) -> np.ndarray:
    """Bring colours to [0, 1]: by their type, and by their largest number where the type does not tell.

    - 8-bit whole numbers are divided by 255.
    - Other whole numbers are divided by 255 if none exceeds it, else by 65535.
    - Other numbers stay if none exceeds 1, else they are divided by 255.

    Args:
        colors: (..., 3) numbers, all of one file.
        where: file and name of the colours, for the message.
        by_type: the type alone tells: 16-bit numbers are divided by 65535, and floats lie in [0, 1].

    Returns:
        (..., 3) float32.

    Raises:
        InputError: a number is below 0, too large or not finite.

    Example:
        >>> unit_colors(np.array([[0, 51, 255]]), "a.ply").round(3).tolist()
        [[0.0, 0.20000000298023224, 1.0]]
    """
    whole = colors.dtype.kind in "iu"
    low, high = (float(colors.min()), float(colors.max())) if colors.size else (0.0, 0.0)
    if colors.dtype.itemsize == 1 and whole:
        most = 255
    elif whole:
        most = 255 if high <= 255 and not by_type else 65535
    else:
        most = 1 if by_type or high <= 1 else 255
    if not (low >= 0 and high <= most):  # false for NaN too
        found = "a number that is not finite" if np.isnan(low + high) else f"{low if low < 0 else high:g}"
        bounds = f"in [0, {most}]" if whole or by_type else "in [0, 1], or all in [0, 255]"
        raise InputError(f"{where}: colours hold {found}, must be {bounds}; correct them")
    return (colors / np.float32(most)).astype(np.float32)
