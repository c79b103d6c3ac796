"""Robustness to corruptions: accuracy on all corrupted test sets, and the mean corruption error against a reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..datasets import BatchLoader, PointCloudDataset
from ..datasets.corruptions import CORRUPTIONS, SEVERITIES, CorruptedDataset, corrupted_size
from ..errors import InputError
from ..models.mode import eval_mode
from .accuracy import ClassificationReport, evaluate

SEED = 0
"""Of the corrupted sets. Not the seed of a run: all models are tested on the same clouds."""
COMPARED = ("num_points", "num_samples", "votes", "seed")
"""What two robustness files must agree in to be compared."""


@dataclass(frozen=True)
class RobustnessReport:
    """Reports on the clean and on all corrupted test sets.

    Attributes:
        clean: on the clean set.
        corrupted: by corruption, one report for each severity 1 .. 5.
        num_points: points of a clean cloud.
        seed: of the corrupted sets.
    """

    clean: ClassificationReport
    corrupted: dict[str, list[ClassificationReport]]
    num_points: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON; accuracies are fractions."""

        def accuracies(reports: list[ClassificationReport]) -> dict[str, list[float]]:
            return {key: [getattr(report, key) for report in reports] for key in ("oa", "macc")}

        every = [report.oa for reports in self.corrupted.values() for report in reports]
        return {
            "num_points": self.num_points,
            "num_samples": self.clean.num_samples,
            "votes": self.clean.votes,
            "seed": self.seed,
            "clean": {"oa": self.clean.oa, "macc": self.clean.macc},
            "corruptions": {name: accuracies(reports) for name, reports in self.corrupted.items()},
            "mean_oa": sum(every) / len(every),
        }


def evaluate_corruptions(
    model: nn.Module,
    dataset: PointCloudDataset,
    make_loader: Callable[[PointCloudDataset], BatchLoader],
    *,
    device: torch.device | str,
    votes: int = 1,
    progress: bool = True,
) -> RobustnessReport:
    """Evaluate a model on the clean test set and on each of its 35 corruptions.

    Args:
        model: points (B, N, 3) -> logits, on `device`.
        dataset: the clean test set.
        make_loader: makes the loader of a set.
        device: where to compute.
        votes: see `evaluate`.
        progress: show progress bars on a terminal.

    Raises:
        InputError: the smallest corrupted clouds have too few points for the model.
    """
    _check_smallest(model, dataset, device)

    def measure(part: PointCloudDataset) -> ClassificationReport:
        return evaluate(model, make_loader(part), device=device, votes=votes, progress=progress)

    corrupted = {
        name: [measure(CorruptedDataset(dataset, name, severity, seed=SEED)) for severity in SEVERITIES]
        for name in CORRUPTIONS
    }
    return RobustnessReport(measure(dataset), corrupted, dataset.num_points, SEED)


def corruption_errors(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Divide a model's error under each corruption by that of a reference model.

    Args:
        result: as `RobustnessReport.to_dict` returns it.
        reference: of the model to compare with, likewise.

    Returns:
        CE of each corruption: the sum over severities of 1 - OA, divided by that of the reference. Below 1 is better
        than the reference. Their mean is the mCE.

    Raises:
        InputError: see `check_comparable`.

    Source: Ren et al. 2022, arXiv 2202.03377 (CE and mCE, with DGCNN as the reference).

    Example:
        >>> def measured(oa):
        ...     return {"corruptions": {"jitter": {"oa": [oa] * 5}}}
        >>> round(corruption_errors(measured(0.9), measured(0.8))["jitter"], 6)
        0.5
    """
    check_comparable(result, reference)
    theirs = reference["corruptions"]
    return {name: _error(measured) / _error(theirs[name]) for name, measured in result["corruptions"].items()}


def check_comparable(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """Check that a reference is comparable with a result. Only the `COMPARED` values of the result are needed.

    Raises:
        InputError: the two are not measured on the same clouds, or the reference makes no error under a corruption.
    """
    for key in COMPARED:
        own, theirs = result.get(key), reference.get(key)
        if own != theirs:
            raise InputError(f"the reference was measured with {key} {theirs}, this model with {own}: not comparable")
    for name, measured in reference["corruptions"].items():
        if _error(measured) <= 0:
            raise InputError(f"the reference makes no error under {name}: its CE and the mCE are not defined")


def add_corruption_errors(result: dict[str, Any], reference: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return `result` with `reference` (its path), `ce` of each corruption and their mean `mce`."""
    errors = corruption_errors(result, reference)
    return {**result, "reference": str(path), "ce": errors, "mce": sum(errors.values()) / len(errors)}


def robustness_table(result: dict[str, Any]) -> str:
    """Return the table of a result as text: OA in percent by corruption and severity, CE where there is a reference."""
    errors = result.get("ce", {})
    header = f"{'OA %':<12}" + "".join(f"{severity:>8}" for severity in SEVERITIES) + f"{'mean':>8}{'CE':>8}"
    lines = [f"{'clean':<12}{100 * result['clean']['oa']:>8.2f}", header]
    for name, measured in result["corruptions"].items():
        accuracies = [*measured["oa"], sum(measured["oa"]) / len(measured["oa"])]
        error = f"{errors[name]:.3f}" if name in errors else "-"
        lines.append(f"{name:<12}" + "".join(f"{100 * oa:>8.2f}" for oa in accuracies) + f"{error:>8}")
    count = sum(len(measured["oa"]) for measured in result["corruptions"].values())
    lines.append(f"mean OA over {count} corrupted sets {100 * result['mean_oa']:.2f} %")
    if "mce" in result:
        lines.append(f"mCE {result['mce']:.4f} relative to {result['reference']}; below 1 is more robust")
    else:
        lines.append("mCE: no reference; name one with --reference, see docs/robustness.md")
    return "\n".join(lines)


@torch.no_grad()
def _check_smallest(model: nn.Module, dataset: PointCloudDataset, device: torch.device | str) -> None:
    """Check the smallest corrupted clouds first, so that too few points are refused at once."""
    smallest = min(corrupted_size(dataset.num_points, name, SEVERITIES[-1]) for name in CORRUPTIONS)
    try:
        with eval_mode(model):
            model(dataset.sample(torch.tensor([0]))[0][:, :smallest].to(device))
    except ValueError as error:
        raise InputError(f"corruptions leave {smallest} of {dataset.num_points} points: {error}") from None


def _error(measured: dict[str, Any]) -> float:
    return math.fsum(1 - oa for oa in measured["oa"])
