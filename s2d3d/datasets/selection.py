"""Selecting shapes of a data set: classes, fractions, and a validation part."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import InputError, did_you_mean
from ..random_state import derived_generator
from .labelled import TRAIN, LabelledDataset

Set = TypeVar("Set", bound=LabelledDataset)


def split_train_validation(dataset: Set, fraction: float, seed: int = 0) -> tuple[Set, Set]:
    """Set part of a training set aside for validation, the same share of each class.

    Args:
        dataset: the training set.
        fraction: share of each class, in (0, 1), rounded; every class of two or more shapes keeps at least one
            in training.
        seed: chooses the shapes; the same seed always chooses the same.

    Returns:
        The training part, and the validation part: split "val", no transform, sampled like a test set.

    Raises:
        InputError: `fraction` is out of range, or leaves one of the parts empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction is {fraction}, must be between 0 and 1")
    groups = _shuffled_classes(dataset.labels, seed)
    held_out = torch.cat([members[: min(round(len(members) * fraction), len(members) - 1)] for members in groups])
    if len(held_out) == 0:
        raise InputError(
            f"validation fraction {fraction} of {len(dataset)} {dataset.noun} is less than one of any class; raise it"
        )
    is_held_out = torch.zeros(len(dataset), dtype=torch.bool)
    is_held_out[held_out] = True
    validation = dataset.subset(is_held_out.nonzero())
    validation.split, validation.transform = "val", None
    return dataset.subset((~is_held_out).nonzero()), validation


def stratified_fraction(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose a share of the shapes of each class, at least one.

    Args:
        labels: (n,) int64.
        fraction: in (0, 1].
        seed: chooses the shapes. A smaller fraction of the same seed is contained in a larger.

    Returns:
        (m,) int64 indices, ascending.

    Raises:
        InputError: `fraction` is out of range.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is {fraction}, must be above 0 and at most 1")
    chosen = [members[: max(1, round(len(members) * fraction))] for members in _shuffled_classes(labels, seed)]
    return torch.cat(chosen).sort().values


def select_classes(labels: Tensor, class_names: Sequence[str], classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Keep the shapes of some classes and number these in the order given.

    Args:
        labels: (n,) int64.
        class_names: what the labels mean.
        classes: the names to keep.

    Returns:
        (m,) int64 indices, ascending, and their (m,) new labels.

    Raises:
        InputError: an unknown or repeated name, or none.
    """
    if not classes:
        raise InputError("classes is empty, name at least one")
    renumber = torch.full((len(class_names),), -1)
    for new, name in enumerate(classes):
        if name not in class_names:
            raise InputError(f"unknown class '{name}'{did_you_mean(name, class_names)}")
        if name in classes[:new]:
            raise InputError(f"class '{name}' is named twice")
        renumber[list(class_names).index(name)] = new
    new_labels = renumber[labels]
    kept = (new_labels >= 0).nonzero().flatten()
    return kept, new_labels[kept]


def choose_shapes(
    labels: Tensor,
    class_names: Sequence[str],
    *,
    split: str,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, list[str]]:
    """Apply `classes` and, to the training split, `fraction`, as `create_dataset` describes them.

    Returns:
        (m,) int64 indices of the shapes to keep, ascending; their (m,) labels; the names of the classes.

    Raises:
        InputError: see `select_classes` and `stratified_fraction`.
    """
    kept = torch.arange(len(labels))
    if classes is not None:
        kept, labels = select_classes(labels, class_names, classes)
    if split == TRAIN and fraction != 1.0:
        share = stratified_fraction(labels, fraction, seed)
        kept, labels = kept[share], labels[share]
    return kept, labels, list(class_names if classes is None else classes)


def _shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    """Return the shuffled indices of each class that occurs; the order in a class depends on the seed and the class."""
    groups = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        groups.append(members[torch.randperm(len(members), generator=derived_generator(seed, "class", label))])
    return groups
