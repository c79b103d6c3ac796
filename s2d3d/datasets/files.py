"""Files that people have: clouds and meshes in the usual formats, as the clouds that a model takes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, did_you_mean, first_line
from .h5 import check_up_axis
from .mesh import read_off, sample_mesh
from .prefix import farthest_prefix
from .transforms import normalize_unit_sphere, turn_up_axis

TABLES = (".npy", ".txt", ".xyz")
SUFFIXES = (".ply", ".pcd", ".off", ".obj", *TABLES)
"""Of the files that `read_points` reads."""


def read_points(path: str | os.PathLike, num_points: int, *, seed: int = 0) -> np.ndarray:
    """Read the points of a file; of a mesh as many as asked for, drawn evenly from its surface.

    `.npy` is an array (N, 3 or more); `.txt` and `.xyz` are rows of numbers, separated by blanks or commas, of which
    the first three count; `.off` and `.obj` are meshes; `.ply` and `.pcd` are what they hold, and are read by
    Open3D. Polygons become fans of triangles.

    Args:
        path: the file.
        num_points: points of a mesh, at least 1; a cloud keeps its own.
        seed: of the points drawn; the same seed gives the same points.

    Returns:
        (N, 3) float64, as in the file: neither turned nor normalised.

    Raises:
        InputError: no such file, an unknown kind, unreadable content, no point, no surface, or a number that is not
            finite; Open3D is needed and missing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "cloud.xyz")
        >>> _ = path.write_text("0 0 0\\n1 2 3\\n")
        >>> read_points(path, 1024).tolist()
        [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        near = did_you_mean(suffix, SUFFIXES) if suffix else ""
        raise InputError(f"{path}: unknown kind of file{near} (known: {', '.join(SUFFIXES)})")
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; name a file with points")
    if suffix in TABLES:
        points, faces = _read_table(path), None
    elif suffix == ".off":
        points, faces = read_off(path)
    elif suffix == ".obj":
        points, faces = _read_obj(path)
    else:
        points, faces = _read_with_open3d(path)
    if not len(points):
        raise InputError(f"{path}: holds no points, or is not a {suffix} file")
    if not np.isfinite(points).all():
        row = int(np.argmin(np.isfinite(points).all(1)))
        raise InputError(f"{path}: point {row} is not three finite numbers; remove it")
    return points if faces is None else sample_mesh(points, faces, num_points, np.random.default_rng(seed), str(path))


def read_cloud(
    path: str | os.PathLike, num_points: int, *, up_axis: str = "z", normalize: bool = True, seed: int = 0
) -> Tensor:
    """Read a file as the cloud that a model sees in its evaluation.

    Turned z up, centred and scaled into the unit sphere, and, if it has more points than asked for, thinned by farthest
    point sampling: as the readers of data sets do.

    Args:
        path: see `read_points`.
        num_points: of the cloud.
        up_axis: vertical axis of the file, "y" or "z".
        normalize: as the model was trained, `data.normalize`.
        seed: of the points drawn from a mesh.

    Returns:
        (num_points, 3) float32.

    Raises:
        InputError: as `read_points`; fewer points than `num_points`; another axis.
    """
    check_up_axis(up_axis)
    if num_points < 1:
        raise InputError(f"num_points is {num_points}, must be at least 1")
    stored = torch.from_numpy(read_points(path, num_points, seed=seed)).float()
    if len(stored) < num_points:
        raise InputError(f"{path}: {len(stored)} points are fewer than the {num_points} that the model takes")
    cloud = turn_up_axis(stored, up_axis)[None]
    cloud = normalize_unit_sphere(cloud) if normalize else cloud
    chosen = farthest_prefix(cloud, num_points)[0].long() if len(stored) > num_points else slice(None)
    return cloud[0][chosen].contiguous()


def _read_table(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            table = np.load(path, allow_pickle=False).astype(np.float64)
        else:
            lines = path.read_text(encoding="utf-8").replace(",", " ").splitlines()
            rows = [line.split()[:3] for line in (line.partition("#")[0] for line in lines) if line.strip()]
            table = np.array(rows, dtype=np.float64) if rows else np.empty((0, 3))
    except (ValueError, TypeError, OSError, EOFError) as error:  # TypeError: fields with names
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: cannot be read as a table of points ({reason})") from error
    if table.ndim != 2 or table.shape[1] < 3:
        raise InputError(f"{path}: holds numbers of shape {table.shape}, must be (N, 3) or more columns")
    return table[:, :3]


def _read_obj(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read vertices and faces of a Wavefront file; Open3D passes over meshes whose faces are not triangles."""
    vertices, faces = [], []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            word, *rest = line.partition("#")[0].split() or [""]
            if word == "v":
                vertices.append([float(value) for value in rest[:3]])
            elif word == "f":  # corners such as 3, 3/1/2 or -1, which counts from the last vertex so far
                numbers = [int(corner.partition("/")[0]) for corner in rest]
                corners = [number - 1 if number > 0 else len(vertices) + number for number in numbers]
                faces += [(corners[0], *corners[i : i + 2]) for i in range(1, len(corners) - 1)]
        points = np.array(vertices, dtype=np.float64).reshape(len(vertices), 3)
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: not an OBJ file ({error})") from error
    indices = np.array(faces, dtype=np.int64).reshape(len(faces), 3)
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(points):
        raise InputError(f"{path}: a face names a vertex outside the {len(points)} of the file")
    return points, indices if len(indices) else None


def _read_with_open3d(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        import open3d
    except (ImportError, OSError) as error:  # OSError: a system library of it is missing
        raise InputError(
            f"{path}: is read by Open3D, which cannot be imported ({first_line(error)}): pip install open3d"
        ) from error
    with _silent_stderr(), open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
        if path.suffix.lower() == ".ply":
            mesh = open3d.io.read_triangle_mesh(path)
            if len(mesh.triangles):
                return np.asarray(mesh.vertices), np.asarray(mesh.triangles, dtype=np.int64)
        return np.asarray(open3d.io.read_point_cloud(path).points), None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep quiet what libraries below Open3D write past Python: the caller words the error."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
