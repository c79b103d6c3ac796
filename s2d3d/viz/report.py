"""A report of runs as one HTML page: accuracies, plots, interactive confusion matrix and mistakes, configs, machines.

The page contains everything it needs. It opens from a disk, without a server or a network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config.compare import differing_keys, flatten
from ..errors import InputError
from ..evaluation.accuracy import confusion_matrix
from ..export import web
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
from .reconstructions import Reconstructions, pictures, quantise, reconstruction_curves
from .sheet import embed_json, fill_template, pack

VIEWER = Path(web.__file__).parent / "web" / "viewer.js"
"""What draws and turns a cloud, here and in the page of an exported model."""
MOST_BYTES = 10_000_000
"""Maximum size of a report."""
Rows = tuple[list[str], list[list[str]]]
"""Head and rows of a table."""
TITLES = {
    "sparse": "before merge", "merged": "merged or dense", "routed": "routed", "recalibrated": "BatchNorm recalibrated",
    "voting": "voting", "ema": "moving average", "initial": "random encoder",
}  # fmt: skip
"""Names of the measurements in metrics.json."""


class Clouds(Protocol):
    """Clouds (N, 3) by their index in the set, such as a tensor (n, N, 3)."""

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Predictions:
    """The predictions of a run's model on a test set.

    Attributes:
        points: the clouds (N, 3), z up, by index.
        labels: (n,) int64, the true classes.
        probabilities: (n, C) of the model.
        names: of the clouds, n.
        class_names: C.
        source: of the set; runs with the same source share its clouds in the page.
    """

    points: Clouds
    labels: Tensor
    probabilities: Tensor
    names: Sequence[str]
    class_names: Sequence[str]
    source: str


def build_report(
    runs: Sequence[RunRecord],
    predictions: Mapping[str, Predictions] | None = None,
    reconstructions: Mapping[str, Reconstructions] | None = None,
    *,
    title: str = "",
    num_mistakes: int = 24,
    clouds_per_class: int = 12,
    points_per_cloud: int = 512,
) -> str:
    """Return the page as HTML.

    Args:
        runs: at least one, with different names.
        predictions: by the name of the run, for its clouds and mistakes; a run without predictions shows none.
        reconstructions: by the name of a pre-training.
        title: default: the names of the runs.
        num_mistakes: number of worst mistakes in the gallery of each run, at least 0.
        clouds_per_class: number of clouds of each class behind the confusion matrix, at least 0. Each kind of mistake
            has at least one cloud, so the number can be larger.
        points_per_cloud: maximum number of points of a cloud in the page; larger clouds are subsampled at random.

    Returns:
        HTML of at most `MOST_BYTES` bytes.

    Raises:
        InputError: there is no run, a name occurs twice, a count is below 0, or the page is too large.

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
    rebuilt = [
        {"run": name, "clouds": pictures(name, of_run, points)} for name, of_run in (reconstructions or {}).items()
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
        viewer=VIEWER.read_text(encoding="utf-8").partition("export {")[0],
        data=embed_json({"runs": [entry for entry in data if entry], "points": points, "rebuilt": rebuilt}),
    )
    if len(page.encode()) > MOST_BYTES:
        size = f"{len(page.encode()) / 1e6:.1f} MB, more than the {MOST_BYTES / 1e6:.0f} MB of a report"
        raise InputError(f"the report gets {size}; ask for fewer clouds, or report fewer runs at once")
    return page


def report_figures(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the figures of a report by name; figures without data are left out."""
    logs = {run.name: run.log for run in runs}
    classifiers = {run.name: run for run in runs if not _is_pretraining(run)}
    final = {name: run.final for name, run in classifiers.items() if run.final}
    tested = {run.name: run.final["oa"] for run in classifiers.values() if run.final and _scored_on_test(run)}
    figures = {}
    if classifiers:
        figures["training"] = training_curves({name: logs[name] for name in classifiers}, tested)
    if len(classifiers) < len(runs):
        others = {name: log for name, log in logs.items() if name not in classifiers}
        figures["pretraining"] = reconstruction_curves(others)
    measured = {name: report["per_class"] for name, report in final.items()}
    if measured:
        figures["class_accuracy"] = class_accuracy_figure(measured)
    if any(row.get("divergence") is not None for log in logs.values() for row in log):
        figures["divergence"] = divergence_figure(logs)
    robust = {run.name: run.robustness for run in runs if run.robustness}
    if robust:
        figures["corruptions"] = corruption_figure(robust)
    speeds = {run.name: training_throughput(run.log, run.config.get("train", {}).get("batch_size", 1)) for run in runs}
    if any(speeds.values()):
        unit = "clouds per second in training, median over the epochs; depends on the load of the machine"
        figures["throughput"] = throughput_figure({name: speed for name, speed in speeds.items() if speed}, unit=unit)
    for run in runs:
        if run.analysis:
            figures[f"experts of {run.name}"] = experts_figure(dict(run.analysis))
    return figures


def choose_shown(predictions: Predictions, per_class: int) -> list[int]:
    """Choose the clouds of each class for the page: the worst of each kind of mistake, then the worst others.

    Args:
        predictions: of all clouds.
        per_class: number of clouds of a class, right and wrong ones; more if it has more kinds of mistakes.

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
        # Right ones are included: otherwise a class with many mistakes would show only mistakes.
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
    """Return the data of a run's confusion matrix and clouds for the page; their points are added to `points`."""
    if predictions is None:
        if run.final is None or _is_pretraining(run):
            return None
        return {
            "name": run.name, "classes": run.final["class_names"], "confusion": run.final["confusion"], "clouds": [],
            "worst": [], "mistakes": None,
        }  # fmt: skip
    classes = list(predictions.class_names)
    confidence, guesses = predictions.probabilities.max(1)
    confusion = confusion_matrix(guesses, predictions.labels, len(classes))
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
    """Return a random part of a cloud relative to its centre, see `quantise`."""
    kept = torch.randperm(len(cloud), generator=derived_generator("report", index))[:num_points]
    cloud = cloud[kept].double()
    return quantise(cloud - (cloud.amax(0) + cloud.amin(0)) / 2)


def _plot(name: str, svg: str) -> str:
    """Embed a figure as an image, so that names inside several figures do not collide."""
    source = f"data:image/svg+xml;base64,{pack(np.frombuffer(svg.encode(), np.uint8), 'u1')}"
    return f'<figure class="plot"><img alt="{escape(name)}" src="{source}"></figure>'


def summary_rows(runs: Sequence[RunRecord], predictions: Mapping[str, Predictions] | None = None) -> Rows:
    """Return the accuracies, parameters and times, with a column for each run; rows without any value are left out."""
    predictions = predictions or {}
    table: dict[str, list[str | None]] = {
        "model": [_get(run.config, "model.name") for run in runs],
        "data": [_get(run.config, "data.name") for run in runs],
        "experts": [_experts(run.config) for run in runs],
        "epochs": [_epochs(run) for run in runs],
        "seed": [_get(run.config, "seed") for run in runs],
    }
    table["final model"] = [TITLES[final_form(run.metrics)] if run.metrics else None for run in runs]
    finals = [None if _is_pretraining(run) else run.final for run in runs]
    table["OA, final model"] = [_percent(report, "oa") for report in finals]
    table["mAcc, final model"] = [_percent(report, "macc") for report in finals]
    probed = [(run.final, run.metrics.get("initial")) if _is_pretraining(run) else (None, None) for run in runs]
    table["OA of a linear probe"] = [_percent(report, "oa") for report, _ in probed]
    table["OA of a linear probe, random encoder"] = [_percent(report, "oa") for _, report in probed]
    for form, title in TITLES.items():
        reports = [None if _is_pretraining(run) else run.metrics.get(form) for run in runs]
        table[f"OA, {title}"] = [_percent(report, "oa") for report in reports]
        table[f"mAcc, {title}"] = [_percent(report, "macc") for report in reports]
    table["scored on"] = [
        {"test": "test split", "validation": "validation part"}.get(str(run.metrics.get("split"))) for run in runs
    ]
    table["loss"] = [f"{report['loss']:.4f}" if report else None for report in finals]
    table["reconstruction loss"] = [f"{report['loss']:.6f}" if report else None for report, _ in probed]
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
    """Return the config keys in which runs differ, with a column for each run; all keys of a single run."""
    configs = [flatten(run.config) for run in runs]
    keys = differing_keys(configs) if len(runs) > 1 else list(configs[0])
    rows = [[key, *(_text(config.get(key, "-")) for config in configs)] for key in keys]
    return ["key", *(run.name for run in runs)], rows


def environment_rows(runs: Sequence[RunRecord]) -> Rows:
    """Return the machines and versions, with a column for each run."""
    environments = [flatten(run.environment) for run in runs]
    for environment in environments:
        if "earlier" in environment:
            environment["earlier"] = f"{len(environment['earlier'])} starts"
    keys = list(dict.fromkeys(key for environment in environments for key in environment))
    rows = [[key, *(_text(environment.get(key, "-")) for environment in environments)] for key in keys]
    return ["", *(run.name for run in runs)], rows


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, mark_differences: bool = False) -> str:
    """Return an HTML table whose first column holds the row headings; rows with different values can be marked.

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


def _scored_on_test(run: RunRecord) -> bool:
    return run.metrics.get("split", "test") == "test"


def _is_pretraining(run: RunRecord) -> bool:
    return run.config.get("task") == "pretrain"


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
    return f"{100 * report[key]:.2f} %" if report and key in report else None


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)) and not value:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) if all(isinstance(item, str) for item in value) else str(list(value))
    return "null" if value is None else str(value)
