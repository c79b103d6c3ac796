"""Folders that appear whole or not at all, and checked copies of public data sets."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from ..atomic import needs_force, real_path, whole_folder
from ..datasets.h5 import check_up_axis, write_h5
from ..datasets.modelnet40 import SPLITS, list_files, read_class_names, read_split, stored_up_axis
from ..datasets.normals import estimate_normals as estimated_normals
from ..datasets.scanobjectnn import VARIANTS, relative_path
from ..errors import InputError
from .left_out import check_left_out

log = logging.getLogger(__name__)

MARK = "shape_names.txt"
CONVERSION = "conversion.json"
"""In the folder of a conversion that is under way: which one it is."""


@contextmanager
def new_folder(output: Path, *, source: Path | None = None, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `output`; it becomes `output` if the body ends without an error.

    Args:
        output: must not exist, or be an empty folder.
        source: folder that the set is made from, if it is.
        force: replace a folder that holds a data set and nothing else. Any other folder is kept.

    Raises:
        InputError: `output` exists and may not be replaced, or `source` lies in it.
    """
    with whole_folder(output, lambda: check_output(output, force, source)) as fresh:
        yield fresh


def copy_modelnet40(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    up_axis: str | None = None,
    estimate_normals: bool = False,
    allow_links: bool = False,
    skip_others: bool = False,
    force: bool = False,
) -> dict[str, int]:
    """Check every file of a folder in ModelNet layout and write copies that record their vertical axis.

    Points, labels, names, normals, colours and masks stay as they are; point count and precision too.

    Args:
        source: the folder as downloaded.
        output: folder to make; it appears whole or not at all.
        up_axis: vertical of the stored points; default what `stored_up_axis` says.
        estimate_normals: give the clouds of files without normals some, see `datasets.normals.estimate_normals`. These
            files get an attribute `normals`, "estimated".
        allow_links: follow links that lead out of the source.
        skip_others: leave out files that the source does not list, see `check_left_out`.
        force: replace a data set that is there.

    Returns:
        Number of shapes of each split.

    Raises:
        InputError: `source` is wrong or holds further clouds, or `output` exists; all files have normals and some are
            to be estimated, or Open3D is missing.
    """
    source, output = Path(source), Path(output)
    if up_axis is not None:
        check_up_axis(up_axis)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; --from names the one that holds {MARK}")
    check_output(output, force, source)
    class_names = read_class_names(source, allow_links=allow_links)
    files = {split: list_files(source, split, allow_links=allow_links) for split in SPLITS}
    summary = check_left_out(source, [path for paths in files.values() for path in paths], skip_others=skip_others)
    totals = {split: len(paths) for split, paths in files.items()}
    counts, estimated = dict.fromkeys(SPLITS, 0), 0
    with (
        new_folder(output, source=source, force=force) as folder,
        tqdm(total=sum(totals.values()), unit="file", disable=None) as bar,
    ):
        (folder / MARK).write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
        for split in SPLITS:
            entries = []
            for number, (_, file) in enumerate(read_split(source, split, allow_links=allow_links)):
                entries.append(f"ply_data_{split}{number}.h5")
                missing = estimate_normals and file.normal is None
                estimated += missing
                write_h5(
                    folder / entries[-1],
                    file.points,
                    file.label,
                    names=file.names,
                    normal=_estimated(file.points) if missing else file.normal,
                    rgb=file.rgb,
                    mask=file.mask,
                    up_axis=up_axis or stored_up_axis(file),
                    attributes={"normals": "estimated"} if missing else None,
                )
                counts[split] += len(file.label)
                bar.update()
            write_listing(folder, split, entries, name=output.name)
        if estimate_normals and not estimated:
            raise InputError(f"{source}: all its files have normals; leave out --estimate-normals")
    log.info("%s", summary)
    return counts


def _estimated(points: np.ndarray) -> np.ndarray:
    """Return normals for clouds (n, P, 3), in their type."""
    clouds = tqdm(points, desc="normals", unit="shape", leave=False, disable=None)
    return np.stack([estimated_normals(cloud) for cloud in clouds]).astype(points.dtype)


def write_listing(folder: Path, split: str, files: Iterable[str], *, name: str) -> None:
    """Write which HDF5 files a split consists of, as ModelNet40 lists them.

    Args:
        folder: of the data set, as it is while it is made.
        split: "train" or "test".
        files: their names.
        name: of the folder when it is finished.
    """
    (folder / f"{split}_files.txt").write_text("".join(f"data/{name}/{file}\n" for file in files))


def check_output(output: Path, force: bool, source: Path | None = None) -> None:
    """Raise InputError unless a data set may be made at `output` from what lies in `source`: see `new_folder`."""
    if source is not None and real_path(source).is_relative_to(real_path(output)):
        where = "is" if real_path(source) == real_path(output) else f"holds {source},"
        raise InputError(f"{output}: {where} the folder to read from; choose another --output")
    if not needs_force(output, force):
        return
    if not (output / MARK).is_file():
        raise InputError(f"{output}: is not a data set (no {MARK}), so --force does not replace it; remove it yourself")
    others = foreign_files(output)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        text = f"is not of the data set{more}, so --force does not replace {output}"
        raise InputError(f"{others[0]}: {text}; move it elsewhere or choose another --output")


def foreign_files(folder: Path) -> list[Path]:
    """Return what lies in the folder of a data set and is none of its files: these are the ones that it lists.

    Example:
        >>> foreign_files(Path("data/modelnet40"))
        []
    """
    own = {folder / MARK, folder / CONVERSION}
    for split in SPLITS:
        listing = folder / f"{split}_files.txt"
        own.add(listing)
        if listing.is_file():
            names = listing.read_text(encoding="utf-8", errors="replace").split("\n")
            own |= {folder / PurePosixPath(name.strip()).name for name in names if name.strip()}
        own |= {folder / relative_path(split, variant, background=True) for variant in VARIANTS}
    caches = {folder / ".fps_cache"}
    own |= {path for cache in caches if not cache.is_symlink() for path in cache.glob("fps_*.npz")}
    folders = {path.parent for path in own} | caches
    return sorted(
        path for path in folder.rglob("*") if path.is_symlink() or path not in (folders if path.is_dir() else own)
    )
