"""The task of a run: the loss of a batch, and the evaluation of a model."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.load import Config
from ..datasets import BatchLoader
from ..evaluation.accuracy import ClassificationReport, evaluate
from ..machine import Runtime


class Classification:
    """Classification by cross-entropy, scored by accuracy.

    The trainer uses only `loss` and `evaluate` of its task.

    Attributes:
        loss: takes the network, points (B, N, C) and labels (B,). It returns the mean loss of the batch, 0-d with a
            gradient, and the number of correct samples, 0-d.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Read label smoothing, precision and progress display from the config of the run."""
        self.loss = partial(
            classification_loss, label_smoothing=config.train.label_smoothing, bf16=config.train.amp == "bf16"
        )
        self._device, self._progress = runtime.device, runtime.is_main and config.log.progress

    def evaluate(self, model: nn.Module, loader: BatchLoader, votes: int = 1) -> ClassificationReport:
        """Score a model on a loader; every rank takes part."""
        return evaluate(model, loader, device=self._device, votes=votes, progress=self._progress)


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
