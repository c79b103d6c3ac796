"""The log of a run: a row of log.csv and a line on the screen for each epoch. `read_log` reads the rows."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..s2d.analysis import expert_divergence
from .resume import Progress

LOG_COLUMNS = (
    "epoch", "updates", "lr", "share_rate", "divergence", "train_loss", "train_oa", "grad_norm",
    "balance_loss", "dropped", "val_oa", "test_oa", "test_macc", "seconds",
)  # fmt: skip
COLUMNS = {
    "classify": LOG_COLUMNS,
    "pretrain": (
        "epoch", "updates", "lr", "share_rate", "divergence", "train_loss", "grad_norm", "balance_loss", "dropped",
        "val_loss", "test_loss", "seconds",
    ),
}  # fmt: skip
"""Columns of log.csv by the task of a run."""


def epoch_row(
    progress: Progress,
    sums: Tensor,
    *,
    lr: float,
    share_rate: float,
    steps_per_epoch: int,
    sparse_model: nn.Module | None = None,
    task: str = "classify",
) -> dict[str, Any]:
    """Return the training values of an epoch as a row of log.csv. The caller adds evaluations.

    Args:
        progress: state after the last update of the epoch, before the epoch is counted as completed.
        sums: sums of the epoch over all ranks, indexed as in `update`.
        lr: of the last update.
        share_rate: of the last update.
        steps_per_epoch: number of updates in an epoch.
        sparse_model: model whose expert divergence is added to the row.
        task: of the run, a key of `COLUMNS`.
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
    return {column: value for column, value in row.items() if column in COLUMNS[task]}


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return a row as a line of text, with the time left if each of the remaining epochs takes as long as this one."""
    left = str(timedelta(seconds=round(row["seconds"] * (epochs - row["epoch"]))))
    shares = "".join(f", {key} {100 * row[key]:.2f} %" for key in ("train_oa", "val_oa", "test_oa") if key in row)
    losses = "".join(f", {key} {row[key]:.6f}" for key in ("val_loss", "test_loss") if key in row)
    loss = f"{row['train_loss']:.4f}" if "train_oa" in row else f"{row['train_loss']:.6f}"  # small without classes
    return (
        f"epoch {row['epoch']}/{epochs}: loss {loss}{shares}{losses}, "
        f"lr {row['lr']:.2e}, share_rate {row['share_rate']:.3f}, {row['seconds']:.0f} s, {left} left"
    )


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Read log.csv: a row of numbers for each epoch. Values that are empty, text or not finite are left out.

    Raises:
        InputError: the file is missing, is not CSV, or has a row without an epoch number.

    Example:
        >>> read_log("runs/demo/log.csv")[0]["epoch"]  # doctest: +SKIP
        1.0
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; tools/train.py writes it into the run folder") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from None
    log = [{key: value for key, text in row.items() if (value := _number(text)) is not None} for row in rows]
    for number, row in enumerate(log, 2):
        if "epoch" not in row:
            raise InputError(
                f"{path}: line {number} has no number in column 'epoch'; it is damaged, or no log of s2d3d"
            )
    return log


def training_throughput(log: Sequence[Mapping[str, float]], batch_size: int) -> float | None:
    """Return the training throughput in clouds per second: the median over the epochs, None without epochs.

    Args:
        log: rows with `updates` (in total) and `seconds` (of the epoch).
        batch_size: clouds per update.

    Example:
        >>> training_throughput([{"updates": 10, "seconds": 2.0}, {"updates": 20, "seconds": 4.0}], batch_size=32)
        120.0
    """
    speeds, before = [], 0.0
    for row in log:
        updates, seconds = row.get("updates", 0.0), row.get("seconds", 0.0)
        if updates > before and seconds > 0:
            speeds.append(batch_size * (updates - before) / seconds)
            before = updates
    return statistics.median(speeds) if speeds else None


def _number(text: str | list[str] | None) -> float | None:
    if not isinstance(text, str):  # a row with fewer or more values than columns
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
