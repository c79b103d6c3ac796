"""Data sets: a name and a folder in, clouds (N, 3) z up and labels out."""

import os
from collections.abc import Callable, Sequence
from functools import partial

from ..errors import InputError, did_you_mean
from .base import PointCloudDataset, same_data, split_train_validation
from .loader import BatchLoader
from .modelnet40 import load_modelnet40
from .scanobjectnn import load_scanobjectnn
from .stream import MEMORY_BUDGET_GB
from .transforms import Transform, build_augmentation

__all__ = [
    "BatchLoader",
    "PointCloudDataset",
    "build_augmentation",
    "create_dataset",
    "list_datasets",
    "register_dataset",
    "same_data",
    "split_train_validation",
]

_DATASETS: dict[str, Callable[..., PointCloudDataset]] = {
    "modelnet40": load_modelnet40,
    "scanobjectnn": load_scanobjectnn,
    "shapes": partial(load_modelnet40, prepare="make it with: python tools/prepare_data.py shapes --output"),
}
"""A reader takes (root, split) and the keywords of `create_dataset`."""


def list_datasets() -> list[str]:
    """List the names that `create_dataset` knows.

    Example:
        >>> "modelnet40" in list_datasets()
        True
    """
    return sorted(_DATASETS)


def register_dataset(name: str, read: Callable[..., PointCloudDataset]) -> None:
    """Make a data set of your own known to `create_dataset` and configs, in this process.

    Args:
        name: new, for `create_dataset` and `data.name`.
        read: called as `read(root, split, **keywords)` with the keywords of `create_dataset`: takes what it needs, and
            `**_` for the others. Its points are z up.

    Raises:
        InputError: the name is taken.

    Example:
        >>> import torch
        >>> def read(root, split, *, num_points, transform=None, **_):
        ...     points, labels = torch.rand(4, 64, 3), torch.tensor([0, 1, 0, 1])
        ...     options = dict(split=split, num_points=num_points, transform=transform)
        ...     return PointCloudDataset(points, labels, ["a", "b"], **options)
        >>> register_dataset("noise", read)
        >>> len(create_dataset("noise", "anywhere", "train", num_points=32))
        4
        >>> del _DATASETS["noise"]
    """
    if name in _DATASETS:
        raise InputError(f"data set '{name}' is there already; choose another name")
    _DATASETS[name] = read


def create_dataset(
    name: str,
    root: str | os.PathLike,
    split: str,
    *,
    num_points: int = 1024,
    transform: Transform | None = None,
    up_axis: str | None = None,
    normalize: bool | None = None,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    allow_links: bool = False,
    memory_budget_gb: float = MEMORY_BUDGET_GB,
    variant: str | None = None,
    background: bool | None = None,
) -> PointCloudDataset:
    """Read one split of a data set; its points are turned z up.

    Args:
        name: one of `list_datasets()`.
        root: its folder; data/README.md says what it must hold.
        split: "train" or "test".
        num_points: points of a sample, at most those stored.
        transform: augmentation, `transform(points (B, N, 3), generator)`, as `build_augmentation` makes it.
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
        variant: of scanobjectnn alone, see `load_scanobjectnn`.
        background: of scanobjectnn alone, likewise.

    Raises:
        InputError: an unknown name, a missing or wrong file, a value out of range.

    Example:
        >>> test = create_dataset("modelnet40", "data/modelnet40", "test")  # doctest: +SKIP
        >>> points, label = test[0]  # doctest: +SKIP
    """
    if name not in _DATASETS:
        known = ", ".join(list_datasets())
        raise InputError(f"unknown data set '{name}'{did_you_mean(name, _DATASETS)} (known: {known})")
    own = {"normalize": normalize, "allow_links": allow_links or None, "variant": variant, "background": background}
    own = {key: value for key, value in own.items() if value is not None}
    foreign = [key for key in ("variant", "background") if key in own and name != "scanobjectnn"]
    if foreign:
        raise InputError(f"data set '{name}' has no {foreign[0]}; only scanobjectnn has")
    return _DATASETS[name](
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
