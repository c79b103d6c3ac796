"""Folders that appear whole or not at all, and checked copies of public data sets."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..datasets.h5 import check_up_axis, write_h5
from ..datasets.modelnet40 import SPLITS, list_files, read_class_names, read_split, stored_up_axis
from ..errors import InputError

MARK = "shape_names.txt"


@contextmanager
def new_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `output`; it becomes `output` if the body ends without an error.

    Args:
        output: must not exist, or be an empty folder.
        force: replace a folder that holds a data set. Any other folder is kept.

    Raises:
        InputError: `output` exists and may not be replaced.
    """
    check_output(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output}: cannot be made there ({error.strerror}); choose another --output") from error
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        check_output(output, force)
        if output.exists():
            os.replace(output, work / "old")
        os.replace(fresh, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def copy_modelnet40(
    source: str | os.PathLike, output: str | os.PathLike, *, up_axis: str | None = None, force: bool = False
) -> dict[str, int]:
    """Check every file of a folder in ModelNet layout and write copies that record their vertical axis.

    Points, labels, names, normals and masks stay as they are; point count and precision too.

    Args:
        source: the folder as downloaded.
        output: folder to make; it appears whole or not at all.
        up_axis: vertical of the stored points; default what `stored_up_axis` says.
        force: replace a data set that is there.

    Returns:
        Number of shapes of each split.

    Raises:
        InputError: `source` is wrong, or `output` exists.
    """
    source, output = Path(source), Path(output)
    if up_axis is not None:
        check_up_axis(up_axis)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; --from names the one that holds {MARK}")
    if source.resolve() == output.resolve():
        raise InputError(f"{output}: is the folder to copy from; choose another --output")
    class_names = read_class_names(source)
    totals = {split: len(list_files(source, split)) for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    with new_folder(output, force=force) as folder, tqdm(total=sum(totals.values()), unit="file", disable=None) as bar:
        (folder / MARK).write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
        for split in SPLITS:
            entries = []
            for number, (_, file) in enumerate(read_split(source, split)):
                entries.append(f"ply_data_{split}{number}.h5")
                write_h5(
                    folder / entries[-1],
                    file.points,
                    file.label,
                    names=file.names,
                    normal=file.normal,
                    mask=file.mask,
                    up_axis=up_axis or stored_up_axis(file),
                )
                counts[split] += len(file.label)
                bar.update()
            (folder / f"{split}_files.txt").write_text("".join(f"data/{output.name}/{entry}\n" for entry in entries))
    return counts


def check_output(output: Path, force: bool) -> None:
    """Raise InputError unless a data set may be made at `output`: see `new_folder`."""
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder; choose another --output")
    if not any(output.iterdir()):
        return
    if not force:
        raise InputError(f"{output}: exists; choose another --output, or --force to replace it")
    if not (output / MARK).is_file():
        raise InputError(f"{output}: is not a data set (no {MARK}), so --force does not replace it; remove it yourself")
