"""Runs as one HTML page: accuracies, plots, a confusion matrix to click, the worst mistakes to turn, configs, machines.

The page holds all it needs: it opens from a disk, without a server or a network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.compare import differing_keys, flatten
from ..errors import InputError
from ..random_state import derived_generator
from ..runs.log import training_throughput
from ..runs.record import RunRecord, final_form
from .cloud_sheets import by_mistake
from .figure import figure_svg
from .plots import (
    class_accuracy_figure,
    corruption_figure,
    divergence_figure,
    experts_figure,
    throughput_figure,
    training_curves,
)
from .sheet import embed_json, fill_template, pack

MOST_BYTES = 10_000_000
"""A report may not be larger."""
Rows = tuple[list[str], list[list[str]]]
"""Head and rows of a table."""
TITLES = {
    "sparse": "before merge", "merged": "merged or dense", "routed": "routed", "recalibrated": "BatchNorm recalibrated",
    "voting": "voting", "ema": "moving average",
}  # fmt: skip
"""What metrics.json measures."""


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


def build_report(
    runs: Sequence[RunRecord],
    predictions: Mapping[str, Predictions] | None = None,
    *,
    title: str = "",
    num_mistakes: int = 24,
    clouds_per_class: int = 12,
    points_per_cloud: int = 512,
) -> str:
    """Make the page.

    Args:
        runs: at least one, with names of their own.
        predictions: by the name of the run, for its clouds and mistakes; a run without them shows none.
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
        >>> page = build_report([RunRecord("a", {"seed": 0}, log)])
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
    predictions = predictions or {}
    figures = report_figures(runs)
    points: dict[str, dict[str, Any]] = {}
    data = [
        _explorer(run, predictions.get(run.name), num_mistakes, clouds_per_class, points_per_cloud, points)
        for run in runs
    ]
    title = title or ", ".join(names)
    page = fill_template(
        "report.html",
        title=escape(title),
        summary=html_table(*summary_rows(runs, predictions)),
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


def report_figures(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the figures of a report by name, those for which the runs have numbers."""
    logs = {run.name: run.log for run in runs}
    tested = {run.name: run.final["oa"] for run in runs if run.final and run.metrics.get("split", "test") == "test"}
    figures = {"training": training_curves(logs, tested)}
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
    run: RunRecord,
    predictions: Predictions | None,
    num_mistakes: int,
    clouds_per_class: int,
    points_per_cloud: int,
    points: dict[str, dict[str, Any]],
) -> dict[str, Any] | None:
    """Return what the page needs to show a run's confusion matrix and clouds; their points are added to `points`."""
    if predictions is None:
        if run.final is None:
            return None
        return {
            "name": run.name, "classes": run.final["class_names"], "confusion": run.final["confusion"], "clouds": [],
            "worst": [], "mistakes": None,
        }  # fmt: skip
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


def summary_rows(runs: Sequence[RunRecord], predictions: Mapping[str, Predictions] | None = None) -> Rows:
    """Return the accuracies, parameters and times of runs, a column for each; rows that no run has are left out."""
    predictions = predictions or {}
    table: dict[str, list[str | None]] = {
        "model": [_get(run.config, "model.name") for run in runs],
        "data": [_get(run.config, "data.name") for run in runs],
        "experts": [_experts(run.config) for run in runs],
        "epochs": [_epochs(run) for run in runs],
        "seed": [_get(run.config, "seed") for run in runs],
    }
    table["final model"] = [TITLES[final_form(run.metrics)] if run.metrics else None for run in runs]
    table["OA, final model"] = [_percent(run.final, "oa") for run in runs]
    table["mAcc, final model"] = [_percent(run.final, "macc") for run in runs]
    for form, title in TITLES.items():
        reports = [run.metrics.get(form) for run in runs]
        table[f"OA, {title}"] = [_percent(report, "oa") for report in reports]
        table[f"mAcc, {title}"] = [_percent(report, "macc") for report in reports]
    table["scored on"] = [
        {"test": "test split", "validation": "validation part"}.get(str(run.metrics.get("split"))) for run in runs
    ]
    table["loss"] = [f"{run.final['loss']:.4f}" if run.final else None for run in runs]
    table["clouds"] = [str(run.final["num_samples"]) if run.final else None for run in runs]
    table["evaluated for this report, OA"] = [_evaluated(predictions.get(run.name)) for run in runs]
    table["mean OA of corruptions"] = [_percent(run.robustness, "mean_oa") for run in runs]
    counts = [run.metrics.get("parameters", {}) for run in runs]
    table["parameters in training"] = [_count(count.get("training")) for count in counts]
    final = [next((value for key, value in count.items() if key != "training"), None) for count in counts]
    table["parameters afterwards"] = [_count(value) for value in final]
    seconds = [run.metrics.get("train_seconds") for run in runs]
    table["training time"] = [value and f"{value / 60:.1f} min" for value in seconds]
    rows = [[title, *(value or "" for value in values)] for title, values in table.items() if any(values)]
    return ["", *(run.name for run in runs)], rows


def config_rows(runs: Sequence[RunRecord]) -> Rows:
    """Return the keys of the configs in which runs differ, a column for each; all keys of a single run."""
    configs = [flatten(run.config) for run in runs]
    keys = differing_keys(configs) if len(runs) > 1 else list(configs[0])
    rows = [[key, *(_text(config.get(key, "-")) for config in configs)] for key in keys]
    return ["key", *(run.name for run in runs)], rows


def environment_rows(runs: Sequence[RunRecord]) -> Rows:
    """Return what the runs ran on, a column for each."""
    environments = [flatten(run.environment) for run in runs]
    keys = list(dict.fromkeys(key for environment in environments for key in environment))
    rows = [[key, *(_text(environment.get(key, "-")) for environment in environments)] for key in keys]
    return ["", *(run.name for run in runs)], rows


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, mark_differences: bool = False) -> str:
    """Return a table, the first column as heads of the rows; rows whose values differ are marked if asked for.

    Example:
        >>> html_table(["", "a"], [["seed", "0"]])
        '<table><thead><tr><th></th><th>a</th></tr></thead><tbody><tr><th>seed</th><td>0</td></tr></tbody></table>'
    """
    if not rows:
        return "<p>none</p>"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for first, *values in rows:
        mark = ' class="differs"' if mark_differences and len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<tr{mark}><th>{escape(first)}</th>{cells}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _get(config: Mapping[str, Any], key: str) -> str | None:
    value = flatten(config).get(key)
    return None if value is None else str(value)


def _experts(config: Mapping[str, Any]) -> str | None:
    s2d = config.get("s2d")
    if not s2d:
        return None
    if s2d["kind"] == "none":
        return "none (dense)"
    where = "every FFN" if s2d["every"] == 1 else f"every {_ordinal(s2d['every'])} FFN"
    experts = f"{s2d['num_experts']}, in {where}, share rate {s2d['share_rate']:g} {s2d['schedule']}"
    return f"top-{s2d['top_k']} of {experts}" if s2d["kind"] == "topk" else experts


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _epochs(run: RunRecord) -> str:
    done = int(run.log[-1]["epoch"])
    planned = run.config.get("train", {}).get("epochs", done)
    return str(done) if done == planned else f"{done} of {planned}"


def _evaluated(predictions: Predictions | None) -> str | None:
    if predictions is None:
        return None
    right = predictions.probabilities.argmax(1) == predictions.labels
    return f"{100 * float(right.double().mean()):.2f} %"


def _percent(report: Mapping[str, Any] | None, key: str) -> str | None:
    return f"{100 * report[key]:.2f} %" if report else None


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)) and not value:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) if all(isinstance(item, str) for item in value) else str(list(value))
    return "null" if value is None else str(value)
