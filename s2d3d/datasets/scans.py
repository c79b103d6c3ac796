"""Class folders as a data set: files in any format that `read_points` reads, read once and kept as HDF5."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..atomic import locked, read_json, workspace, write_json, write_text
from ..channels import XYZ, by_group, groups
from ..errors import InputError, first_line, printable, quoted
from ..workers import worker_pool
from .base import PointCloudDataset
from .class_folders import ClassFolders, find_class_folders, is_text, refuse_inside
from .files import SURFACE_POINTS, as_cloud, collected_warnings, read_points, spread_points
from .h5 import write_h5
from .labelled import TRAIN, as_numbers
from .modelnet40 import load_modelnet40
from .prefix import cache_folders, can_hold

log = logging.getLogger(__name__)

LEAST_POINTS = 32
"""A file with fewer points shows no shape."""
_VERSION = 4
"""Of what is kept; a higher one makes it anew."""
_HASH_BYTES = 16
_FILE_ROWS = 1024
"""Clouds of one HDF5 file."""
_PARALLEL_BYTES = 64_000_000
"""Files that take more are read in several processes; below that, starting these takes longer."""


class Options(NamedTuple):
    """What `load_scans` asks for, as far as what is kept depends on it."""

    num_points: int
    normalize: bool
    short: str
    skip_unreadable: bool
    channels: str = XYZ
    estimate_normals: bool = False

    def described(self) -> str:
        """Return what is hashed; of clouds of x, y, z alone it is what it was before there were channels."""
        first = ", ".join(f"{key}={getattr(self, key)!r}" for key in self._fields[:4])
        return f"Options({first})" + ("" if self.channels == XYZ else f" {self[4:]}")


def load_scans(
    root: str | os.PathLike,
    split: str,
    *,
    num_points: int = 1024,
    channels: str = XYZ,
    normalize: bool = True,
    cache_dir: str | os.PathLike | None = None,
    allow_links: bool = False,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    short: Literal["repeat", "skip", "error"] = "repeat",
    skip_unreadable: bool = False,
    estimate_normals: bool = False,
    labelled: bool = True,
    **shared: Any,
) -> PointCloudDataset:
    """Read one split of a folder whose class folders hold clouds and meshes, see `find_class_folders`.

    Each file becomes 1.2 `num_points` points by farthest point sampling. Meshes are sampled by area, with a fixed seed.
    The result is kept in `cache_dir` under a hash of the files' content, and read from there the next time.

    Args:
        root: the folder.
        split: "train" or "test".
        num_points: of a sample.
        channels: of a point; each file must hold them, see `read_points`.
        normalize: centre the clouds and scale them into the unit sphere.
        cache_dir: default `ROOT/.fps_cache`, or the user's cache if the folder cannot be written.
        allow_links: follow links that lead out of the folder.
        test_fraction: share of each class's files for the test split, where no folder is called train or test.
        split_seed: of that choice. It does not depend on `seed`, so runs with other seeds have the same test split.
        short: what to do with a file of fewer than `num_points` points: repeat its points, skip it, or stop. A file of
            fewer than 32 is unreadable.
        skip_unreadable: leave out files that cannot be read, instead of stopping at the first.
        estimate_normals: estimate the normals of clouds that have none, by Open3D; `data.channels` must have normals.
        labelled: False accepts files outside of class folders, of the class `UNLABELLED`, and a single class.
        **shared: further keywords of `load_modelnet40`; the vertical `up_axis` of the files is "z" by default.

    Returns:
        The split; its `skipped` has a line for each file left out.

    Raises:
        InputError: the folder is wrong, or a file is and may not be skipped; no place to keep what was read.

    Example:
        >>> train = load_scans("scans", "train", num_points=1024)  # doctest: +SKIP
    """
    if estimate_normals and "normal" not in groups(channels):
        raise InputError(f"data.estimate_normals needs data.channels with normals (xyz+normal), not {channels}")
    if cache_dir is not None:
        refuse_inside(root, cache_dir, "data.cache_dir")
    found = find_class_folders(
        root, test_fraction=test_fraction, split_seed=split_seed, allow_links=allow_links, labelled=labelled
    )
    hashes = {split: _file_hashes(found, split) for split in found.files}
    say = split == TRAIN  # once, not for each split
    if say:
        log.info("%s", found.summary())
        for text in (*found.doubts(), *_copies(found, hashes)):
            log.warning("%s: %s", root, text)
    options = Options(num_points, normalize, short, skip_unreadable, channels, estimate_normals)
    name = f"files_{_content_hash(found, options, hashes)}"
    kept = None
    for folder in cache_folders(Path(root), cache_dir):
        if (folder / name).is_dir() or can_hold(folder):
            kept = folder / name
            break
    if kept is None:
        raise InputError(f"{root}: what is read from the files can be kept nowhere; name a folder by data.cache_dir=")
    with locked(kept.parent):
        if not kept.is_dir():
            with workspace(kept) as work:
                (work / "new").mkdir()
                _write_set(work / "new", found, options)
                os.replace(work / "new", kept)
    notes = read_json(kept / "notes.json", advice="remove its folder, it is made anew")
    for text in notes["said"] if say else []:
        log.warning("%s: %s", root, text)
    try:
        dataset = load_modelnet40(
            kept, split, num_points=num_points, channels=channels, normalize=False, cache_dir=kept.parent, **shared
        )
    except InputError as error:
        if str(kept) not in str(error):
            raise
        raise InputError(
            f"{kept}: what was read from {root} is damaged; remove this folder, it is made anew"
        ) from error
    dataset.source, dataset.skipped = str(root), tuple(notes["skipped"])
    dataset.normalized = normalize  # file by file, before points were chosen
    kept_classes = shared.get("classes") or found.class_names
    dataset.file_hashes = {
        part: {
            str(path.relative_to(root)): content
            for (path, label), content in zip(found.files[part], contents)
            if _is_content(content) and found.class_names[label] in kept_classes
        }
        for part, contents in hashes.items()
    }
    return dataset


def check_scans(
    test_fraction: float, split_seed: int, short: str, skip_unreadable: bool, estimate_normals: bool
) -> dict[str, str]:
    """Return by keyword of `load_scans` what is wrong with its value."""
    problems = {}
    if short not in ("repeat", "skip", "error"):
        problems["short"] = f"must be repeat, skip or error, got {quoted(str(short))}"
    if not 0 < test_fraction < 1:
        problems["test_fraction"] = f"must be above 0 and below 1, got {test_fraction:g}"
    if split_seed < 0:
        problems["split_seed"] = f"must be at least 0, got {split_seed}"
    return problems


def stored_points(num_points: int) -> int:
    """Return how many points of each file are kept: those of which a training sample is drawn."""
    return num_points * 6 // 5


def read_stored(
    path: Path, num_points: int, normalize: bool, channels: str = XYZ, estimate_normals: bool = False
) -> np.ndarray:
    """Read a file as it is kept: put into the unit sphere, as `read_cloud` does, and thinned.

    Args:
        path: see `read_points`.
        num_points: of a sample.
        normalize: whether to put the cloud into the unit sphere.
        channels: of a point.
        estimate_normals: see `read_points`.

    Returns:
        (M, C) float32 with M at most `stored_points(num_points)`, in the order of farthest point sampling.

    Raises:
        InputError: as `read_points`; fewer than `LEAST_POINTS` points.
    """
    points = read_points(path, SURFACE_POINTS * num_points, channels=channels, estimate_normals=estimate_normals)
    if len(points) < LEAST_POINTS:
        raise InputError(f"{path}: {len(points)} points show no shape; at least {LEAST_POINTS} are needed")
    cloud = as_cloud(points, str(path), normalize=normalize, up_axis="z", channels=channels)  # turned when read again
    return spread_points(cloud, min(cloud.shape[1], stored_points(num_points)), num_points)[0].numpy()


def _try_read(path: Path, options: Options) -> tuple[np.ndarray | str, list[str]]:
    """Read a file, or return why that fails; for worker processes, whose errors would lose their type.

    Returns:
        The cloud or the reason, and what the reader warned of.
    """
    with collected_warnings() as said:
        try:
            return read_stored(
                path, options.num_points, options.normalize, options.channels, options.estimate_normals
            ), said  # fmt: skip
        except (InputError, OSError, MemoryError) as error:
            return first_line(error, limit=1000), said


def _write_set(folder: Path, found: ClassFolders, options: Options) -> None:
    """Read all files and write them in the layout of `load_modelnet40`, with notes on what was left out."""
    labelled = [(split, path, label) for split, files in found.files.items() for path, label in files]
    parts = {split: _Part(folder, split, options.channels) for split in found.files}
    skipped, warned, num_short = [], [], 0
    num_points = options.num_points
    read = partial(_try_read, options=options)
    paths = [path for _, path, _ in labelled]
    with worker_pool(_workers(paths), __name__, doing="reading", remedy="free some and start again") as spread:
        clouds = tqdm(spread(read, paths), total=len(paths), desc="files (once)", disable=None, leave=False)
        for (split, path, label), (cloud, warnings) in zip(labelled, clouds):
            name = str(path.relative_to(found.root))
            if not is_text(name):  # HDF5 keeps names in UTF-8
                cloud = f"{printable(str(path))}: its name is not UTF-8; rename it"
            if isinstance(cloud, str):
                if not options.skip_unreadable:
                    raise InputError(f"{cloud}; correct it or remove it, or set data.skip_unreadable=true")
                skipped.append(cloud)
                continue
            if len(cloud) < num_points:
                text = f"{path}: {len(cloud)} points are fewer than data.num_points={num_points}"
                if options.short == "error":
                    raise InputError(f"{text}; lower it, or set data.short to repeat or skip")
                if options.short == "skip":
                    skipped.append(text)
                    continue
                num_short += 1
            warned += warnings
            repeated = np.resize(cloud, (stored_points(num_points), cloud.shape[1]))
            parts[split].add(repeated, label, name)
    for split, part in parts.items():
        empty = [name for label, name in enumerate(found.class_names) if label not in part.classes]
        if (empty and split == "train") or len(empty) == len(found.class_names):
            raise InputError(
                f"{found.root}: no file of class '{empty[0]}' is left to {split}; {len(skipped)} are left out, "
                f"the first: {skipped[0]}"
            )
        part.finish()
    write_text(folder / "shape_names.txt", "".join(f"{name}\n" for name in found.class_names))
    said = []
    if num_short:
        said.append(f"{num_short} of {len(paths)} files have fewer than {num_points} points; their points are repeated")
    if warned:
        said.append(f"{len(warned)} of {len(paths)} files hold points that are not finite, the first: {warned[0]}")
    if skipped:
        said.append(f"{len(skipped)} of {len(paths)} files are left out, the first: {skipped[0]}")
    write_json(folder / "notes.json", {"said": said, "skipped": sorted(skipped)})


class _Part:
    """Writes the clouds of one split, a file for every `_FILE_ROWS` of them."""

    def __init__(self, folder: Path, split: str, channels: str) -> None:
        self.classes: set[int] = set()
        self._folder, self._split, self._channels = folder, split, channels
        self._rows: list[tuple[np.ndarray, int, str]] = []
        self._names: list[str] = []

    def add(self, cloud: np.ndarray, label: int, name: str) -> None:
        self._rows.append((cloud, label, name))
        self.classes.add(label)
        if len(self._rows) == _FILE_ROWS:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and the list of files."""
        if self._rows:
            self._flush()
        write_text(self._folder / f"{self._split}_files.txt", "".join(f"{name}\n" for name in self._names))

    def _flush(self) -> None:
        clouds, labels, names = zip(*self._rows)
        self._names.append(f"{self._split}{len(self._names)}.h5")
        groups = by_group(np.stack(clouds), self._channels)
        write_h5(
            self._folder / self._names[-1], groups["xyz"], labels, names=names, normal=groups.get("normal"),
            rgb=groups.get("rgb"), up_axis="z",
        )  # fmt: skip
        self._rows.clear()


def _workers(paths: Sequence[Path]) -> int:
    """Return how many processes read: one for few bytes, else as many as there are processors."""
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return min(os.cpu_count() or 1, 8) if size > _PARALLEL_BYTES else 1


def _content_hash(found: ClassFolders, options: Options, hashes: dict[str, list[bytes]]) -> str:
    """Return a hash of everything that what is kept depends on."""
    digest = hashlib.blake2b(f"{_VERSION} {options.described()} {found.class_names}".encode(), digest_size=12)
    for split, files in found.files.items():
        for (path, label), content in zip(files, hashes[split]):
            digest.update(os.fsencode(f"{split} {label} {path.relative_to(found.root)} ") + content)
    return digest.hexdigest()


def _copies(found: ClassFolders, hashes: dict[str, list[bytes]]) -> list[str]:
    """Return a line for files of the same content that are tested and trained on, or lie in two classes."""
    trained = {content: path for (path, _), content in zip(found.files["train"], hashes["train"])}
    both = [
        (path, trained[content])
        for (path, _), content in zip(found.files["test"], hashes["test"])
        if content in trained and _is_content(content)
    ]
    said = []
    if both:
        first, same = both[0]
        said.append(f"{len(both)} files to test are copies of files to train, the first: {first} of {same}")
    classes: dict[bytes, tuple[Path, int]] = {}
    labelled = [
        (path, label, content)
        for split, files in found.files.items()
        for (path, label), content in zip(files, hashes[split])
        if _is_content(content)
    ]
    other = [(path, classes[c][0]) for path, label, c in labelled if classes.setdefault(c, (path, label))[1] != label]
    if other:
        first, same = other[0]
        said.append(f"{len(other)} files are copies of files of another class, the first: {first} of {same}")
    return said


def _file_hashes(found: ClassFolders, split: str) -> list[bytes]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_file_hash, [path for path, _ in found.files[split]]))


def count_trained(paths: Iterable[Path], numbers: Tensor) -> int:
    """Count the files that a result of `LabelledDataset.trained_files` names."""
    return int(torch.isin(as_numbers(filter(_is_content, map(_file_hash, paths))), numbers).sum())


def _is_content(content: bytes) -> bool:
    """Tell the hash of a file from what `_file_hash` returns for one that cannot be read."""
    return len(content) == _HASH_BYTES


def _file_hash(path: Path) -> bytes:
    if not path.is_file():  # a FIFO would be waited for
        return b"no file"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=_HASH_BYTES)).digest()
    except OSError as error:
        return f"unreadable {error.errno}".encode()
