"""What makes a checkpoint the continuation of a run: its progress, and a config that agrees."""

import contextlib
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.compare import SAME_WEIGHTS, differences
from ..config.load import Config, parse_config
from ..datasets import same_data
from ..datasets.labelled import Fingerprint
from ..errors import InputError, UnreadableError, printable
from .checkpoint import load_checkpoint
from .folder import RunFolder, find_checkpoint

logger = logging.getLogger(__name__)

TRAINING_KEYS = ("optimizer", "ewa", "ema", "progress", "sums", "history", "rng")
"""What a checkpoint of a run under way holds beside the model."""


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Optimizer updates completed in the epoch under way."""
    updates: int = 0
    """Optimizer updates completed in all."""
    seconds: float = 0.0
    """Training time of the epoch under way, without evaluation."""
    best: float | None = None
    """Best selection score so far, see `selection_score`."""
    best_epoch: int = 0
    """The epoch of that score, the first one of a tie; 0 before the first."""

    def select(self, row: dict[str, Any]) -> bool:
        """Tell whether the epoch of this row of the log is the best so far, and remember it if it is."""
        score = selection_score(row)
        if self.best is not None and score <= self.best:
            return False
        self.best, self.best_epoch = score, row["epoch"]
        return True

    def is_best(self) -> bool:
        """Tell whether the epoch that has just ended is the best one so far, as `select` has decided."""
        return self.step == 0 and self.epoch > 0 and self.epoch == self.best_epoch


def selection_score(row: dict[str, Any]) -> float:
    """Return what the best epoch is chosen by: validation OA, else the negative validation or training loss."""
    return row["val_oa"] if "val_oa" in row else -row.get("val_loss", row["train_loss"])


def read_run(path: str | Path, *, warn: bool = True) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint to continue from; in a run folder whose last one is damaged, the one before it.

    Args:
        path: a checkpoint, or a run folder.
        warn: log a warning when it is the one before; one process of several is enough.

    Returns:
        The file that was read, and its content.

    Raises:
        InputError: there is none, it cannot be read, or neither of the two can.
    """
    checkpoint, folder = find_checkpoint(path), RunFolder(path)
    reason = f"{folder.last}: no such file"
    if checkpoint != folder.previous:
        try:
            return checkpoint, load_checkpoint(checkpoint)
        except UnreadableError as error:
            before = checkpoint.with_name(folder.previous.name)
            if checkpoint.name == folder.last.name and before.is_file() and checkpoint != folder.last:
                raise UnreadableError(f"{error}; the checkpoint before it is {before}") from error
            if checkpoint != folder.last or not folder.previous.is_file():
                raise
            reason = str(error)
    state = load_checkpoint(folder.previous)
    if warn:
        logger.warning(f"warning: {reason}; continuing from the checkpoint before it, {folder.previous}")
    return folder.previous, state


@contextlib.contextmanager
def restoring(where: str) -> Iterator[None]:
    """Turn what a training state of another shape causes inside into an InputError that names its file."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise InputError(f"{where}: its training state cannot be what s2d3d wrote ({reason})") from error


def check_same_run(state: dict[str, Any], config: Config, path: Path) -> None:
    """Refuse to continue a run under another config.

    Args:
        state: the checkpoint that was read from `path`.
        config: of the run that wants to continue it.
        path: for the message.

    Raises:
        InputError: the checkpoint holds no training state, or a key outside `SAME_WEIGHTS` differs. More epochs are
            allowed where the schedules are constant.
    """
    if any(key not in state for key in TRAINING_KEYS):
        raise InputError(f"{path}: holds a model but no training state; resume from checkpoints/last.pt")
    # Parsed, so that a key that came after the checkpoint has its default on both sides.
    stored = parse_config(state["config"], where=str(path))
    for key, (theirs, ours) in sorted(differences(stored.to_dict(), config.to_dict(), SAME_WEIGHTS).items()):
        if key == "train.epochs" and ours > theirs:
            if _can_be_extended(stored):
                continue
            start = f"{shlex.quote(f'model.pretrained={path.parent.parent}/merged.pt')}, another output_dir"
            raise InputError(
                f"{path}: its schedule ends with epoch {theirs}, so it cannot go on to {ours}; start a new run from "
                f"its weights: {start} and train.epochs={ours - theirs}"
            )
        if key == "train.epochs":
            raise InputError(f"{path}: is of a run of {theirs} epochs, {ours} are fewer; epochs can only be added")
        raise InputError(
            f"{path}: was trained with {key}={theirs!r}, the config says {ours!r}; "
            "resume with the run's own config.yaml"
        )


def _can_be_extended(config: Config) -> bool:
    """Return whether the epochs of a run do not depend on how many follow: with constant schedules."""
    s2d = config.s2d
    averaging = s2d.kind == "none" or (s2d.schedule == "constant" and s2d.stop_fraction == 1)
    return config.optim.schedule == "constant" and averaging


def check_same_data(
    state: dict[str, Any],
    progress: Progress,
    where: str,
    *,
    root: str,
    steps_per_epoch: int,
    fingerprint: Fingerprint,
    world_size: int,
) -> None:
    """Refuse to continue a run on other clouds, or with another number of processes.

    Args:
        state: the checkpoint.
        progress: as it holds it.
        where: for the message; as `root`, where the data of this run is.
        steps_per_epoch: updates of an epoch of this run.
        fingerprint: of its training set.
        world_size: its processes.

    Raises:
        InputError: they differ.
    """
    done = progress.epoch * steps_per_epoch + progress.step
    if progress.updates != done or progress.step > steps_per_epoch:
        raise InputError(f"{where}: was trained on more or fewer shapes than {root} has; resume on its own data")
    if "data" in state and not same_data(state["data"], fingerprint):
        raise InputError(
            f"{where}: was trained on other clouds than those in {root}, or its test files have changed; "
            "resume on its own data"
        )
    ranks = state["rng"]
    if isinstance(ranks, list) and ranks and len(ranks) != world_size:
        raise InputError(f"{where}: was written by {len(ranks)} processes, this run has {world_size}")
