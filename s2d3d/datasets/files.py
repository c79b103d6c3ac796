"""Files that people have: clouds and meshes in the usual formats, as the clouds that a model takes."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..channels import XYZ, columns, groups, missing
from ..errors import InputError, did_you_mean, first_line
from .arrays import read_array
from .attributes import UNNAMED, Extras, hold_normals, join_channels, unit_colors, unit_normals
from .h5 import check_up_axis
from .mesh import read_glb, read_obj, read_off, read_stl
from .normals import estimate_normals as estimated_normals
from .pcd import read_las, read_pcd
from .ply import read_ply
from .precision import check_extent, is_single
from .prefix import farthest_prefix
from .surface import sample_mesh
from .tables import read_text_table
from .transforms import coordinates, normalize_unit_sphere, replace_coordinates, turn_up_axis

log = logging.getLogger(__name__)

_TEXTS = (".txt", ".xyz", ".csv", ".pts")
_CLOUDS: dict[str, Callable[[Path, Extras | None], np.ndarray]] = {
    ".pcd": read_pcd,
    ".npy": read_array,
    ".npz": read_array,
    ".las": read_las,
    **dict.fromkeys(_TEXTS, read_text_table),
}
_MESHES: dict[str, Callable[..., tuple[np.ndarray, np.ndarray | None]]] = {
    ".ply": read_ply,
    ".off": lambda path, extras=None: read_off(path, faces_required=False, extras=extras),
    ".obj": read_obj,
    ".stl": lambda path, extras=None: read_stl(path),
    ".glb": lambda path, extras=None: read_glb(path),
}
_ADVICE = {
    ".asc": "; rename it to .xyz if each row is a point",
    ".laz": "; decompress it to .las",
    ".gltf": "; export it as one .glb",
}
"""What to do with files of some other kinds."""
SURFACE_POINTS = 2
"""Points drawn from a mesh for each one that is wanted; farthest point sampling makes the rest an even cloud."""
MOST_POINTS = 65536
"""A larger cloud is first thinned to this, evenly in the order of its points: farthest point sampling takes time in
proportion to its size."""
SUFFIXES = (".ply", ".pcd", ".off", ".obj", ".stl", ".glb", ".las", ".npy", ".npz", *_TEXTS)
"""Of the files that `read_points` reads."""


_SAID: ContextVar[list[str] | None] = ContextVar("said", default=None)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what readers of files warn of inside, instead of logging it."""
    said: list[str] = []
    token = _SAID.set(said)
    try:
        yield said
    finally:
        _SAID.reset(token)


def read_points(
    path: str | os.PathLike,
    num_points: int,
    *,
    seed: int = 0,
    allow_missing: bool = True,
    channels: str = XYZ,
    estimate_normals: bool = False,
) -> np.ndarray:
    """Read the points of a file; of a mesh as many as asked for, drawn evenly from its surface.

    `.npy` and `.npz` hold arrays, see `read_array`; `.txt`, `.xyz`, `.csv` and `.pts` rows of numbers, see
    `read_text_table`; `.pcd` and `.las` are clouds; `.ply`, `.off`, `.obj`, `.stl` and `.glb` are meshes, or clouds
    where they have no faces. Polygons are cut into triangles.

    Vertices that are corners of no face are passed over, unless they are more than half.

    Normals of a mesh are those of its faces. Normals and colours of a cloud, and colours of a mesh, are those of the
    file, see `attributes`; .stl and .glb have no colours here.

    Args:
        path: the file.
        num_points: points of a mesh, at least 1; a cloud keeps its own.
        seed: of the points drawn; the same seed gives the same points.
        allow_missing: leave out the points of a cloud that are NaN or infinite, as depth cameras write them where they
            see nothing, and log how many; False refuses them.
        channels: of a point, one of `s2d3d.channels.CHANNELS`.
        estimate_normals: estimate the normals of a cloud that has none, where the channels have them.

    Returns:
        (N, C) float64, coordinates as in the file: neither turned nor normalised. Normals are unit vectors, colours lie
        in [0, 1].

    Raises:
        InputError: no such file, an unknown kind, unreadable content, no point, no surface, most vertices without a
            face, no extent, or a number that is not finite and not allowed to be missing; a channel is not in the file;
            a package is needed and missing.

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
        near = did_you_mean(suffix, SUFFIXES, likeness=0.8) if suffix else ""  # .stp is no misspelt .stl
        raise InputError(f"{path}: unknown kind of file{_ADVICE.get(suffix, near)} (known: {', '.join(SUFFIXES)})")
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {state}; name a file with points")
    extras: Extras | None = None if channels == XYZ else {}
    points, faces = _read(path, suffix, extras)
    if not len(points):
        raise InputError(f"{path}: holds no points, or is not a {suffix} file")
    if faces is not None and len(faces):
        used = points[np.unique(faces)]
        if 2 * len(used) < len(points):
            raise InputError(
                f"{path}: {len(points) - len(used)} of its {len(points)} vertices are corners of no face, and points "
                "are drawn from faces alone; remove these vertices, or the faces if it is a cloud"
            )
        if np.isfinite(used).all():
            check_extent(used, str(path))
        colors = _vertex_colors(path, extras, channels)
        rng = np.random.default_rng(seed)
        return sample_mesh(points, faces, num_points, rng, str(path), channels=channels, colors=colors)
    if extras is None:
        points = _finite_points(path, points, allow_missing)
        check_extent(points, str(path))
        return points
    return _with_channels(path, points, extras, channels, allow_missing, estimate_normals)


def _read(path: Path, suffix: str, extras: Extras | None) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # numbers of any bits; they are checked later
            return (_CLOUDS[suffix](path, extras), None) if suffix in _CLOUDS else _MESHES[suffix](path, extras)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # one file of strangers does not end the reading of the others
        text = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: is damaged, or no {suffix} file ({text}); save the points again") from error


def read_cloud(
    path: str | os.PathLike,
    num_points: int,
    *,
    up_axis: str = "z",
    normalize: bool = True,
    seed: int = 0,
    least: int | None = None,
    allow_missing: bool = True,
    channels: str = XYZ,
    estimate_normals: bool = False,
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
        channels: that the model takes.
        estimate_normals: see `read_points`.

    Returns:
        (num_points, C) float32; fewer where `least` allows it.

    Raises:
        InputError: as `read_points`; fewer points than allowed; another axis; not normalised and so far from the origin
            that float32 cannot hold the shape.
    """
    check_up_axis(up_axis)
    if num_points < 1:
        raise InputError(f"num_points is {num_points}, must be at least 1")
    points = read_points(
        path, SURFACE_POINTS * num_points, seed=seed, allow_missing=allow_missing, channels=channels,
        estimate_normals=estimate_normals,
    )  # fmt: skip
    least = num_points if least is None else min(least, num_points)
    if len(points) < least:
        takes = "that the model takes" if least == num_points else "that the model needs"
        raise InputError(f"{path}: {len(points)} points are fewer than the {least} {takes}")
    if len(points) < num_points:
        log.warning("%s: holds %d points, the model takes %d; all are used", path, len(points), num_points)
    cloud = as_cloud(points, str(path), normalize=normalize, up_axis=up_axis, channels=channels)
    return spread_points(cloud, num_points, num_points)[0] if len(points) > num_points else cloud[0]


def spread_points(cloud: Tensor, count: int, num_points: int) -> Tensor:
    """Take points that cover a cloud evenly, in the order of farthest point sampling.

    Args:
        cloud: (1, N, C).
        count: how many, at most N; fewer are the first of these.
        num_points: of a sample, at most `count`.

    Returns:
        (1, count, C).
    """
    size, most = cloud.shape[1], max(MOST_POINTS, SURFACE_POINTS * num_points)
    if size > most:
        cloud = cloud[:, torch.arange(most) * size // most]
    return cloud[:, farthest_prefix(coordinates(cloud), count)[0].long()].contiguous()


def as_cloud(points: np.ndarray, where: str, *, normalize: bool, up_axis: str, channels: str) -> Tensor:
    """Turn the points of a file z up, and centre and scale them into the unit sphere, as a batch of one.

    Args:
        points: (N, C) float64.
        where: the file, for the message.
        normalize: whether to centre and scale; normals and colours stay.
        up_axis: vertical axis of the points, "y" or "z".
        channels: of a point.

    Returns:
        (1, N, C) float32.

    Raises:
        InputError: not normalised and so far from the origin that float32 cannot hold the shape.
    """
    xyz = points[:, :3]
    if normalize and not is_single(xyz):
        xyz = xyz - xyz.mean(axis=0)
    elif not normalize:
        check_extent(xyz.astype(np.float32).astype(np.float64), f"{where}: not normalised")
    stored = xyz if channels == XYZ else np.concatenate([xyz, points[:, 3:]], axis=1)
    cloud = torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32))
    cloud = turn_up_axis(cloud, up_axis, channels=channels)[None]
    return replace_coordinates(cloud, normalize_unit_sphere(coordinates(cloud))) if normalize else cloud


def _vertex_colors(path: Path, extras: Extras | None, channels: str) -> np.ndarray | None:
    """Return the colours of the vertices of a mesh, (V, 3) in [0, 1], where the channels have colours."""
    if columns(channels, "rgb") is None:
        return None
    if extras is None or "rgb" not in extras:
        raise missing(path, "rgb", channels, stored="none of its vertices")
    return unit_colors(extras["rgb"], str(path))


def _with_channels(
    path: Path, points: np.ndarray, extras: Extras, channels: str, allow_missing: bool, estimate_normals: bool
) -> np.ndarray:
    """Put normals and colours behind the points of a cloud, and leave out rows that are not finite."""
    has_normals = "normal" in extras or hold_normals(extras.get(UNNAMED), channels)
    estimated = estimate_normals and "normal" in groups(channels) and not has_normals
    if estimated:
        extras = {group: extras[group] for group in extras if group != UNNAMED} | {"normal": np.zeros_like(points)}
    rows = _finite_points(path, join_channels(points, extras, channels, str(path)), allow_missing)
    check_extent(rows[:, :3], str(path))
    if (place := columns(channels, "normal")) is not None:
        rows[:, place] = estimated_normals(rows[:, :3]) if estimated else unit_normals(rows[:, place], str(path))
    return rows


def _finite_points(path: Path, points: np.ndarray, allow_missing: bool) -> np.ndarray:
    """Leave out points whose numbers, three or with channels more, are not all finite, or refuse them."""
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
        text = f"{path}: {missing} of {len(points)} points are not finite and left out"
        if (said := _SAID.get()) is None:
            log.warning("%s", text)
        else:
            said.append(text)
    return points[finite]
