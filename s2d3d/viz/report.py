"""Runs as one HTML page: accuracies, plots, a confusion matrix to click, the worst mistakes to turn, configs, machines.

The page holds all it needs: it opens from a disk, without a server or a network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..random_state import derived_generator
from .cloud_sheets import by_mistake
from .expert_plots import experts_figure
from .plots import (
    Log,
    class_accuracy_figure,
    corruption_figure,
    divergence_figure,
    figure_svg,
    throughput_figure,
    training_curves,
    training_throughput,
)
from .report_parts import config_rows, environment_rows, html_table, summary_rows
from .sheet import embed_json, escape, fill_template, pack

MOST_BYTES = 10_000_000
"""A report may not be larger."""
FORMS = ("routed", "merged")
"""What a finished run is measured as, in metrics.json: the model that it leaves."""


@dataclass(frozen=True)
class Predictions:
    """What a run's model says of a test set.

    Attributes:
        points: (n, N, 3), z up.
        labels: (n,) int64, the true classes.
        probabilities: (n, C) of the model.
        names: of the clouds, n.
        class_names: C.
        source: of the set; runs of one source share its clouds in the page.
    """

    points: Tensor
    labels: Tensor
    probabilities: Tensor
    names: Sequence[str]
    class_names: Sequence[str]
    source: str


@dataclass(frozen=True)
class ReportRun:
    """A run, as `s2d3d.runs.record.RunRecord` describes its files.

    Attributes:
        name: unique among the runs of a report.
        config: resolved.
        environment: of environment.json.
        log: of log.csv, as numbers.
        metrics: of metrics.json; empty while the run is not finished.
        analysis: of analysis.json.
        robustness: of robustness.json.
        predictions: None leaves clouds and mistakes of this run out.
    """

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    log: Log
    metrics: Mapping[str, Any] = field(default_factory=dict)
    analysis: Mapping[str, Any] | None = None
    robustness: Mapping[str, Any] | None = None
    predictions: Predictions | None = None

    @property
    def final(self) -> Mapping[str, Any] | None:
        """The measured accuracies of the model that the run leaves; None while it is not finished."""
        return next((self.metrics[form] for form in FORMS if form in self.metrics), None)


def build_report(
    runs: Sequence[ReportRun],
    *,
    title: str = "",
    num_mistakes: int = 24,
    clouds_per_class: int = 12,
    points_per_cloud: int = 512,
) -> str:
    """Make the page.

    Args:
        runs: at least one, with names of their own.
        title: default: the names of the runs.
        num_mistakes: worst mistakes of each run in its gallery, at least 0.
        clouds_per_class: clouds of each class to choose from in the confusion matrix, at least 0; a cloud of every
            mistake that occurs is among them, also if that takes more.
        points_per_cloud: of the clouds in the page; of larger ones a random part is kept.

    Returns:
        HTML of at most `MOST_BYTES` bytes.

    Raises:
        InputError: no run, a name that occurs twice, a count below 0, or a page that gets too large.

    Example:
        >>> log = [{"epoch": 1, "train_loss": 2.0, "train_oa": 0.3}]
        >>> page = build_report([ReportRun("a", {"seed": 0}, {}, log)])
        >>> page.startswith("<!DOCTYPE html>"), "http" in page
        (True, False)
    """
    if not runs:
        raise InputError("no run to report")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise InputError(f"two runs of one name: {', '.join(names)}")
    if min(num_mistakes, clouds_per_class) < 0 or points_per_cloud < 1:
        raise InputError(f"{num_mistakes} mistakes, {clouds_per_class} clouds of a class: at least 0 are needed")
    figures = report_figures(runs)
    points: dict[str, dict[str, Any]] = {}
    data = [_explorer(run, num_mistakes, clouds_per_class, points_per_cloud, points) for run in runs]
    title = title or ", ".join(names)
    page = fill_template(
        "report.html",
        title=escape(title),
        summary=html_table(*summary_rows(runs)),
        plots="".join(_plot(name, figure_svg(figure)) for name, figure in figures.items()),
        config_title="Differences of the configs" if len(runs) > 1 else "Config",
        config=html_table(*config_rows(runs)),
        environment=html_table(*environment_rows(runs), mark_differences=True),
        data=embed_json({"runs": [entry for entry in data if entry], "points": points}),
    )
    if len(page.encode()) > MOST_BYTES:
        size = f"{len(page.encode()) / 1e6:.1f} MB, more than the {MOST_BYTES / 1e6:.0f} MB of a report"
        raise InputError(f"the report gets {size}; ask for fewer clouds, or report fewer runs at once")
    return page


def report_figures(runs: Sequence[ReportRun]) -> dict[str, Any]:
    """Return the figures of a report by name, those for which the runs have numbers."""
    logs = {run.name: run.log for run in runs}
    figures = {"training": training_curves(logs)}
    measured = {run.name: run.final["per_class"] for run in runs if run.final}
    if measured:
        figures["class_accuracy"] = class_accuracy_figure(measured)
    if any(row.get("divergence") is not None for log in logs.values() for row in log):
        figures["divergence"] = divergence_figure(logs)
    robust = {run.name: run.robustness for run in runs if run.robustness}
    if robust:
        figures["corruptions"] = corruption_figure(robust)
    speeds = {run.name: training_throughput(run.log, run.config.get("train", {}).get("batch_size", 1)) for run in runs}
    if any(speeds.values()):
        unit = "clouds a second in training, median of the epochs, on the machine as it was loaded"
        figures["throughput"] = throughput_figure({name: speed for name, speed in speeds.items() if speed}, unit=unit)
    for run in runs:
        if run.analysis:
            figures[f"experts of {run.name}"] = experts_figure(dict(run.analysis))
    return figures


def choose_shown(predictions: Predictions, per_class: int) -> list[int]:
    """Choose the clouds of each class that a page offers: the worst of each mistake that occurs, then the worst others.

    Args:
        predictions: of all clouds.
        per_class: how many of a class, unless it has more kinds of mistakes; all are right ones and wrong ones alike.

    Returns:
        Indices, class by class, the worst first.

    Example:
        >>> likely = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
        >>> data = Predictions(torch.rand(3, 4, 3), torch.tensor([0, 0, 0]), likely, list("abc"), list("xy"), "s")
        >>> choose_shown(data, 2)
        [2, 0]
    """
    if not per_class:
        return []
    guesses = predictions.probabilities.argmax(1)
    order = by_mistake(predictions.probabilities, predictions.labels).tolist()
    chosen: list[int] = []
    for label in range(predictions.probabilities.shape[1]):
        members = [index for index in order if predictions.labels[index] == label]
        first = list({int(guesses[index]): index for index in reversed(members)}.values())  # the worst of each guess
        others = [index for index in members if index not in first]
        room = max(0, per_class - len(first))
        # Right ones count as well: otherwise a class of many mistakes would show nothing else.
        right = [index for index in others if guesses[index] == label][: (room + 1) // 2]
        wrong = [index for index in others if guesses[index] != label][: room - len(right)]
        rest = [index for index in others if index not in right and index not in wrong]
        taken = {*first, *right, *wrong, *rest[: room - len(right) - len(wrong)]}
        chosen += [index for index in members if index in taken]
    return chosen


def _explorer(
    run: ReportRun, num_mistakes: int, clouds_per_class: int, points_per_cloud: int, points: dict[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return what the page needs to show a run's confusion matrix and clouds; their points are added to `points`."""
    if run.predictions is None:
        if run.final is None:
            return None
        return {
            "name": run.name, "classes": run.final["class_names"], "confusion": run.final["confusion"], "clouds": [],
            "worst": [], "mistakes": None,
        }  # fmt: skip
    predictions = run.predictions
    classes = list(predictions.class_names)
    confidence, guesses = predictions.probabilities.max(1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (predictions.labels.numpy(), guesses.numpy()), 1)
    order = by_mistake(predictions.probabilities, predictions.labels).tolist()
    wrong = [index for index in order if guesses[index] != predictions.labels[index]]
    worst = wrong[:num_mistakes]
    shown = choose_shown(predictions, clouds_per_class)
    shown += [index for index in worst if index not in set(shown)]
    clouds = []
    for index in shown:
        key = f"{predictions.source}:{index}"
        if key not in points:
            points[key] = _encode(predictions.points[index], points_per_cloud, index)
        label = int(predictions.labels[index])
        clouds.append(
            {
                "key": key, "name": predictions.names[index], "label": label, "guess": int(guesses[index]),
                "confidence": round(float(confidence[index]), 4),
                "truth": round(float(predictions.probabilities[index, label]), 4),
            }
        )  # fmt: skip
    places = {index: place for place, index in enumerate(shown)}
    return {
        "name": run.name, "classes": classes, "confusion": confusion.tolist(), "clouds": clouds,
        "worst": [places[index] for index in worst], "mistakes": len(wrong),
    }  # fmt: skip


def _encode(cloud: Tensor, num_points: int, index: int) -> dict[str, Any]:
    """Return a random part of a cloud as whole numbers of 16 bits about its middle, and their unit."""
    kept = torch.randperm(len(cloud), generator=derived_generator("report", index))[:num_points]
    cloud = cloud[kept].double()
    cloud = cloud - (cloud.amax(0) + cloud.amin(0)) / 2
    unit = max(float(cloud.abs().max()), 1e-9) / 32767
    return {"unit": unit, "data": pack((cloud / unit).round().numpy(), "<i2")}


def _plot(name: str, svg: str) -> str:
    """Place a figure as an image, so that the names inside of several do not meet."""
    source = f"data:image/svg+xml;base64,{pack(np.frombuffer(svg.encode(), np.uint8), 'u1')}"
    return f'<figure class="plot"><img alt="{escape(name)}" src="{source}"></figure>'
