"""Data sets: a name and a folder in, clouds (N, 3) z up and labels out; of a plugin, other samples as well."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..channels import XYZ, check_channels
from ..errors import InputError, did_you_mean
from .base import PointCloudDataset, require_clouds
from .labelled import LabelledDataset, same_data
from .loader import BatchLoader
from .modelnet40 import load_modelnet40, load_shapes
from .scanobjectnn import check_keywords, load_scanobjectnn
from .scans import check_scans, load_scans
from .selection import split_train_validation
from .stream import MEMORY_BUDGET_GB
from .transforms import Transform, build_augmentation

__all__ = [
    "BatchLoader",
    "LabelledDataset",
    "PointCloudDataset",
    "Reader",
    "build_augmentation",
    "create_dataset",
    "dataset_reader",
    "datasets_with",
    "list_datasets",
    "register_dataset",
    "require_clouds",
    "same_data",
    "split_train_validation",
]


@dataclass(frozen=True)
class Reader:
    """How a data set is read.

    Attributes:
        read: takes (root, split) and the keywords of `create_dataset`; further ones are its own.
        check: takes its own keywords and returns by keyword what is wrong with their values, without reading files.
        kind: class of the data sets that `read` returns.
    """

    read: Callable[..., LabelledDataset]
    check: Callable[..., Mapping[str, str]] | None = None
    kind: type[LabelledDataset] = PointCloudDataset

    @property
    def clouds(self) -> bool:
        """Whether its samples are point clouds."""
        return issubclass(self.kind, PointCloudDataset)

    def keywords(self) -> dict[str, inspect.Parameter]:
        """Return the keywords of its own: those that `create_dataset` has not.

        Example:
            >>> list(dataset_reader("scanobjectnn").keywords())
            ['variant', 'background']
        """
        try:
            signature = inspect.signature(self.read, eval_str=True)
        except (NameError, AttributeError, SyntaxError, TypeError):  # an annotation of what only type checkers see
            signature = inspect.signature(self.read)
        parameters = signature.parameters.values()
        shared = inspect.signature(create_dataset).parameters
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        own = [*positional[2:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)]
        return {p.name: p for p in own if p.name not in shared and not p.name.startswith("_")}

    def takes(self, keyword: str) -> bool:
        """Tell whether the reader may be called with a keyword: it names it, or takes any."""
        parameters = inspect.signature(self.read).parameters
        return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def ignores(self, keyword: str) -> bool:
        """Tell whether the reader drops a keyword: it takes what it does not name as `**_`."""
        parameters = inspect.signature(self.read).parameters
        others = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
        return keyword not in parameters and any(name.startswith("_") for name in others)

    def problems(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return by keyword what `check` finds wrong with values of its own keywords; the others have their default."""
        defaults = {key: parameter.default for key, parameter in self.keywords().items()}
        return dict(self.check(**{**defaults, **values})) if self.check else {}


_DATASETS: dict[str, Reader] = {
    "files": Reader(load_scans, check_scans),
    "modelnet40": Reader(load_modelnet40),
    "scanobjectnn": Reader(load_scanobjectnn, check_keywords),
    "shapes": Reader(load_shapes),
}


def list_datasets() -> list[str]:
    """List the names that `create_dataset` knows.

    Example:
        >>> "modelnet40" in list_datasets()
        True
    """
    return sorted(_DATASETS)


def dataset_reader(name: str) -> Reader:
    """Return how a data set is read.

    Raises:
        InputError: unknown name.
    """
    if name not in _DATASETS:
        known = ", ".join(list_datasets())
        raise InputError(f"unknown data set '{name}'{did_you_mean(name, _DATASETS)} (known: {known})")
    return _DATASETS[name]


def datasets_with(keyword: str) -> list[str]:
    """List the data sets whose reader has a keyword of this name.

    Example:
        >>> datasets_with("variant")
        ['scanobjectnn']
    """
    return [name for name in list_datasets() if keyword in _DATASETS[name].keywords()]


def register_dataset(
    name: str,
    read: Callable[..., LabelledDataset],
    check: Callable[..., Mapping[str, str]] | None = None,
    *,
    kind: type[LabelledDataset] = PointCloudDataset,
) -> None:
    """Make a data set of your own known to `create_dataset` and configs, in this process.

    Args:
        name: new, for `create_dataset` and `data.name`.
        read: called as `read(root, split, **keywords)` with the keywords of `create_dataset`: takes what it needs, and
            `**_` for the others. Further keywords with defaults are its own: each is a config key under `data`, whose
            type is that of its annotation or else of its default. Its points are z up. It is given `channels` only
            where more than "xyz" is asked for, and hands them to `PointCloudDataset`.
        check: called with its own keywords when a config is read; returns by keyword what is wrong with a value. For
            ranges and for values that do not go together; types are checked before.
        kind: class of the data sets that `read` returns. For another one than point clouds, the config keys of clouds
            (`data.num_points`, `channels`, `up_axis`, `normalize`, `augment`, `eval.votes`) are refused; the reader
            gives the training split its augmentation itself.

    Raises:
        InputError: the name is taken, or a keyword of its own has no default.

    Example:
        >>> import torch
        >>> def read(root, split, *, num_points, transform=None, copies=2, **_):
        ...     points, labels = torch.rand(2 * copies, 64, 3), torch.tensor([0, 1] * copies)
        ...     options = dict(split=split, num_points=num_points, transform=transform)
        ...     return PointCloudDataset(points, labels, ["a", "b"], **options)
        >>> register_dataset("noise", read)
        >>> len(create_dataset("noise", "anywhere", "train", num_points=32, copies=3))
        6
        >>> del _DATASETS["noise"]
    """
    if name in _DATASETS:
        raise InputError(f"data set '{name}' exists already; choose another name")
    reader = Reader(read, check, kind)
    for key, parameter in reader.keywords().items():
        if parameter.default is parameter.empty:
            raise InputError(f"data set '{name}': keyword '{key}' of its reader has no default; give it one")
    _DATASETS[name] = reader


def create_dataset(
    name: str,
    root: str | os.PathLike,
    split: str,
    *,
    num_points: int = 1024,
    transform: Transform | None = None,
    channels: str = XYZ,
    up_axis: str | None = None,
    normalize: bool | None = None,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    allow_links: bool = False,
    memory_budget_gb: float = MEMORY_BUDGET_GB,
    labelled: bool = True,
    **own: Any,
) -> LabelledDataset:
    """Read one split of a data set; its points are turned z up.

    Args:
        name: one of `list_datasets()`.
        root: its folder; data/README.md says what it must hold.
        split: "train" or "test".
        num_points: points of a sample, at most those stored.
        transform: augmentation, `transform(points (B, N, C), generator)`, as `build_augmentation` makes it for the
            channels.
        channels: of a point: "xyz", "xyz+normal", "xyz+rgb" or "xyz+normal+rgb". The files must hold them. Normals are
            unit vectors, colours lie in [0, 1].
        up_axis: vertical axis of the stored points, "y" or "z"; by default what the files say.
        normalize: centre each cloud and scale it into the unit sphere; default as published results do, which is
            no for scanobjectnn and yes for all others.
        classes: names of the classes to keep, numbered in this order; default all.
        fraction: share of the training shapes of each class, in (0, 1], at least one; the test split is kept whole.
        seed: chooses that share.
        cache_dir: where farthest-point prefixes are kept, when fewer points are asked for than are stored; by
            default beside the set, or in the user's cache folder when the set is read-only.
        allow_links: follow links that lead out of the folder; otherwise they are refused.
        memory_budget_gb: 10^9 bytes, above 0. The points of a split that take more are not read into memory at once:
            they stay in their files and are read batch by batch, through a cache of this size. Samples are the same.
        labelled: False accepts a set without labels, for a pre-training, where the reader can: class `UNLABELLED` then.
        **own: keywords that only this data set has, such as `variant` of `load_scanobjectnn`.

    Returns:
        A `PointCloudDataset`; of a data set that was registered with another `kind`, that.

    Raises:
        InputError: an unknown name or keyword, a missing or wrong file, a value out of range; a registered reader
            ignores what is asked for, or returns another kind of data set than it declares.

    Example:
        >>> test = create_dataset("modelnet40", "data/modelnet40", "test")  # doctest: +SKIP
        >>> points, label = test[0]  # doctest: +SKIP
    """
    reader = dataset_reader(name)
    known = reader.keywords()
    for key in own:
        if key not in known:
            others = datasets_with(key)
            hint = f"; only {', '.join(others)} {'has' if len(others) == 1 else 'have'}"
            raise InputError(f"data set '{name}' has no {key}{hint if others else did_you_mean(key, known)}")
    for key, text in reader.problems(own).items():
        raise InputError(f"{key}: {text}")
    if num_points < 1:
        raise InputError(f"num_points is {num_points}, must be at least 1")
    if normalize is not None:
        own["normalize"] = normalize
    if allow_links:
        own["allow_links"] = True
    check_channels(channels)
    if channels != XYZ:
        if not reader.takes("channels"):
            text = f"data set '{name}' has no channels beyond xyz, asked for are {channels}"
            raise InputError(f"{text}; set data.channels=xyz")
        own["channels"] = channels
    asked = {"classes": classes is not None, "fraction": fraction != 1, "up_axis": up_axis is not None}
    for key, wanted in asked.items():
        if wanted and reader.ignores(key):
            raise InputError(f"data.{key}: the reader of data set '{name}' ignores it; let it take the keyword '{key}'")
    if not labelled and "labelled" in inspect.signature(reader.read).parameters:
        own["labelled"] = False
    dataset = reader.read(
        root,
        split,
        num_points=num_points,
        transform=transform,
        up_axis=up_axis,
        classes=classes,
        fraction=fraction,
        seed=seed,
        cache_dir=cache_dir,
        memory_budget_gb=memory_budget_gb,
        **own,
    )
    if not isinstance(dataset, reader.kind):
        returned, declared = type(dataset).__name__, reader.kind.__name__
        raise InputError(
            f"data set '{name}': its reader returns a {returned}, not a {declared}; name the class by "
            "register_dataset(..., kind=...)"
        )
    found = getattr(dataset, "channels", XYZ)  # other samples than clouds have none
    if found != channels:
        text = f"{root}: data set '{name}' gives {found}, asked for are {channels}"
        raise InputError(f"{text}; set data.channels={found}")
    return dataset
