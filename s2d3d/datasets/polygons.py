"""Polygons cut into triangles: fans where those stay inside, ears elsewhere."""

import numpy as np

from ..errors import InputError

NEGLIGIBLE = 1e-3
"""Share of the surface in polygons that cross themselves, up to which they become fans all the same."""
MOST_CORNERS = 5000
"""Of a polygon that is cut ear by ear: the time grows with the square of its corners, or worse."""
FLAT = 0.05
"""Distance from its plane, relative to its size, up to which a polygon is flat. Others have no plane to cross in."""
ROUNDED = 1e-5
"""Size of a polygon, relative to its coordinates, below which its corners may be rounded."""
FOLDED = 1e-4
"""Share of the area of a polygon that a triangle of its fan may have on the wrong side."""


def cut_polygons(corners: np.ndarray, counts: np.ndarray, vertices: np.ndarray, where: str) -> np.ndarray:
    """Cut polygons into triangles that cover them once and nothing else; polygons need not be convex or quite flat.

    Args:
        corners: (C,) indices of vertices, polygon after polygon.
        counts: (F,) corners of each polygon.
        vertices: (V, 3).
        where: file, for the message.

    Returns:
        (T, 3) int64, in the order of the polygons.

    Raises:
        InputError: a polygon with fewer than three corners, or a flat one that crosses itself; an index out of range.

    Example:
        >>> square = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
        >>> cut_polygons(np.array([0, 1, 2, 3]), np.array([4]), square, "a.off").tolist()
        [[0, 1, 2], [0, 2, 3]]
    """
    if not len(counts):
        return np.empty((0, 3), np.int64)
    if counts.min() < 3:
        raise InputError(f"{where}: face {int(counts.argmin())} has {int(counts.min())} corners, must have 3 or more")
    wrong = ~((corners >= 0) & (corners < len(vertices)))
    indices = np.where(wrong, 0, corners).astype(np.int64)
    wrong = wrong.astype(bool) | (indices != corners)
    if wrong.any():
        face = int(np.searchsorted(np.cumsum(counts), int(wrong.argmax()), side="right"))
        raise InputError(f"{where}: a face names a vertex outside the {len(vertices)} of the file (face {face})")
    firsts, sizes = np.cumsum(counts) - counts, counts - 2
    if counts.max() == 3:
        return indices.reshape(-1, 3)
    triangles = _fans(indices, firsts, sizes)
    folded, area = _folded(triangles, sizes, vertices)
    turned = np.flatnonzero(folded)
    if len(turned):  # a quad that is not convex is a fan from its first or its second corner
        lengths = counts[turned]
        places, begins = spans(firsts[turned], lengths), np.repeat(firsts[turned], lengths)
        indices[places] = indices[begins + (places - begins + 1) % np.repeat(lengths, lengths)]
        again = np.repeat(folded, sizes)
        triangles[again] = _fans(indices, firsts[turned], sizes[turned])
        folded[turned], area[turned] = _folded(triangles[again], sizes[turned], vertices)
    crossing = []
    for face in np.flatnonzero(folded).tolist():
        begin = firsts[face] - 2 * face
        polygon = indices[firsts[face] : firsts[face] + counts[face]]
        ears = _cut_ears(vertices[polygon]) if counts[face] <= MOST_CORNERS else None
        if ears is not None:
            triangles[begin : begin + sizes[face]] = polygon[ears]
        elif _is_flat(vertices[polygon]):
            crossing.append(face)
    if area[crossing].sum() > NEGLIGIBLE * area.sum():
        worst = crossing[int(area[crossing].argmax())]
        raise InputError(f"{where}: face {worst} crosses itself, or cannot be cut into triangles; save triangles")
    return triangles


def _fans(indices: np.ndarray, firsts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    seconds = spans(firsts + 1, sizes)
    return np.stack([indices[np.repeat(firsts, sizes)], indices[seconds], indices[seconds + 1]], axis=1)


def _folded(triangles: np.ndarray, sizes: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell of each polygon whether a triangle of its fan is turned over, and return twice the area of the fan.

    A fan whose triangles all face as the polygon does covers each place as often as the polygon goes round it.
    """
    starts = np.cumsum(sizes) - sizes
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    area = np.add.reduceat(np.linalg.norm(normals, axis=1), starts)
    normal = np.add.reduceat(normals, starts)
    square = (normal**2).sum(axis=1)
    least = np.minimum.reduceat((normals * np.repeat(normal, sizes, axis=0)).sum(axis=1), starts)
    return (least < -FOLDED * square) | (square < (FOLDED * area) ** 2), area


def _is_flat(polygon: np.ndarray) -> bool:
    sides = polygon - polygon[0]
    size = np.abs(sides).max()
    normals = np.cross(sides[1:-1], sides[2:])
    lengths = np.linalg.norm(normals, axis=1)
    normal = normals[lengths.argmax()]
    return bool(size > ROUNDED * np.abs(polygon).max() and np.abs(sides @ normal).max() <= FLAT * size * lengths.max())


def _cut_ears(polygon: np.ndarray) -> list[list[int]] | None:
    """Cut a polygon (n, 3) into n - 2 triangles of its corners, ear by ear; None if it crosses itself.

    Source: Meisters 1975, "Polygons Have Ears". Corners at one place, as where a slit leads to a hole, may touch.
    """
    polygon = polygon - polygon[0]
    normals = np.cross(polygon[1:-1], polygon[2:])
    normal = normals.sum(axis=0)
    axis = int(np.abs(normal).argmax())
    if not abs(normal[axis]) > FOLDED * np.abs(normals).sum():
        return None
    flat = np.roll(polygon, 2 - axis, axis=1)[:, :2] * [1, np.sign(normal[axis])]  # counter-clockwise
    tiny = 1e-12 * abs(normal[axis])

    def twice_area(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        (ux, uy), (vx, vy) = (b - a).T, (c - a).T
        return ux * vy - uy * vx

    left, ears, at, tried = list(range(len(polygon))), [], 0, 0
    while len(left) > 3:
        ear = [left[at - 1], left[at], left[(at + 1) % len(left)]]
        a, b, c = flat[ear]
        area = twice_area(a, b, c)
        is_ear = area >= -tiny
        if area > tiny:
            others = flat[left]
            inside = np.minimum.reduce([twice_area(p, q, others) for p, q in ((a, b), (b, c), (c, a))]) >= 0
            is_ear = not (inside & (others != a).any(1) & (others != b).any(1) & (others != c).any(1)).any()
        if is_ear:
            ears.append(ear)
            del left[at]
        tried, at = 0 if is_ear else tried + 1, (at + (not is_ear)) % len(left)
        if tried > len(left):
            return None
    return [*ears, left] if twice_area(*flat[left]) >= -FOLDED * abs(normal[axis]) else None


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the places `starts[i]`, ..., `starts[i] + lengths[i] - 1`, one span after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
