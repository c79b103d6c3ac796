"""The part of an update before the optimizer step: the gradient of a global batch, and a check that it is finite."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..datasets import BatchLoader

LOSS, CORRECT, SAMPLES, NORM, BALANCE, DROPPED = range(6)
"""Indices into the sums of an epoch. The last two exist only with routers."""
SHOWN_NAMES, SHOWN_INDICES = 8, 64
BatchLoss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes network, points and labels; returns the mean loss and the number of correct samples."""


def accumulate_gradient(
    network: nn.Module,
    points: Tensor,
    labels: Tensor,
    *,
    sums: Tensor,
    loss: BatchLoss,
    num_parts: int = 1,
    parallel: DistributedDataParallel | None = None,
    extra_loss: Callable[[float], Tensor] | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Add the gradient of one global batch's loss to the parameters, one part of the batch after another.

    Args:
        network: the model, or its wrapper.
        points: (B, N, C), this rank's share of the batch, on the device of the model.
        labels: (B,) int64.
        sums: float64 sums of the epoch. Loss, correct predictions and samples are added in place.
        loss: the loss of a part of the batch, such as `classification_loss`.
        num_parts: number of parts of about equal size. Their gradients sum to the gradient of the whole batch.
        parallel: the wrapper that averages gradients over ranks. It does so once, with the last part.
        extra_loss: takes a part's share of the batch, in (0, 1], and returns a loss of its forward pass to add.
        weight: factor on this rank's gradient, see `BatchLoader.weight`.

    Returns:
        The mean loss over this rank's samples, without `extra_loss` and `weight`, detached.

    Example:
        >>> from s2d3d.training.task import classification_loss
        >>> model, sums, labels = nn.Linear(3, 2), torch.zeros(4, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
        >>> loss = accumulate_gradient(model, torch.rand(4, 3), labels, sums=sums, loss=classification_loss)
        >>> float(sums[SAMPLES]), model.weight.grad.shape
        (4.0, torch.Size([2, 3]))
    """
    total = torch.zeros((), device=points.device)
    parts = [part for part in zip(points.tensor_split(num_parts), labels.tensor_split(num_parts)) if len(part[1])]
    for index, (part, target) in enumerate(parts):
        last = index == len(parts) - 1
        with contextlib.nullcontext() if last or parallel is None else parallel.no_sync():
            mean, correct = loss(network, part, target)
            share = len(target) / len(labels)
            weighted = mean * share
            own = weighted if weight == 1 else weighted * weight
            (own if extra_loss is None else own + extra_loss(share)).backward()
        total += weighted.detach()
        sums[CORRECT] += correct
    sums[LOSS] += total.double() * len(labels)
    sums[SAMPLES] += len(labels)
    return total


def clip_gradient_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients in place so that their norm together is at most `max_norm`; return the norm before.

    As `nn.utils.clip_grad_norm_`, bit for bit. On a CPU gradients that are small enough are left alone, instead of read
    and written once more to be multiplied by 1.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: greater than 0; infinite clips nothing.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradient_([weight], 10.0), weight.grad
        (tensor(5.), tensor([3., 4.]))
    """
    given = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in given if p.grad is not None], foreach=True)
    # The factor as torch computes it. On a GPU reading it would synchronise; NaN scales, as there.
    has_value = type(norm) is Tensor and norm.device.type == "cpu"
    if not has_value or not max_norm / (norm + 1e-6) >= 1:
        nn.utils.clip_grads_with_norm_(given, max_norm, norm, foreach=True)
    return norm


class FiniteWatch:
    """Records the first update with a non-finite loss or gradient, without synchronising with the device.

    Example:
        >>> watch = FiniteWatch(torch.device("cpu"))
        >>> for update, loss in enumerate([0.5, float("nan"), 0.5]):
        ...     watch.note(torch.tensor(loss), torch.tensor(1.0), update)
        >>> watch.first_bad()
        1
    """

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)

    def note(self, loss: Tensor, grad_norm: Tensor, update: int) -> None:
        """Check the loss and the gradient norm, both 0-d, of update number `update`."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self._bad = torch.where(bad & (self._bad < 0), update, self._bad)

    def first_bad(self) -> int | None:
        """Return the number of the first non-finite update, None without one. Synchronises with the device."""
        update = int(self._bad)
        return update if update >= 0 else None


def nonfinite_message(loader: BatchLoader, update: int, last_good: Path | str) -> str:
    """Return an error message with the non-finite update and the shapes in this process's batch.

    Args:
        loader: of the training set.
        update: number of the update, from 0.
        last_good: the last checkpoint with finite weights.
    """
    epoch, step = divmod(update, len(loader))
    indices = loader.indices(epoch, step).tolist()
    names = [loader.dataset.names[index] for index in indices[:SHOWN_NAMES]]
    more = f" and {len(indices) - len(names)} more" if len(indices) > len(names) else ""
    listed = ", ".join(map(str, indices[:SHOWN_INDICES])) + (", ..." if len(indices) > SHOWN_INDICES else "")
    return (
        f"loss or gradient is not finite at update {update + 1} (epoch {epoch + 1}); "
        f"last good checkpoint: {last_good}; lower optim.lr or optim.clip_grad, or look at "
        f"its batch: {', '.join(names)}{more} ({loader.dataset.noun} {listed} of split '{loader.dataset.split}')"
    )
