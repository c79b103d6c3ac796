"""ModelNet as it is distributed, meshes and text files, to the HDF5 files that training reads.

It reads two layouts:

class/train/*.off, class/test/*.off                              ModelNet10 and ModelNet40 of Princeton, z up
modelnet40_shape_names.txt, modelnet40_train.txt, class/*.txt    modelnet40_normal_resampled (also of 10 classes), y up
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..atomic import claimed, parse_json, real_path, sweep, take_place, write_text
from ..datasets.h5 import check_up_axis, write_h5
from ..datasets.links import check_inside
from ..datasets.mesh import read_off
from ..datasets.modelnet40 import SPLITS
from ..datasets.precision import check_extent, to_single
from ..datasets.surface import sample_mesh
from ..datasets.text import parse_rows, read_bytes, split_fields
from ..errors import InputError
from ..random_state import derived_rng
from ..workers import worker_pool
from . import DEFAULT_POINTS
from .folder import CONVERSION, MARK, check_output, foreign_files, write_listing
from .left_out import TRAIN_AS_IT_IS, check_left_out, find_left_out
from .scan_view import unit_sphere

log = logging.getLogger(__name__)

PART = 512
"""Shapes of one HDF5 file, which is what a conversion that was stopped does not do again."""
CHANNELS = "xyz+normal"
"""Of a converted shape: meshes have face normals, text files their own."""
_TEXT_NAMES = ("modelnet40", "modelnet10")


@dataclass(frozen=True)
class Source:
    """A folder to convert.

    Attributes:
        kind: "off" or "text".
        up_axis: vertical of its points.
        class_names: labels are their positions.
        shapes: by split: path below the folder, name, label of each shape.
    """

    kind: str
    up_axis: str
    class_names: list[str]
    shapes: dict[str, list[tuple[str, str, int]]]


def find_source(folder: Path, *, allow_links: bool = False) -> Source | None:
    """Return what a folder holds; None if it has neither layout.

    Raises:
        InputError: it has one of them, but is incomplete, or has links out of it that are not allowed.
    """
    for name in _TEXT_NAMES:
        if (folder / f"{name}_shape_names.txt").is_file():
            return _text_source(folder, name, allow_links)
    classes = sorted({path.parent.parent.name for path in folder.glob("*/train/*.off")})
    if not classes:
        return None
    shapes = {
        split: [
            (str(path.relative_to(folder)), path.stem, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name / split).glob("*.off"), key=_natural)
        ]
        for split in SPLITS
    }
    return _complete(folder, Source("off", "z", classes, shapes), allow_links)


def convert_modelnet(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    num_points: int = DEFAULT_POINTS,
    seed: int = 0,
    up_axis: str | None = None,
    workers: int | None = None,
    allow_links: bool = False,
    skip_others: bool = False,
    force: bool = False,
) -> dict[str, int]:
    """Convert a folder of meshes or text files to HDF5 files in the layout of `modelnet40_ply_hdf5_2048`.

    From the surface of each mesh `num_points` points are drawn evenly, with the normals of their faces, then centred
    and scaled into the unit sphere; of a text file's points a random `num_points` are kept, with their normals, as they
    are. Each shape is a function of seed, split and name, so that neither the number of processes nor an interruption
    changes the result.

    Finished files are kept in `.NAME.partial` beside the output until all are there: the same command continues an
    interrupted one.

    Args:
        source: see the head of this file.
        output: folder to make; it appears whole or not at all.
        num_points: of a shape; at most those of the text files.
        seed: of the choice of points.
        up_axis: vertical of the files, "y" or "z", to record; default that of the layout.
        workers: processes; default the number of cores, at most 8.
        allow_links: follow links that lead out of the folder.
        skip_others: leave out files that have no place in the layout, see `check_left_out`.
        force: replace a data set that is there.

    Returns:
        Number of shapes of each split.

    Raises:
        InputError: the folder is in neither layout or holds further clouds, a file is damaged, `output` exists, an
            argument is out of range.

    Example:
        >>> convert_modelnet("ModelNet10", "data/modelnet10")  # doctest: +SKIP
        {'train': 3991, 'test': 908}
    """
    source, output = Path(source), Path(output)
    if num_points < 1:
        raise InputError(f"num_points is {num_points}, must be at least 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, must be at least 1")
    if up_axis is not None:
        check_up_axis(up_axis)
    found = find_source(source, allow_links=allow_links) if source.is_dir() else None
    if found is None:
        others = find_left_out(source)[0] if source.is_dir() else []
        advice = f"class folders need no conversion: {TRAIN_AS_IT_IS}{source}" if others else "see data/README.md"
        raise InputError(
            f"{source}: is no public copy of ModelNet: neither shape_names.txt (HDF5) nor class/train/*.off (meshes) "
            f"nor modelnet40_shape_names.txt (text); {advice}"
        )
    check_output(output, force, source)
    used = [source / relative for shapes in found.shapes.values() for relative, _, _ in shapes]
    summary = check_left_out(source, used, skip_others=skip_others)
    work = output.parent / f".{output.name}.partial"
    vertical = up_axis or found.up_axis
    job = {**asdict(found), "source": str(real_path(source)), "up_axis": vertical}
    counts = {split: len(shapes) for split, shapes in found.shapes.items()}
    with _claimed(work, {**job, "num_points": num_points, "seed": seed, "part": PART, "channels": CHANNELS}):
        parts = []
        for split, shapes in found.shapes.items():
            entries = []
            for number, start in enumerate(range(0, len(shapes), PART)):
                entries.append(f"ply_data_{split}{number}.h5")
                parts.append((work / entries[-1], split, shapes[start : start + PART]))
            write_listing(work, split, entries, name=output.name)
        cores = workers or min(os.cpu_count() or 1, 8)
        with (
            tqdm(total=sum(counts.values()), unit="shape", disable=None) as bar,
            worker_pool(cores, __name__, doing="converting") as spread,
        ):
            for path, split, shapes in parts:
                if path.exists():  # whole, since it got its name at its end
                    bar.update(len(shapes))
                    continue
                task = (str(source), found.kind, num_points, seed, split)
                clouds = []
                for cloud in spread(_Job(*task), [(relative, name) for relative, name, _ in shapes]):
                    clouds.append(cloud)
                    bar.update()
                stacked = np.stack(clouds)
                write_h5(
                    path, stacked[..., :3], [label for _, _, label in shapes], names=[name for _, name, _ in shapes],
                    normal=stacked[..., 3:], up_axis=vertical,
                )  # fmt: skip
        (work / MARK).write_text("".join(f"{name}\n" for name in found.class_names), encoding="utf-8")
        take_place(work, output, lambda: check_output(output, force, source))
    (output / CONVERSION).unlink()
    log.info("%s", summary)
    return counts


@contextmanager
def _claimed(work: Path, job: dict) -> Iterator[None]:
    """Make the folder of unfinished work, or go on with the one that is there if it is of the same conversion.

    Raises:
        InputError: what is there is not such a folder, or holds more; another process works in it; it cannot be made.
    """
    text, note = json.dumps(job, sort_keys=True), work / CONVERSION
    try:
        work.mkdir(parents=True, exist_ok=work.is_dir() and not work.is_symlink())
        with claimed(work) as alone:
            if not alone:
                raise InputError(f"{work}: another process is converting there; wait for it or choose another --output")
            sweep(work)
            stored = note.read_text(encoding="utf-8", errors="replace") if note.is_file() else ""
            if stored != text:
                if any(work.iterdir()) and (not _is_job(stored) or foreign_files(work)):
                    raise InputError(
                        f"{work}: has the name of an unfinished conversion, but is none; move it elsewhere"
                    )
                for path in work.iterdir():
                    path.unlink()
                write_text(note, text)
            yield
    except FileExistsError as error:
        raise InputError(f"{work}: is needed for an unfinished conversion; move it elsewhere") from error
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(work):
            raise
        raise InputError(f"{work}: cannot be made there ({error.strerror}); choose another --output") from error


def _is_job(text: str) -> bool:
    with suppress(ValueError):
        job = parse_json(text)
        return isinstance(job, dict) and {"kind", "shapes", "source", "part"} <= job.keys()
    return False


@dataclass(frozen=True)
class _Job:
    """What makes a cloud of a shape; a plain value that can be sent to worker processes."""

    source: str
    kind: str
    num_points: int
    seed: int
    split: str

    def __call__(self, shape: tuple[str, str]) -> np.ndarray:
        relative, name = shape
        path = Path(self.source, relative)
        rng = derived_rng(self.seed, "surface", self.split, name)
        if self.kind == "off":
            vertices, faces = read_off(path)
            check_extent(vertices[np.unique(faces)], str(path))
            drawn = sample_mesh(vertices, faces, self.num_points, rng, str(path), channels=CHANNELS)
            return np.concatenate([unit_sphere(drawn[:, :3]), drawn[:, 3:]], axis=1).astype(np.float32)
        return read_resampled(path, self.num_points, rng)


def read_resampled(path: Path, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Read a file of `modelnet40_normal_resampled`, rows x,y,z,nx,ny,nz, and keep a random part in the file's order.

    Returns:
        (num_points, 6) float32; a cloud far from the origin is moved to it first, see `to_single`.

    Raises:
        InputError: not such a file, or it has fewer rows.
    """
    data = read_bytes(path)
    columns = len(split_fields(data.partition(b"\n")[0], b","))
    if columns != 6:
        raise InputError(f"{path}: holds {columns} columns, must be the six finite numbers x,y,z,nx,ny,nz")
    rows = parse_rows(data, 6, separator=b",", where=f"{path}: not a table of x,y,z,nx,ny,nz")
    if not np.isfinite(rows).all():
        raise InputError(f"{path}: row {int(np.isfinite(rows).all(axis=1).argmin())} is not six finite numbers")
    if len(rows) < num_points:
        raise InputError(f"{path}: {len(rows)} points are fewer than --num-points {num_points}")
    check_extent(rows[:, :3], str(path))
    rows = rows[np.sort(rng.choice(len(rows), num_points, replace=False))]
    return np.concatenate([to_single(rows[:, :3]), rows[:, 3:].astype(np.float32)], axis=1)


def _text_source(folder: Path, name: str, allow_links: bool) -> Source:
    def lines(path: Path) -> list[str]:
        if not path.is_file():
            raise InputError(f"{path}: no such file; unpack the archive again")
        check_inside(path, folder, allow_links=allow_links)
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]

    classes = lines(folder / f"{name}_shape_names.txt")
    shapes: dict[str, list[tuple[str, str, int]]] = {}
    for split in SPLITS:
        listing, shapes[split] = folder / f"{name}_{split}.txt", []
        for shape in lines(listing):
            kind = shape.rpartition("_")[0]
            if kind not in classes or "/" in shape:
                raise InputError(f"{listing}: '{shape}' is of no class in {name}_shape_names.txt")
            shapes[split].append((f"{kind}/{shape}.txt", shape, classes.index(kind)))
    return _complete(folder, Source("text", "y", classes, shapes), allow_links)


def _complete(folder: Path, source: Source, allow_links: bool) -> Source:
    for split, shapes in source.shapes.items():
        if not shapes:
            raise InputError(f"{folder}: no shape of split '{split}'; unpack the archive again")
        missing = [relative for relative, _, _ in shapes if not (folder / relative).is_file()]
        if missing:
            raise InputError(
                f"{folder / missing[0]}: no such file, and {len(missing) - 1} more; unpack the archive again"
            )
        for relative, _, _ in shapes:
            check_inside(folder / relative, folder, allow_links=allow_links)
    return source


def _natural(path: Path) -> tuple[str, int]:
    """Sort chair_2 before chair_10; public files have leading zeros, copies not always."""
    stem, _, number = path.stem.rpartition("_")
    return (stem, int(number)) if number.isdecimal() else (path.stem, 0)
