"""Single files as a data set: clouds and meshes of any origin, whose folders may be named after their classes."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..channels import XYZ
from ..errors import InputError
from .base import PointCloudDataset
from .class_folders import count_suffixes, walk_files
from .files import SUFFIXES, read_cloud
from .loader import BatchLoader

log = logging.getLogger(__name__)


def find_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files named, and of each folder named all that `read_points` reads, in the order of their paths.

    Links to files and folders are followed and keep their own names. A link to nothing is returned too, so that reading
    it says so. In folders, names that begin with a dot are left out, and files of other kinds are counted in a warning.

    Raises:
        InputError: an empty path; a folder without such a file, or one that cannot be read.
    """
    if not all(map(str, paths)):
        raise InputError("a path is empty; name a file or a folder, such as . for the current one")
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = list(walk_files(path, path, allow_links=True))
        read = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if not read:
            raise InputError(f"{path}: holds no file of {', '.join(SUFFIXES)}")
        if others := Counter(file.suffix.lower() for file in inside if file.suffix.lower() not in SUFFIXES):
            log.warning("%s: ignored, of other kinds: %s", path, count_suffixes(others))
        found += sorted(read)
    return found


def folder_labels(
    files: Sequence[Path], class_names: Sequence[str], paths: Sequence[str | os.PathLike[str]] = ()
) -> list[int] | None:
    """Return the class of each file, which the name of a folder tells; None if one is in no such folder.

    It is a folder of the path as given: of a link, the one that the link lies in. See `folder_names`.

    Args:
        files: of `find_files`.
        class_names: of the model.
        paths: the files and folders that were named.

    Example:
        >>> folder_labels([Path("test/mug/1.off"), Path("box/a.ply")], ["box", "mug"])
        [1, 0]
        >>> folder_labels([Path("mug/1.off"), Path("Downloads/a.ply")], ["box", "mug"])
    """
    numbers = {name: label for label, name in enumerate(class_names)}
    labels = [next((numbers[n] for n in folder_names(file, paths) if n in numbers), None) for file in files]
    known = [label for label in labels if label is not None]
    return known if len(known) == len(labels) else None


def folder_names(file: Path, paths: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """Return the names of the folders that may tell the class of a file, the first known one does; links not followed.

    In a named folder these are its own name and the folders below it from the top, as in a data set. Of a file that is
    named itself it is the folder that it lies in.

    Example:
        >>> folder_names(Path("scans/mug/old/1.off"), ["scans"]), folder_names(Path("scans/mug/1.off"))
        (['scans', 'mug', 'old'], ['mug'])
    """
    own = Path(os.path.abspath(file)).parent
    for folder in (Path(os.path.abspath(path)) for path in paths if Path(path) != file):
        if own.is_relative_to(folder):
            return [folder.name, *own.relative_to(folder).parts]
    return [own.name]


def load_files(
    files: Sequence[Path],
    class_names: Sequence[str],
    labels: Sequence[int] | None,
    *,
    num_points: int,
    up_axis: str = "z",
    normalize: bool = True,
    seed: int = 0,
    allow_missing: bool = True,
    channels: str = XYZ,
    estimate_normals: bool = False,
) -> PointCloudDataset:
    """Read files as a test split, each cloud as `read_cloud` gives it.

    Args:
        files: at least one.
        class_names: of the model.
        labels: class of each file; None where they have none, which gives them the first for a place holder.
        num_points: of a cloud.
        up_axis: vertical axis of the files, "y" or "z".
        normalize: as the model was trained, `data.normalize`.
        seed: of the points drawn from meshes.
        allow_missing: see `read_points`.
        channels: that the model takes.
        estimate_normals: see `read_points`.

    Raises:
        InputError: a file that cannot be read, or has fewer points.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "cloud.xyz")
        >>> _ = path.write_text("0 0 0\\n1 0 0\\n0 1 0\\n0 0 1\\n")
        >>> load_files([path], ["box", "mug"], [1], num_points=4).batch(torch.tensor([0]))[0].shape
        torch.Size([1, 4, 3])
    """
    (dataset,) = group_files(
        files, class_names, labels, num_points, up_axis=up_axis, normalize=normalize, seed=seed,
        allow_missing=allow_missing, channels=channels, estimate_normals=estimate_normals,
    )  # fmt: skip
    return dataset


class FileGroup(PointCloudDataset):
    """Files with one number of points.

    Attributes:
        places: of each file in the list that was read.
    """

    places: tuple[int, ...] = ()


def in_order(groups: Sequence[FileGroup], correct: str) -> str:
    """Put the marks of files, scored group by group, in the order of the files.

    Example:
        >>> clouds = [FileGroup(torch.rand(n, 8, 3), torch.zeros(n), ["any"], num_points=8) for n in (2, 1)]
        >>> clouds[0].places, clouds[1].places = (0, 2), (1,)
        >>> in_order(clouds, "001")
        '010'
    """
    places = [place for group in groups for place in group.places]
    return "".join(mark for _, mark in sorted(zip(places, correct)))


def group_files(
    files: Sequence[Path],
    class_names: Sequence[str],
    labels: Sequence[int] | None,
    num_points: int,
    *,
    least: int | None = None,
    normalize: bool = True,
    channels: str = XYZ,
    **options: Any,
) -> list[FileGroup]:
    """Read files as `load_files`, also such with fewer points: a set for each number of points, the largest first.

    Args:
        files: at least one.
        class_names: of the model.
        labels: class of each file, or None.
        num_points: of a cloud with enough of them.
        least: fewest points of a cloud, which then keeps what it has; see `read_cloud`.
        normalize: as the model was trained.
        channels: that the model takes.
        **options: further keywords of `read_cloud`.

    Raises:
        InputError: a file that cannot be read, or has fewer points than allowed.
    """
    options |= dict(least=least, normalize=normalize, channels=channels)
    clouds = [read_cloud(file, num_points, **options) for file in files]
    groups = []
    for size in sorted({len(cloud) for cloud in clouds}, reverse=True):
        places = [place for place, cloud in enumerate(clouds) if len(cloud) == size]
        own = torch.tensor([labels[place] if labels else 0 for place in places])
        dataset = FileGroup(
            torch.stack([clouds[place] for place in places]), own, class_names,
            names=[files[place].name for place in places], split="test", num_points=size, normalize=False,
            channels=channels, source="files",
        )  # fmt: skip
        dataset.normalized = normalize  # file by file, before points were chosen
        dataset.places = tuple(places)
        groups.append(dataset)
    return groups


class ChainedLoader:
    """Loaders of sets with different numbers of points, one after the other, for `evaluate`."""

    def __init__(self, loaders: Sequence[BatchLoader]) -> None:
        self.loaders = loaders
        self.dataset = loaders[0].dataset  # whose classes are those of all

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return chain.from_iterable(self.loaders)

    def vote(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a vote, see `BatchLoader.vote`."""
        return chain.from_iterable(loader.vote(number) for loader in self.loaders)
