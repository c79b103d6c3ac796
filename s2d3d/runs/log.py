"""What a run notes of an epoch: a row of log.csv, and a line on the screen."""

from datetime import timedelta
from typing import Any

from torch import Tensor, nn

from ..s2d.analysis import expert_divergence
from .resume import Progress

LOG_COLUMNS = (
    "epoch", "updates", "lr", "share_rate", "divergence", "train_loss", "train_oa", "grad_norm",
    "balance_loss", "dropped", "val_oa", "test_oa", "test_macc", "seconds",
)  # fmt: skip


def epoch_row(
    progress: Progress,
    sums: Tensor,
    *,
    lr: float,
    share_rate: float,
    steps_per_epoch: int,
    sparse_model: nn.Module | None = None,
) -> dict[str, Any]:
    """Return what the training of an epoch says; accuracies of evaluations are added by the caller.

    Args:
        progress: when the last update of the epoch is done, before the epoch counts as completed.
        sums: of the epoch over all ranks, places as in `update`.
        lr: of the last update.
        share_rate: of the last update.
        steps_per_epoch: updates.
        sparse_model: whose experts' divergence is noted.
    """
    loss, correct, samples, norms, *routing = sums.tolist()
    row: dict[str, Any] = {
        "epoch": progress.epoch + 1, "updates": progress.updates, "lr": lr, "share_rate": share_rate,
        "train_loss": loss / samples, "train_oa": correct / samples, "grad_norm": norms / steps_per_epoch,
        "seconds": progress.seconds,
    }  # fmt: skip
    if sparse_model is not None:
        by_layer = expert_divergence(sparse_model)
        row["divergence"] = sum(by_layer.values()) / len(by_layer)
    if routing:
        row["balance_loss"], row["dropped"] = (total / steps_per_epoch for total in routing)
    return row


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Word a row of a run of `epochs` epochs, with the time left if all take as long as this one."""
    left = str(timedelta(seconds=round(row["seconds"] * (epochs - row["epoch"]))))
    tested = "".join(f", {key} {100 * row[key]:.2f} %" for key in ("val_oa", "test_oa") if key in row)
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, "
        f"train_oa {100 * row['train_oa']:.2f} %{tested}, "
        f"lr {row['lr']:.2e}, share_rate {row['share_rate']:.3f}, {row['seconds']:.0f} s, {left} left"
    )
