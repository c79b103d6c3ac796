"""The results of a finished run: metrics.json, and the table at the end."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.reconstruction import Report
from .folder import RunFolder
from .resume import Progress

_TITLES = {
    "sparse": "before merge (sparse, eval mode)", "ema": "moving average, merged",
    "recalibrated": "merged, BatchNorm recalibrated", "voting": "merged, voting", "initial": "random encoder",
}  # fmt: skip
_ROUTED_TITLES = {
    "routed": "routed", "ema": "moving average", "recalibrated": "BatchNorm recalibrated", "voting": "voting",
    "initial": "random encoder",
}  # fmt: skip


def run_metrics(
    reports: Mapping[str, Report],
    *,
    progress: Progress,
    seed: int,
    train_seconds: float,
    parameters: Mapping[str, int],
    split: str,
    shapes: Sequence[str],
    kept: str,
    task: str = "classify",
) -> dict[str, Any]:
    """Return the content of metrics.json: evaluations after the last epoch, parameters, time.

    Args:
        reports: evaluations by the form of the model: "sparse", "merged", "recalibrated", ....
        progress: of the run, at its end.
        seed: of the run.
        train_seconds: training time, without evaluation.
        parameters: number of parameters, "training" and afterwards.
        split: the evaluated split, "test" or "validation".
        shapes: names of its shapes, in order. Their digest shows whether two runs were scored on the same shapes.
        kept: form of the model in the checkpoint of the finished run, a key of `reports`.
        task: of the run; a classification's file does not name it.
    """
    return {
        **({} if task == "classify" else {"task": task}),
        "split": split,
        "shapes": hashlib.blake2b("\n".join(shapes).encode(), digest_size=8).hexdigest(),
        "epochs": progress.epoch,
        "updates": progress.updates,
        "seed": seed,
        "selection": "last epoch",
        "kept": kept,
        "train_seconds": train_seconds,
        "parameters": dict(parameters),
        **{name: report.to_dict() for name, report in reports.items()},
    }


def run_summary(
    reports: Mapping[str, Report],
    *,
    folder: RunFolder,
    split: str,
    sparse: bool,
    training_parameters: int,
    final_parameters: int,
) -> str:
    """Return the table that ends a finished run: evaluations, parameters, run folder.

    Args:
        reports: as for `run_metrics`.
        folder: of the run.
        split: the evaluated split.
        sparse: the run trained experts.
        training_parameters: number of parameters while training.
        final_parameters: number of parameters of the final model.
    """
    routed = "routed" in reports
    titles = _ROUTED_TITLES if routed else _TITLES | {"merged": "after merge" if sparse else "dense"}
    if "recalibrated" in reports:  # voting then uses this model
        titles = titles | {"voting": f"{titles['recalibrated']}, voting"}
    rows = [(titles[name], report.summary()) for name, report in reports.items()]
    rows += [
        ("scored on", "test split" if split == "test" else "validation part of the training split"),
        ("parameters while training", f"{training_parameters:,}"),
        ("parameters after", f"{final_parameters:,}"),
        ("routed model", str(folder.final)) if routed else ("dense model", str(folder.merged)),
        ("run folder", str(folder.root)),
    ]
    return "\n".join(f"{title:<34}{value}" for title, value in rows)
