"""Files that a model was trained on are not scored: they are told by hashes of their content in its checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..datasets import LabelledDataset
from ..datasets.scans import count_trained
from ..errors import InputError

log = logging.getLogger(__name__)


def refuse_trained(
    dataset: LabelledDataset, origin: Mapping[str, Any], where: str | Path, *, advice: str, part: str = "test"
) -> None:
    """Refuse a set to be scored that holds files of a model's training.

    A warning is enough for a pre-training, which has not seen their labels, for files to validate, which the lists of
    older checkpoints hold, and for a model of class folders that does not name its files, as older ones.

    Args:
        dataset: the set.
        origin: what the model's checkpoint says of it, see `load_checkpoint`; its weights are not needed.
        where: names the checkpoint in messages.
        advice: what to do; ends the message.
        part: what the set is for, "test" or "validation".

    Raises:
        InputError: the model was trained on files of the test set and their labels.
    """
    if not dataset.file_hashes or _is_silent(origin, where):
        return
    if known := dataset.count_trained(origin["trained_files"]):
        text = f"{dataset.source}: {known} of its {len(dataset)} {part} files were trained on by {where}"
        if origin.get("class_names") and part == "test":
            raise InputError(f"{text}, {advice}")
        log.warning("%s%s", text, "" if origin.get("class_names") else ", without their labels")


def warn_of_trained(files: Sequence[Path], origin: Mapping[str, Any], where: str | Path) -> None:
    """Warn if files to be scored are of a model's training, or if it does not name its files; see `refuse_trained`."""
    if _is_silent(origin, where):
        return
    if known := count_trained(files, origin["trained_files"]):
        text = "%d of these %d files were trained on by %s; this is not its accuracy on new files"
        log.warning(text, known, len(files), where)


def _is_silent(origin: Mapping[str, Any], where: str | Path) -> bool:
    """Return whether a model names no files; warn if it was trained on some."""
    if "trained_files" in origin:
        return False
    data = origin.get("config", {}).get("data")
    if isinstance(data, Mapping) and data.get("name") == "files":
        log.warning("%s: does not say on which files it was trained, as older ones; some may be among these", where)
    return True
