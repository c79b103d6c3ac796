"""Points drawn from the surface of a mesh."""

import numpy as np
from numpy.random import Generator

from ..channels import XYZ, groups
from ..errors import InputError
from .attributes import unit_normals


def sample_by_area(triangles: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """Draw (count, 3) points, uniform on the surface."""
    return _between(triangles, *_draw_places(triangles, count, rng))


def _draw_places(triangles: np.ndarray, count: int, rng: Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw places on triangles (F, 3, 3), uniform on the surface: which of them, and how far along its two sides."""
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = rng.choice(len(triangles), size=count, p=area / area.sum())
    u, v = rng.random((2, count, 1))
    fold = u + v > 1
    return chosen, np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)


def _between(corners: np.ndarray, chosen: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the values (n, k) at places of triangles whose corners have values (F, 3, k)."""
    a, b, c = corners.transpose(1, 0, 2)
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]


def sample_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    num_points: int,
    rng: np.random.Generator,
    where: str,
    *,
    channels: str = XYZ,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """Draw (num_points, C) points evenly from the surface of a mesh; the points do not depend on the channels.

    The normal of a point is that of its triangle, whose corners go round it counter-clockwise. Its colour lies between
    those of the corners.

    Args:
        vertices: (V, 3).
        faces: (F, 3) indices of vertices.
        num_points: at least 1.
        rng: where random numbers come from.
        where: file, for the message.
        channels: of a point.
        colors: (V, 3) of the vertices, in [0, 1], where the channels have colours.

    Raises:
        InputError: a corner is not finite, or all triangles have area 0.
    """
    corners = vertices[faces]
    if not np.isfinite(corners).all():
        vertex = int(faces.ravel()[np.isfinite(corners).all(axis=2).ravel().argmin()])
        raise InputError(f"{where}: vertex {vertex} of a face is not three finite numbers; correct it")
    if not np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).any():
        raise InputError(f"{where}: all triangles have area 0")
    places = _draw_places(corners, num_points, rng)
    parts = [_between(corners, *places)]
    for group in groups(channels)[1:]:
        if group == "normal":
            a, b, c = corners[places[0]].transpose(1, 0, 2)
            parts.append(unit_normals(np.cross(b - a, c - a), where))
        else:
            assert colors is not None, "colours are read before"
            parts.append(_between(colors[faces], *places).clip(0, 1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
