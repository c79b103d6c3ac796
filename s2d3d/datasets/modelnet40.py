"""Folders in the layout of the public `modelnet40_ply_hdf5_2048`.

shape_names.txt                     one class name a line
train_files.txt, test_files.txt     one HDF5 file a line
ply_data_train0.h5, ...             data (n, P, 3), label (n,) or (n, 1), optional name, normal
"""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from ..channels import XYZ
from ..errors import InputError, did_you_mean, quoted
from .base import PointCloudDataset
from .class_folders import SPLITS, UNLABELLED
from .h5 import SEE, CloudFile, CloudLayout, check_up_axis, has_labels, read_h5
from .h5_checks import check_shapes
from .labelled import TEST, TRAIN
from .links import check_inside
from .prefix import cache_folders
from .selection import choose_shapes
from .stream import MEMORY_BUDGET_GB, StreamedClouds, exceeds_budget, open_clouds, shape_names
from .transforms import Transform, turn_up_axis

log = logging.getLogger(__name__)

PREPARE = "python tools/prepare_data.py modelnet40 --from DIR --output"
PREPARE_SHAPES = "python tools/prepare_data.py shapes --output"


def load_modelnet40(
    root: str | os.PathLike,
    split: str,
    *,
    num_points: int = 1024,
    transform: Transform | None = None,
    channels: str = XYZ,
    up_axis: str | None = None,
    normalize: bool = True,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    allow_links: bool = False,
    memory_budget_gb: float = MEMORY_BUDGET_GB,
    labelled: bool = True,
) -> PointCloudDataset:
    """Read one split of a folder in ModelNet layout.

    Args:
        root: the folder.
        split: "train" or "test".
        num_points: points of a sample; see `PointCloudDataset`.
        transform: augmentation.
        channels: of a point; normals are the dataset `normal` of the files, colours `rgb`.
        up_axis: the vertical of the stored points, "y" or "z"; default `stored_up_axis`. They are turned z up.
        normalize: centre the clouds and scale them into the unit sphere.
        classes: keep these classes only, numbered in this order.
        fraction: share of the training shapes of each class to keep, in (0, 1]; the test split is kept whole.
        seed: chooses that share.
        cache_dir: where farthest-point prefixes are kept; default beside the set.
        allow_links: follow links that lead out of the folder.
        memory_budget_gb: 10^9 bytes; a split whose points take more stays in its files, see `StreamedClouds`.
        labelled: False accepts a folder without `shape_names.txt`, or with a file without labels: the clouds of both
            splits are then of the one class `UNLABELLED`.

    Raises:
        InputError: the folder or a file in it is missing or wrong; an argument is out of range.

    Example:
        >>> train = load_modelnet40("data/modelnet40", "train", num_points=1024)  # doctest: +SKIP
        >>> train[0][0].shape  # doctest: +SKIP
        torch.Size([1024, 3])
    """
    root = Path(root)
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}'{did_you_mean(split, SPLITS)} (known: {', '.join(SPLITS)})")
    if up_axis is not None:
        check_up_axis(up_axis)
    _check_folder(root, f"put ModelNet40 there (see data/README.md) or run: {PREPARE}")
    files = list_files(root, split, allow_links=allow_links)
    if split == TRAIN:
        with contextlib.suppress(InputError):  # of the test list, which is not read here
            if both := set(files) & set(list_files(root, TEST, allow_links=allow_links)):
                log.warning("%s: %d files are listed to train and to test, such as %s", root, len(both), min(both).name)
    labelled = labelled or _has_labels(root, allow_links=allow_links)
    class_names = read_class_names(root, allow_links=allow_links) if labelled else [UNLABELLED]
    stored: torch.Tensor | StreamedClouds
    if exceeds_budget(files, memory_budget_gb, channels):
        stored, all_labels, names = open_clouds(
            files,
            num_classes=len(class_names),
            up_axis=lambda file: up_axis or stored_up_axis(file),
            budget_gb=memory_budget_gb,
            channels=channels,
            labelled=labelled,
        )
    else:
        stored, all_labels, names = _read_clouds(files, len(class_names), up_axis, channels, labelled)
    kept, all_labels, class_names = choose_shapes(
        all_labels, class_names, split=split, classes=classes, fraction=fraction, seed=seed
    )
    if len(kept) < len(stored):
        stored = stored.subset(kept) if isinstance(stored, StreamedClouds) else stored[kept]
    return PointCloudDataset(
        stored,
        all_labels,
        class_names,
        names=[names[index] for index in kept.tolist()],
        split=split,
        num_points=num_points,
        transform=transform,
        normalize=normalize,
        channels=channels,
        cache_dirs=cache_folders(root, cache_dir),
        source=str(root),
    )


def load_shapes(root: str | os.PathLike, split: str, **keywords: Any) -> PointCloudDataset:
    """Read one split of the procedural shapes, which have the same layout; keywords as for `load_modelnet40`.

    Raises:
        InputError: as `load_modelnet40`; a missing folder's message names the command that makes the shapes.

    Example:
        >>> train = load_shapes("data/shapes", "train", num_points=512)  # doctest: +SKIP
    """
    _check_folder(Path(root), f"make it with: {PREPARE_SHAPES}")
    return load_modelnet40(root, split, **keywords)


def _check_folder(root: Path, advice: str) -> None:
    if not root.is_dir():
        raise InputError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {advice} {root}")


def _has_labels(root: Path, *, allow_links: bool) -> bool:
    """Return whether a folder names classes, and each of its files has labels."""
    paths = [path for split in SPLITS for path in list_files(root, split, allow_links=allow_links)]
    return (root / "shape_names.txt").is_file() and all(map(has_labels, paths))


def _read_clouds(
    files: Sequence[Path], num_classes: int, up_axis: str | None, channels: str, labelled: bool
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read all files of a split: points (n, P, C) z up, labels (n,), names."""
    points: list[torch.Tensor] = []
    labels, names = [], []
    for path in files:
        file = read_h5(path, num_classes=num_classes, extras=False, channels=channels, labelled=labelled)
        stored_points = file.points.shape[1]
        if points and stored_points != points[0].shape[1]:
            raise InputError(f"{path}: {stored_points} points a shape, the files before it {points[0].shape[1]}; {SEE}")
        check_shapes(path, file.points[..., :3])
        axis = up_axis or stored_up_axis(file)
        points.append(turn_up_axis(torch.from_numpy(file.points), axis, channels=channels))
        labels.append(file.label)
        names += shape_names(path, file)
    return torch.cat(points), torch.from_numpy(np.concatenate(labels)), names


def read_class_names(root: Path, *, allow_links: bool = False) -> list[str]:
    """Read `shape_names.txt`; its lines are the classes, in the order of their labels.

    Raises:
        InputError: it is missing, empty, names a class twice, or is a link out of the folder and these are not allowed.
    """
    path = check_inside(root / "shape_names.txt", root, allow_links=allow_links)
    names = _read_lines(path)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{path}: class {quoted(twice)} is listed twice; {SEE}")
    return names


def read_split(
    root: Path, split: str, *, extras: bool = True, allow_links: bool = False
) -> Iterator[tuple[Path, CloudFile]]:
    """Read the files of a split one by one, in the order of its list, each checked.

    Raises:
        InputError: the list or a file is missing or wrong, or lies outside the folder.
    """
    num_classes = len(read_class_names(root, allow_links=allow_links))
    for path in list_files(root, split, allow_links=allow_links):
        yield path, read_h5(path, num_classes=num_classes, extras=extras)


def list_files(root: Path, split: str, *, allow_links: bool = False) -> list[Path]:
    """Find the files that `{split}_files.txt` lists.

    Public lists hold paths such as `data/modelnet40_ply_hdf5_2048/ply_data_train0.h5`, written for another working
    directory: the file of that name in `root` is taken and, only if there is none, that path below `root`.

    Raises:
        InputError: no list, a file that is not there, is listed twice, or lies outside `root`: behind a link only with
            `allow_links`.
    """
    list_path = check_inside(root / f"{split}_files.txt", root, allow_links=allow_links)
    files: dict[Path, None] = {}
    for entry in _read_lines(list_path):
        relative = PurePosixPath(entry.replace("\\", "/"))
        if relative.is_absolute() or PureWindowsPath(entry).drive or ".." in relative.parts:
            raise InputError(f"{list_path}: {quoted(entry)} leads out of the folder; list files inside {root}")
        candidates = [root / relative.name, root / relative]
        path = next((candidate for candidate in candidates if _is_file(candidate)), None)
        if path is None:
            raise InputError(f"{list_path}: {quoted(entry)} is not in {root}; {SEE}")
        check_inside(path, root, allow_links=allow_links)
        if path in files:
            raise InputError(f"{list_path}: {quoted(entry)} is listed twice; {SEE}")
        files[path] = None
    return list(files)


def stored_up_axis(file: CloudFile | CloudLayout) -> str:
    """Return which axis of a file's points is vertical.

    It is the attribute `up_axis` if there is one, as in every file that this package writes. Without it, float32 is the
    public `modelnet40_ply_hdf5_2048` and copies of it, y up; float16, which no public copy uses, is z up.
    """
    if file.up_axis is not None:
        return file.up_axis
    return "z" if file.dtype == np.float16 else "y"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for any file
        return False


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {SEE}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error.reason}); {SEE}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: the file is empty; {SEE}")
    return lines
