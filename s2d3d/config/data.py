"""Data sets and loaders from the `data` section of a config."""

from collections.abc import Sequence
from pathlib import Path

from ..datasets import BatchLoader, LabelledDataset, build_augmentation, create_dataset
from ..errors import InputError, first_difference
from .schema import DataConfig


def build_dataset(data: DataConfig, split: str, *, seed: int, labelled: bool = True) -> LabelledDataset:
    """Read one split as configured; augmentation and fraction apply to the training split.

    Args:
        data: config section.
        split: "train" or "test".
        seed: of the fraction.
        labelled: labels are needed; see `create_dataset`.
    """
    training = split == "train"
    return create_dataset(
        data.name,
        data.root,
        split,
        num_points=data.num_points,
        transform=build_augmentation(**data.augment.model_dump(), channels=data.channels) if training else None,
        channels=data.channels,
        up_axis=data.up_axis,
        normalize=data.normalize,
        classes=data.classes,
        fraction=data.fraction if training else 1.0,
        seed=seed,
        cache_dir=data.cache_dir,
        allow_links=data.allow_links,
        memory_budget_gb=data.memory_budget_gb,
        labelled=labelled,
        **data.kwargs,
    )


def check_classes(dataset: LabelledDataset, class_names: Sequence[str], checkpoint: str | Path) -> None:
    """Raise InputError if the classes of a data set differ from those of a model.

    Args:
        dataset: data set for the evaluation of the model.
        class_names: of the model, in the order of its logits.
        checkpoint: path of the model, for the message.

    Raises:
        InputError: number, names or order differ.
    """
    if list(dataset.class_names) != list(class_names):
        counts = f"{len(class_names)} classes, this set has {len(dataset.class_names)}"
        named = f"other classes than this set has ({first_difference(class_names, dataset.class_names)})"
        other = named if len(class_names) == len(dataset.class_names) else counts
        raise InputError(
            f"{dataset.source}: {checkpoint} was trained on {other}; give the data set of its training by data.root=DIR"
        )


def build_test_loader(
    dataset: LabelledDataset, data: DataConfig, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Return a loader in the order of the set. Scale and shift of the training apply to its votes, not to plain passes.

    Args:
        dataset: a split without augmentation.
        data: config section with scale and shift.
        batch_size: clouds of one forward pass of one process.
        seed: of the votes.
        rank: this process, in [0, world_size).
        world_size: number of processes.
    """
    votes = build_augmentation(scale=data.augment.scale, shift=data.augment.shift, channels=data.channels)
    return BatchLoader(dataset, batch_size * world_size, seed=seed, augment=votes, rank=rank, world_size=world_size)
