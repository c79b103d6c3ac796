"""Triangle meshes in the OFF format, as ModelNet is distributed."""

import os
from pathlib import Path

import numpy as np
from numpy.random import Generator

from ..errors import InputError


def read_off(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read a mesh. Polygons become fans of triangles; colours and comments are passed over.

    Some files of ModelNet have the counts on the line of the keyword, `OFF490 518 0`: they are read too.

    Args:
        path: the file.

    Returns:
        (V, 3) float64 vertices, (F, 3) int64 triangles.

    Raises:
        InputError: it is not there, is no OFF file, is cut short, or has a face beyond its vertices.

    Example:
        >>> _ = Path("one.off").write_text("OFF3 1 0\\n0 0 0\\n1 0 0\\n0 1 0\\n3 0 1 2\\n")  # doctest: +SKIP
        >>> read_off("one.off")[1].tolist()  # doctest: +SKIP
        [[0, 1, 2]]
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="strict")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"{path}: not an OFF file ({reason})") from None
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    if not lines or not lines[0].startswith("OFF"):
        raise InputError(f"{path}: not an OFF file, its first word must be OFF")
    counts = lines[0][3:].split()
    first = 1 if counts else 2
    counts = counts or (lines[1].split() if len(lines) > 1 else [])
    try:
        num_vertices, num_faces = int(counts[0]), int(counts[1])
        if num_vertices < 3 or num_faces < 1:
            raise InputError(f"{path}: {num_vertices} vertices and {num_faces} faces are no mesh")
        if len(lines) < first + num_vertices + num_faces:
            raise InputError(
                f"{path}: is cut short: {len(lines) - first} lines follow, "
                f"{num_vertices} vertices and {num_faces} faces are announced"
            )
        split = first + num_vertices
        vertices = np.array([line.split()[:3] for line in lines[first:split]], dtype=np.float64)
        faces = _triangles([line.split() for line in lines[split : split + num_faces]])
    except (ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an OFF file ({error})") from None
    if vertices.shape != (num_vertices, 3) or not np.isfinite(vertices).all():
        raise InputError(f"{path}: a vertex is not three finite numbers")
    if faces.min() < 0 or faces.max() >= num_vertices:
        raise InputError(f"{path}: a face names a vertex outside the {num_vertices} of the file")
    return vertices, faces


def _triangles(rows: list[list[str]]) -> np.ndarray:
    """Cut faces, each its number of corners and their indices, into (F, 3) triangles."""
    if all(row[0] == "3" for row in rows):
        return np.array([row[1:4] for row in rows], dtype=np.int64)
    triangles = []
    for row in rows:
        corners = [int(index) for index in row[1 : int(row[0]) + 1]]
        if len(corners) != int(row[0]) or len(corners) < 3:
            raise ValueError(f"face '{' '.join(row)}'")
        triangles += [(corners[0], *corners[i : i + 2]) for i in range(1, len(corners) - 1)]
    return np.array(triangles, dtype=np.int64)


def sample_by_area(triangles: np.ndarray, count: int, rng: Generator) -> np.ndarray:
    """Draw (count, 3) points, uniform on the surface."""
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = rng.choice(len(triangles), size=count, p=area / area.sum())
    u, v = rng.random((2, count, 1))
    fold = u + v > 1
    u, v = np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]


def sample_mesh(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, rng: np.random.Generator, where: str
) -> np.ndarray:
    """Draw (num_points, 3) points evenly from the surface of a mesh.

    Args:
        vertices: (V, 3).
        faces: (F, 3) indices of vertices.
        num_points: at least 1.
        rng: where random numbers come from.
        where: file, for the message.

    Raises:
        InputError: all triangles have area 0.
    """
    corners = vertices[faces]
    if not np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).any():
        raise InputError(f"{where}: all triangles have area 0")
    return sample_by_area(corners, num_points, rng)
