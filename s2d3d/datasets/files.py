"""Files that people have: clouds and meshes in the usual formats, as the clouds that a model takes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, did_you_mean
from .h5 import check_up_axis
from .mesh import read_glb, read_obj, read_off, read_stl, sample_mesh
from .pcd import read_las, read_pcd
from .ply import read_ply
from .precision import check_extent, is_single
from .prefix import farthest_prefix
from .tables import read_array, read_text_table
from .transforms import normalize_unit_sphere, turn_up_axis

log = logging.getLogger(__name__)

_TEXTS = (".txt", ".xyz", ".csv", ".pts")
_CLOUDS: dict[str, Callable[[Path], np.ndarray]] = {
    ".pcd": read_pcd,
    ".npy": read_array,
    ".npz": read_array,
    ".las": read_las,
    **dict.fromkeys(_TEXTS, read_text_table),
}
_MESHES: dict[str, Callable[[Path], tuple[np.ndarray, np.ndarray | None]]] = {
    ".ply": read_ply,
    ".off": lambda path: read_off(path, faces_required=False),
    ".obj": read_obj,
    ".stl": read_stl,
    ".glb": read_glb,
}
SUFFIXES = (".ply", ".pcd", ".off", ".obj", ".stl", ".glb", ".las", ".npy", ".npz", *_TEXTS)
"""Of the files that `read_points` reads."""


def read_points(path: str | os.PathLike, num_points: int, *, seed: int = 0, allow_missing: bool = True) -> np.ndarray:
    """Read the points of a file; of a mesh as many as asked for, drawn evenly from its surface.

    `.npy` and `.npz` hold arrays, see `read_array`; `.txt`, `.xyz`, `.csv` and `.pts` rows of numbers, see
    `read_text_table`; `.pcd` and `.las` are clouds; `.ply`, `.off`, `.obj`, `.stl` and `.glb` are meshes, or clouds
    where they have no faces. Polygons become fans of triangles.

    Args:
        path: the file.
        num_points: points of a mesh, at least 1; a cloud keeps its own.
        seed: of the points drawn; the same seed gives the same points.
        allow_missing: leave out the points of a cloud that are NaN or infinite, as depth cameras write them where they
            see nothing, and log how many; False refuses them.

    Returns:
        (N, 3) float64, as in the file: neither turned nor normalised.

    Raises:
        InputError: no such file, an unknown kind, unreadable content, no point, no surface, no extent, or a number that
            is not finite and not allowed to be missing; a package is needed and missing.

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
        state = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {state}; name a file with points")
    with np.errstate(invalid="ignore", over="ignore"):  # numbers of any bits; they are checked below
        points, faces = (_CLOUDS[suffix](path), None) if suffix in _CLOUDS else _MESHES[suffix](path)
    if not len(points):
        raise InputError(f"{path}: holds no points, or is not a {suffix} file")
    if faces is not None and len(faces):
        used = points[np.unique(faces)]
        if np.isfinite(used).all():
            check_extent(used, str(path))
        return sample_mesh(points, faces, num_points, np.random.default_rng(seed), str(path))
    points = _finite_points(path, points, allow_missing)
    check_extent(points, str(path))
    return points


def read_cloud(
    path: str | os.PathLike,
    num_points: int,
    *,
    up_axis: str = "z",
    normalize: bool = True,
    seed: int = 0,
    least: int | None = None,
    allow_missing: bool = True,
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
        least: take a file with fewer points as it is, down to this number, and log it; default `num_points`.
        allow_missing: see `read_points`.

    Returns:
        (num_points, 3) float32; fewer where `least` allows it.

    Raises:
        InputError: as `read_points`; fewer points than allowed; another axis; not normalised and so far from the origin
            that float32 cannot hold the shape.
    """
    check_up_axis(up_axis)
    if num_points < 1:
        raise InputError(f"num_points is {num_points}, must be at least 1")
    points = read_points(path, num_points, seed=seed, allow_missing=allow_missing)
    least = num_points if least is None else min(least, num_points)
    if len(points) < least:
        takes = "that the model takes" if least == num_points else "that the model needs"
        raise InputError(f"{path}: {len(points)} points are fewer than the {least} {takes}")
    if len(points) < num_points:
        log.warning("%s: holds %d points, the model takes %d; all are used", path, len(points), num_points)
    if normalize and not is_single(points):
        points = points - points.mean(axis=0)
    elif not normalize:
        check_extent(points.astype(np.float32).astype(np.float64), f"{path}: not normalised")
    cloud = turn_up_axis(torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)), up_axis)[None]
    cloud = normalize_unit_sphere(cloud) if normalize else cloud
    chosen = farthest_prefix(cloud, num_points)[0].long() if len(points) > num_points else slice(None)
    return cloud[0][chosen].contiguous()


def _finite_points(path: Path, points: np.ndarray, allow_missing: bool) -> np.ndarray:
    """Leave out points that are not three finite numbers, or refuse them."""
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(points.sum(axis=0)).all():
            return points
    finite = np.isfinite(points).all(axis=1)
    missing = len(points) - int(np.count_nonzero(finite))
    if missing and not allow_missing:
        raise InputError(f"{path}: point {int(finite.argmin())} is not three finite numbers; remove it")
    if missing == len(points):
        raise InputError(f"{path}: none of its {missing} points is three finite numbers")
    if missing:
        log.warning("%s: %d of %d points are not finite and left out", path, missing, len(points))
    return points[finite]
