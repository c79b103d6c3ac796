"""The data loaders of a run: training batches, and the data on which models are evaluated."""

import logging
from dataclasses import dataclass

from ..channels import XYZ
from ..config.data import build_dataset, build_test_loader
from ..config.load import Config
from ..datasets import BatchLoader, LabelledDataset, split_train_validation
from ..datasets.orientation import look_turned
from ..errors import InputError, quoted
from ..machine import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaders:
    """This process's share of the data.

    Attributes:
        class_names: in the order of the labels.
        train: the training samples, shuffled and augmented.
        plain_train: all training samples, in order and without augmentation.
        test: the test split.
        val: the validation part of the training split, None without one.
        scored: `test` or `val`, as `eval.split` says.
    """

    class_names: list[str]
    train: BatchLoader
    plain_train: BatchLoader
    test: BatchLoader
    val: BatchLoader | None
    scored: BatchLoader


def build_loaders(
    config: Config, runtime: Runtime, datasets: tuple[LabelledDataset, LabelledDataset] | None = None
) -> Loaders:
    """Read the data that a config describes.

    Args:
        config: of the run.
        runtime: this process and the others.
        datasets: training and test set that replace those of the config.

    Raises:
        InputError: the data is missing or wrong, has one class, its splits have different ones, or `train.batch_size`
            is not divisible by `train.accum_steps` times the number of processes.

    Example:
        >>> import torch
        >>> from s2d3d import load_config
        >>> loaders = build_loaders(load_config("configs/demo.yaml"), Runtime(torch.device("cpu")))  # doctest: +SKIP
        >>> loaders.scored is loaders.test  # doctest: +SKIP
        True
    """
    train, test = datasets or (
        build_dataset(config.data, split, seed=config.seed, labelled=config.task == "classify")
        for split in ("train", "test")
    )
    for dataset in datasets or ():
        found = getattr(dataset, "channels", XYZ)
        if found != config.data.channels:
            text = f"{dataset.source}: its clouds have {found}, data.channels is {config.data.channels}"
            raise InputError(f"{text}; set data.channels={found}")
    if train.class_names != test.class_names:
        raise InputError(f"{config.data.root}: training and test split have different classes")
    if config.task == "classify" and len(train.class_names) < 2:
        found = f"one class, {quoted(train.class_names[0])}, is left to train on"
        raise InputError(f"{config.data.root}: {found}; a classifier needs two, see data.classes")
    if runtime.is_main and look_turned(train, test):
        logger.warning(
            "%s: the test split looks turned against the training split, y for z; check the attribute up_axis of its "
            "files, or set data.up_axis", config.data.root,
        )  # fmt: skip
    validation = None
    if config.data.val_fraction:
        train, validation = split_train_validation(train, config.data.val_fraction, config.seed)
    micro = config.train.accum_steps * runtime.world_size
    if config.train.batch_size % micro:
        raise InputError(
            f"train.batch_size is {config.train.batch_size}, must be divisible by accum_steps x processes = {micro}"
        )
    train_loader = BatchLoader(
        train, config.train.batch_size, shuffle=True, drop_last=config.train.drop_last, seed=config.seed, prefetch=2,
        rank=runtime.rank, world_size=runtime.world_size, pin_memory=runtime.device.type == "cuda",
    )  # fmt: skip

    def in_order(dataset: LabelledDataset) -> BatchLoader:
        return build_test_loader(
            dataset, config.data, batch_size=config.eval.batch_size, seed=config.seed, rank=runtime.rank,
            world_size=runtime.world_size,
        )  # fmt: skip

    test_loader = in_order(test)
    val_loader = in_order(validation) if validation else None
    scored = test_loader
    if config.eval.split == "validation":
        assert val_loader is not None  # a config without data.val_fraction is refused
        scored = val_loader
    size = max(2, config.eval.batch_size)  # BatchNorm needs two clouds: a last batch of one is dropped
    plain = BatchLoader(train, size, augment=False, drop_last=len(train) % size == 1)
    return Loaders(train.class_names, train_loader, plain, test_loader, val_loader, scored)
