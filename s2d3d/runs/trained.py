"""A trained model, opened from its checkpoint: the model, its config, its classes and its data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.data import build_dataset, check_classes
from ..config.load import Config, parse_config
from ..datasets import PointCloudDataset
from .checkpoint import build_model, load_checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its checkpoint and config.

    Attributes:
        path: path of the checkpoint, used in error messages.
        payload: the content of the checkpoint, see `load_checkpoint`.
        config: of its run, with the overrides.
        model: in eval mode.
    """

    path: str
    payload: dict[str, Any]
    config: Config
    model: nn.Module

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the logits."""
        return self.payload["class_names"]

    def dataset(self, split: str = "test") -> PointCloudDataset:
        """Read a split of the data set that the config names.

        Raises:
            InputError: the data set cannot be read, or its classes differ from those of the model.
        """
        dataset = build_dataset(self.config.data, split, seed=self.config.seed)
        check_classes(dataset, self.class_names, self.path)
        return dataset


def open_trained(
    path: str | Path, overrides: Sequence[str] = (), *, device: torch.device | str = "cpu", merge: bool = False
) -> TrainedModel:
    """Open a checkpoint: build its model and parse the config of its run. No data is read.

    Args:
        path: a checkpoint, sparse or dense.
        overrides: changes to the config, as `section.key=value`.
        device: device of the model.
        merge: merge the experts into dense FFNs.

    Raises:
        InputError: the checkpoint or an override cannot be read, or `merge` is set and the experts have a router.

    Example:
        >>> trained = open_trained("runs/demo/merged.pt")  # doctest: +SKIP
        >>> trained.model(trained.dataset().batch(torch.arange(2), augment=False)[0]).shape  # doctest: +SKIP
        torch.Size([2, 12])
    """
    payload = load_checkpoint(path)
    config = parse_config(payload["config"], where=str(path), overrides=overrides)
    model = build_model(payload, where=str(path), merge=merge).to(device)
    return TrainedModel(str(path), payload, config, model)
