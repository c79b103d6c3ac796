"""Simulated scans of a whole data set, written in ScanObjectNN's layout: single views with plane, clutter and noise.

A view is a function of the seed, the split, the shape's name and the number of the view, given the shapes of its split:
neither the order of the shapes nor the number of processes matters. Clutter comes from the same split.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..atomic import real_path
from ..datasets.h5 import check_up_axis, write_h5
from ..datasets.h5_checks import check_shapes
from ..datasets.links import check_inside
from ..datasets.mesh import read_off
from ..datasets.modelnet40 import SPLITS, list_files, read_class_names, read_split, stored_up_axis
from ..datasets.precision import check_extent
from ..datasets.scanobjectnn import OBJECT_ONLY, relative_path
from ..datasets.stream import shape_names
from ..datasets.surface import sample_mesh
from ..datasets.transforms import turn_up_axis
from ..errors import InputError, did_you_mean
from ..optional import import_open3d
from ..random_state import derived_rng
from ..version import __version__
from ..workers import worker_pool
from . import DEFAULT_POINTS
from .folder import MARK, check_output, new_folder
from .left_out import check_left_out
from .perturbations import PERTURBATIONS
from .scan_view import View, simulate_view, unit_sphere, upsample

log = logging.getLogger(__name__)

MIN_POINTS = 64
MAX_CLUTTER = 3
DENSER = 2
"""Points of a whole surface for each point of a scan, where their number is ours: meshes and upsampled clouds."""


@dataclass(frozen=True)
class ShapeSet:
    """The shapes of one split: stored points, or paths of meshes that are sampled on demand.

    Attributes:
        split: "train" or "test".
        names: n names, no two alike.
        labels: (n,) int64.
        points: (n, P, 3) z up, or None.
        paths: n files, or None.
    """

    split: str
    names: Sequence[str]
    labels: np.ndarray
    points: np.ndarray | None = None
    paths: Sequence[Path] | None = None
    up_axis: str = "z"

    @cached_property
    def ranks(self) -> tuple[list[int], dict[int, int]]:
        """Indices in the order of the names, and the place of each index in it."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        return order, {index: rank for rank, index in enumerate(order)}


@dataclass(frozen=True)
class ScanOptions:
    """How to scan; see `write_scans`."""

    num_points: int
    variant: str = "PB_T50_RS"
    views: int = 1
    seed: int = 0
    upsample: bool = False


def write_scans(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    variant: str = "PB_T50_RS",
    num_points: int | None = None,
    views: int = 1,
    seed: int = 0,
    upsample: bool = False,
    workers: int | None = None,
    up_axis: str | None = None,
    allow_links: bool = False,
    skip_others: bool = False,
    force: bool = False,
) -> dict[str, int]:
    """Scan every shape of a data set and write what `load_scanobjectnn` reads, with the classes of the source.

    Args:
        source: a folder in ModelNet layout, or of OFF meshes `class/train/*.off`, `class/test/*.off`.
        output: folder to make; it appears whole or not at all.
        variant: whose boxes to imitate; any except OBJ_ONLY.
        num_points: points of a scan, object, plane and clutter together; default those stored, 2048 at most.
        views: scans of each shape.
        seed: of everything.
        upsample: interpolate stored points, so that a scan may have more than are stored.
        workers: processes; default 4, or the number of cores if that is smaller. The result does not depend on it.
        up_axis: vertical of the stored points; default as `stored_up_axis` says, z for meshes.
        allow_links: follow links that lead out of the source.
        skip_others: leave out files that have no place in the layout, see `check_left_out`.
        force: replace a data set that is there.

    Returns:
        Number of scans of each split.

    Raises:
        InputError: `source` or an argument is wrong; more points are asked for than are stored, without
            `upsample`; Open3D is missing; `output` exists.

    Example:
        >>> write_scans("data/modelnet40", "data/scan_modelnet40")  # doctest: +SKIP
        {'train': 9843, 'test': 2468}
    """
    source, output = Path(source), Path(output)
    if variant not in PERTURBATIONS:
        hint = (
            "; a simulated scan always has background"
            if variant == OBJECT_ONLY
            else did_you_mean(variant, PERTURBATIONS)
        )
        raise InputError(f"cannot imitate variant '{variant}'{hint} (known: {', '.join(PERTURBATIONS)})")
    for name, value, least in (("views", views, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, must be at least {least}")
    if up_axis is not None:
        check_up_axis(up_axis)
    if not source.is_dir():
        raise InputError(
            f"{source}: no such folder; --from names a data set in ModelNet layout or a folder of OFF meshes"
        )
    check_output(output, force, source)
    import_open3d("scanning")  # missing: say so before anything is read
    read = partial(read_shapes, allow_links=True) if allow_links else read_shapes
    class_names, shape_sets = read(source, up_axis)
    summary = check_left_out(source, _files(source, shape_sets, allow_links), skip_others=skip_others)
    options = ScanOptions(_points_of_scan(source, shape_sets, num_points, upsample), variant, views, seed, upsample)
    attributes: dict[str, str | int | bool] = {
        "simulated": True,
        "generator": f"s2d3d {__version__}",
        "source": real_path(source).name,
        "variant": variant,
        "seed": seed,
        "upsampled": upsample,
    }
    with new_folder(output, source=source, force=force) as folder:
        (folder / MARK).write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
        for shapes in shape_sets:
            points, mask = scan_shapes(shapes, options, workers=workers)
            path = folder / relative_path(shapes.split, variant, background=True)
            path.parent.mkdir(exist_ok=True)
            write_h5(
                path,
                turn_up_axis(torch.from_numpy(points), "z", "y").numpy(),  # as the public files
                np.repeat(shapes.labels, views),
                names=[name if views == 1 else f"{name}_view{view}" for name in shapes.names for view in range(views)],
                mask=mask,
                up_axis="y",
                attributes=attributes,
            )
    log.info("%s", summary)
    return {shapes.split: len(shapes.names) * views for shapes in shape_sets}


def read_shapes(
    source: Path, up_axis: str | None = None, *, allow_links: bool = False
) -> tuple[list[str], list[ShapeSet]]:
    """Read the shapes of both splits: points from a folder in ModelNet layout, else the paths of OFF meshes.

    Returns:
        Class names, the training set, the test set.

    Raises:
        InputError: the folder is neither, a file is wrong, or a name occurs twice in a split.
    """
    if (source / MARK).is_file():
        class_names = read_class_names(source, allow_links=allow_links)
        shape_sets = [_read_points(source, split, up_axis, allow_links) for split in SPLITS]
    else:
        class_names = sorted({path.parent.parent.name for path in source.glob("*/train/*.off")})
        if not class_names:
            raise InputError(f"{source}: neither ModelNet layout ({MARK}) nor OFF meshes (class/train/*.off)")
        shape_sets = [_find_meshes(source, class_names, split, up_axis or "z", allow_links) for split in SPLITS]
    for shapes in shape_sets:
        if len(shapes.names) < 2:
            raise InputError(
                f"{source}: {len(shapes.names)} shapes in split '{shapes.split}', two are needed for clutter"
            )
        seen: set[str] = set()
        for name in shapes.names:
            if name in seen:
                raise InputError(
                    f"{source}: split '{shapes.split}' has two shapes named '{name}'; a scan depends on the name"
                )
            seen.add(name)
    return class_names, shape_sets


def scan_shapes(shapes: ShapeSet, options: ScanOptions, *, workers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scan every shape of a split `options.views` times.

    Args:
        shapes: the split.
        options: how.
        workers: processes; default 4, or the number of cores if that is smaller; 1 scans in this one.

    Returns:
        (n * views, N, 3) float32, z up, unit sphere; (n * views, N) int8, OBJECT or BACKGROUND. The views of a shape
        follow each other.

    Raises:
        InputError: see `simulate_view` and `read_off`; the message names the shape.
    """
    total = len(shapes.names) * options.views
    points = np.empty((total, options.num_points, 3), dtype=np.float32)
    mask = np.empty((total, options.num_points), dtype=np.int8)
    workers = min(workers or min(4, os.cpu_count() or 1), len(shapes.names))
    with tqdm(total=total, desc=f"scan {shapes.split}", unit="view", disable=None) as bar:
        for index, views in enumerate(_all_views(shapes, options, workers)):
            for row, view in enumerate(views, index * options.views):
                points[row], mask[row] = view.points, view.mask
            bar.update(options.views)
    return points, mask


def scan_shape(shapes: ShapeSet, index: int, options: ScanOptions) -> list[View]:
    """Scan one shape `options.views` times.

    Raises:
        InputError: see `scan_shapes`.
    """
    name = shapes.names[index]
    order, rank_of = shapes.ranks
    cloud = _cloud(shapes, index, options)
    views = []
    for number in range(options.views):
        rng = derived_rng(options.seed, "view", shapes.split, name, number)
        count = min(int(rng.integers(1, MAX_CLUTTER + 1)), len(order) - 1)
        drawn = rng.choice(len(order) - 1, count, replace=False)
        others = drawn + (drawn >= rank_of[index])  # all but the shape itself
        clutter = [_cloud(shapes, order[rank], options) for rank in others]
        try:
            views.append(simulate_view(cloud, clutter, rng, num_points=options.num_points, variant=options.variant))
        except InputError as error:
            raise InputError(f"shape '{name}' of split '{shapes.split}': {error}") from error
    return views


def _cloud(shapes: ShapeSet, index: int, options: ScanOptions) -> np.ndarray:
    """Return the points of a whole surface, (P, 3) float64, z up, unit sphere: the same in whichever view it occurs."""
    rng = derived_rng(options.seed, "surface", shapes.split, shapes.names[index])
    if shapes.paths is None:
        assert shapes.points is not None
        points = unit_sphere(shapes.points[index])
        if options.upsample:
            points = upsample(points, max(len(points), DENSER * options.num_points), rng)
        return points
    vertices, faces = read_off(shapes.paths[index])
    check_extent(vertices[np.unique(faces)], str(shapes.paths[index]))
    turned = turn_up_axis(torch.from_numpy(vertices), shapes.up_axis).numpy()
    return unit_sphere(sample_mesh(turned, faces, DENSER * options.num_points, rng, str(shapes.paths[index])))


def _points_of_scan(source: Path, shape_sets: list[ShapeSet], num_points: int | None, upsample: bool) -> int:
    if num_points is not None and num_points < MIN_POINTS:
        raise InputError(f"num_points is {num_points}, must be at least {MIN_POINTS}")
    stored = [shapes.points.shape[1] for shapes in shape_sets if shapes.points is not None]
    if not stored:
        if upsample:
            raise InputError(f"{source}: meshes can be sampled at any density; --upsample is for stored points")
        return num_points or DEFAULT_POINTS
    if num_points is None:
        num_points = min(DEFAULT_POINTS, *stored)
    if num_points > min(stored) and not upsample:
        raise InputError(
            f"{source}: {min(stored)} points stored for each shape, num_points asks for {num_points}; lower it, or "
            "pass --upsample to interpolate between stored points"
        )
    return num_points


def _files(source: Path, shape_sets: list[ShapeSet], allow_links: bool) -> list[Path]:
    """Return the files that hold the shapes."""
    if (source / MARK).is_file():
        return [path for split in SPLITS for path in list_files(source, split, allow_links=allow_links)]
    return [path for shapes in shape_sets for path in shapes.paths or ()]


def _read_points(source: Path, split: str, up_axis: str | None, allow_links: bool) -> ShapeSet:
    points: list[np.ndarray] = []
    labels, names = [], []
    for path, file in read_split(source, split, extras=False, allow_links=allow_links):
        if points and file.points.shape[1] != points[0].shape[1]:
            raise InputError(f"{path}: {file.points.shape[1]} points a shape, the files before it {points[0].shape[1]}")
        check_shapes(path, file.points)
        points.append(turn_up_axis(torch.from_numpy(file.points), up_axis or stored_up_axis(file)).numpy())
        labels.append(file.label)
        names += shape_names(path, file)
    return ShapeSet(split, names, np.concatenate(labels), points=np.concatenate(points))


def _find_meshes(source: Path, class_names: Sequence[str], split: str, up_axis: str, allow_links: bool) -> ShapeSet:
    found = (path for name in class_names for path in sorted((source / name / split).glob("*.off")))
    paths = [check_inside(path, source, allow_links=allow_links) for path in found]
    labels = np.array([class_names.index(path.parent.parent.name) for path in paths], dtype=np.int64)
    return ShapeSet(split, [path.stem for path in paths], labels, paths=paths, up_axis=up_axis)


_job: tuple[ShapeSet, ScanOptions] | None = None
"""What a worker process scans; sent to it once."""


def _keep_job(shapes: ShapeSet, options: ScanOptions) -> None:
    global _job
    _job = shapes, options


def _scan_in_worker(index: int) -> list[View]:
    assert _job is not None
    return scan_shape(_job[0], index, _job[1])


def _all_views(shapes: ShapeSet, options: ScanOptions, workers: int) -> Iterator[list[View]]:
    indices = range(len(shapes.names))
    if workers == 1:
        yield from (scan_shape(shapes, index, options) for index in indices)
        return
    with worker_pool(workers, __name__, doing="scanning", start=_keep_job, arguments=(shapes, options)) as spread:
        yield from spread(_scan_in_worker, indices)
