"""What makes a checkpoint the continuation of a run: its progress, and a config that agrees."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .config import Config, parse_config

MAY_CHANGE = (
    "output_dir", "data.root", "data.cache_dir", "train.device", "train.num_threads", "train.compile",
    "train.checkpoint_every", "train.keep_every", "train.max_steps", "eval", "log",
)  # fmt: skip
"""Config keys that a resumed run may change: they do not alter the trajectory of the weights."""
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
    """Best selection score so far: validation OA, or the training loss with its sign turned."""


def check_same_run(state: dict[str, Any], config: Config, path: Path) -> None:
    """Refuse to continue a run under another config.

    Args:
        state: the checkpoint that was read from `path`.
        config: of the run that wants to continue it.
        path: for the message.

    Raises:
        InputError: the checkpoint holds no training state, or a key outside `MAY_CHANGE` differs.
    """
    if any(key not in state for key in TRAINING_KEYS):
        raise InputError(f"{path}: holds a model but no training state; resume from checkpoints/last.pt")
    # Parsed, so that a key that came after the checkpoint has its default on both sides.
    stored = parse_config(state["config"], where=str(path))
    theirs, ours = _flatten(stored.to_dict()), _flatten(config.to_dict())
    for key in sorted(theirs.keys() | ours.keys()):
        if any(key == free or key.startswith(free + ".") for free in MAY_CHANGE):
            continue
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"{path}: was trained with {key}={theirs.get(key)!r}, the config says {ours.get(key)!r}; "
                "resume with the run's own config.yaml"
            )


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
