"""The task of a run: the loss of a batch, the evaluation of a model, and what of both is logged."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.load import Config
from ..datasets import BatchLoader
from ..evaluation.accuracy import ClassificationReport, evaluate, gather_in_order, score
from ..evaluation.probe import check_labels, probe_model, random_encoder, require_sklearn
from ..evaluation.reconstruction import ReconstructionReport, Report, evaluate_reconstruction
from ..machine import Runtime
from ..models import PointMAEPretrain
from ..runs.log import COLUMNS
from .loaders import Loaders
from .update import CORRECT, LOSS, SAMPLES, BatchLoss


class Task(Protocol):
    """What the trainer asks of a task.

    Attributes:
        loss: takes the network, points (B, N, C) and labels (B,). It returns the mean loss of the batch, 0-d with a
            gradient, and the number of correct samples, 0-d.
    """

    loss: BatchLoss

    def evaluate(self, model: nn.Module, loader: BatchLoader, votes: int = 1) -> Report:
        """Score a model on a loader; every rank takes part."""

    def score(self, model: nn.Module, loader: BatchLoader) -> tuple[Report, Tensor | None]:
        """Do as `evaluate`; return also the logits (n, num_classes) of all ranks, None without classes."""

    def class_names(self, names: Sequence[str]) -> list[str]:
        """Return the classes of the model on data with classes `names`."""

    def columns(self, split: str, report: Report) -> dict[str, float]:
        """Return an evaluation on a split, "val" or "test", as values of log.csv."""

    def shown(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the values of the progress display, from sums that are indexed as in `update`."""

    def check(self, data: Loaders) -> None:
        """Raise InputError if the task cannot use this data."""

    def finish(self, model: nn.Module, kept: str, reports: dict[str, Report], data: Loaders) -> None:
        """Add to `reports` what is measured of the final model alone, whose form is `kept`."""


class Classification:
    """Classification by cross-entropy, scored by accuracy."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Read label smoothing, precision and progress display from the config of the run."""
        self.loss: BatchLoss = partial(
            classification_loss, label_smoothing=config.train.label_smoothing, bf16=config.train.amp == "bf16"
        )
        self._device, self._progress = runtime.device, runtime.is_main and config.log.progress

    def evaluate(self, model: nn.Module, loader: BatchLoader, votes: int = 1) -> ClassificationReport:
        """Score a model on a loader; every rank takes part."""
        return evaluate(model, loader, device=self._device, votes=votes, progress=self._progress)

    def score(self, model: nn.Module, loader: BatchLoader) -> tuple[ClassificationReport, Tensor]:
        """Do as `evaluate`; return also the logits (n, num_classes) of all ranks, in the order of the set."""
        report, outputs = score(model, loader, device=self._device, progress=self._progress)
        return report, torch.cat(gather_in_order(outputs, loader.world_size))

    def class_names(self, names: Sequence[str]) -> list[str]:
        """Return the classes of the model: those of the data."""
        return list(names)

    def columns(self, split: str, report: Report) -> dict[str, float]:
        """Return the accuracies that log.csv has columns for."""
        assert isinstance(report, ClassificationReport)
        values = {f"{split}_oa": report.oa, f"{split}_macc": report.macc}
        return {column: value for column, value in values.items() if column in COLUMNS["classify"]}

    def shown(self, sums: Sequence[float]) -> dict[str, float]:
        """Return loss and accuracy so far."""
        return {"loss": sums[LOSS] / sums[SAMPLES], "oa": sums[CORRECT] / sums[SAMPLES]}

    def check(self, data: Loaders) -> None:
        """Accept any data with labels."""

    def finish(self, model: nn.Module, kept: str, reports: dict[str, Report], data: Loaders) -> None:
        """Add nothing."""


class Pretraining:
    """Masked autoencoding: the model returns its loss. Labels are not used."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Read precision, evaluation and progress display from the config of the run."""
        self._config = config
        self.loss: BatchLoss = partial(pretraining_loss, bf16=config.train.amp == "bf16")
        self._device, self._progress = runtime.device, runtime.is_main and config.log.progress

    def evaluate(self, model: nn.Module, loader: BatchLoader, votes: int = 1) -> ReconstructionReport:
        """Reconstruct the clouds of a loader under pinned masks; every rank takes part."""
        assert votes == 1, "refused by the config"
        network = cast(PointMAEPretrain, model)
        return evaluate_reconstruction(network, loader, device=self._device, progress=self._progress)

    def score(self, model: nn.Module, loader: BatchLoader) -> tuple[ReconstructionReport, None]:
        """Do as `evaluate`; there are no logits."""
        return self.evaluate(model, loader), None

    def class_names(self, names: Sequence[str]) -> list[str]:
        """Return no class: the model has none."""
        return []

    def columns(self, split: str, report: Report) -> dict[str, float]:
        """Return the loss."""
        return {f"{split}_loss": report.loss}

    def shown(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the loss so far."""
        return {"loss": sums[LOSS] / sums[SAMPLES]}

    def check(self, data: Loaders) -> None:
        """Check that a linear probe can be fitted at the end, if the config asks for one.

        Raises:
            InputError: it cannot.
        """
        if not self._config.eval.probe:
            return
        require_sklearn()
        check_labels(data.plain_train.dataset, "eval.probe", "set eval.probe=false, or name labelled data")

    def finish(self, model: nn.Module, kept: str, reports: dict[str, Report], data: Loaders) -> None:
        """Fit linear probes to the features of the final model and of the random encoder, if the config asks for it."""
        if not self._config.eval.probe:
            return
        config, train = self._config, data.plain_train.dataset
        size = config.eval.batch_size
        kwargs = {**config.model.kwargs, "in_channels": config.in_channels}
        fresh = random_encoder(config.model.name, kwargs, train, seed=config.seed, device=self._device, batch_size=size)
        reports["initial"] = self.evaluate(fresh, data.scored)
        for form, network in ((kept, model), ("initial", fresh)):
            probe = probe_model(
                network, train, data.scored.dataset, device=self._device, batch_size=size, progress=self._progress
            )
            reports[form] = dataclasses.replace(cast(ReconstructionReport, reports[form]), probe=probe)


def task_of(config: Config, runtime: Runtime) -> Task:
    """Return the task that a config names."""
    return Classification(config, runtime) if config.task == "classify" else Pretraining(config, runtime)


def classification_loss(
    network: nn.Module, points: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a batch and the number of samples classified correctly.

    Args:
        network: points -> logits (B, num_classes).
        points: (B, N, C), on the device of the network.
        labels: (B,) int64.
        label_smoothing: in [0, 1).
        bf16: run the forward pass under autocast; the loss is computed in float32.

    Example:
        >>> loss, correct = classification_loss(nn.Identity(), torch.eye(2), torch.tensor([0, 0]))
        >>> int(correct)
        1
    """
    with torch.autocast(points.device.type, torch.bfloat16, enabled=bf16):
        logits = network(points)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    return loss, (logits.detach().argmax(1) == labels).sum()


def pretraining_loss(
    network: nn.Module, points: Tensor, labels: Tensor, *, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the loss of a pre-training model, and 0 samples classified correctly.

    Args:
        network: points -> loss, 0-d.
        points: (B, N, C), on the device of the network.
        labels: not used.
        bf16: run the forward pass under autocast.

    Example:
        >>> from s2d3d import create_model
        >>> model = create_model("point_mae_pretrain_tiny")
        >>> loss, correct = pretraining_loss(model, torch.rand(2, 64, 3), torch.zeros(2))
        >>> loss.shape, int(correct)
        (torch.Size([]), 0)
    """
    with torch.autocast(points.device.type, torch.bfloat16, enabled=bf16):
        loss = network(points)
    return loss.float(), loss.new_zeros((), dtype=torch.int64)
