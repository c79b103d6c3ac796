"""Plots of runs: numbers in, a matplotlib figure out. No global state, no window; `save_figure` and `figure_svg` write.

Logs are the rows of log.csv as numbers; a value that a row lacks is missing or NaN.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike

from ..errors import InputError
from .sheet import write_bytes

Log = Sequence[Mapping[str, float]]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#b8a800")
"""Of the runs, in their order; Okabe and Ito's, the yellow darkened. They repeat after eight, with dashed lines."""
SUFFIXES = (".png", ".svg", ".pdf")


def training_curves(logs: Mapping[str, Log]) -> Figure:
    """Plot loss, accuracies and learning rate over the epochs, several runs over one another.

    Args:
        logs: by the name of the run. Columns used, where they are there: `epoch`, `train_loss`, `train_oa`, `val_oa`,
            `test_oa` (fractions), `lr`.

    Raises:
        InputError: no run, or no row.

    Example:
        >>> figure = training_curves({"a": [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}]})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0, 1.0]
    """
    _check_any(logs, "run", "epoch")
    figure, (loss, train, test, rate) = _panels(2, 2, 10.5, 7)
    for index, (name, log) in enumerate(logs.items()):
        style = _style(index)
        _draw(loss, log, "train_loss", 1, label=name, **style)
        _draw(train, log, "train_oa", 100, label=name, **style)
        _draw(test, log, "test_oa", 100, label=name, marker="o", markersize=4, **style)
        _draw(test, log, "val_oa", 100, label=f"{name}, validation", marker="x", markersize=4, alpha=0.6, **style)
        _draw(rate, log, "lr", 1, label=name, **style)
    loss.set(title="Training loss", xlabel="epoch", ylabel="loss, nats", yscale="log")
    train.set(title="Training accuracy, with augmentation", xlabel="epoch", ylabel="OA, %")
    test.set(title="Accuracy of evaluations during training", xlabel="epoch", ylabel="OA, %")
    rate.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
    return _finish(figure)


def confusion_figure(confusion: ArrayLike, class_names: Sequence[str], *, title: str = "") -> Figure:
    """Plot a confusion matrix, each row as shares of its class; counts are written where there is room.

    Args:
        confusion: (C, C) counts, `confusion[true][predicted]`.
        class_names: C names.
        title: above it.

    Raises:
        InputError: the shape does not fit the names, or a negative count.

    Example:
        >>> figure = confusion_figure([[3, 1], [0, 0]], ["box", "mug"])
        >>> figure.axes[0].images[0].get_array().tolist()
        [[75.0, 25.0], [0.0, 0.0]]
    """
    counts, size = np.asarray(confusion), len(class_names)
    if counts.shape != (size, size) or not size:
        raise InputError(f"a confusion matrix of shape {counts.shape} for {size} classes")
    if (counts < 0).any():
        raise InputError("a confusion matrix with a negative count")
    inches = max(4.5, 1.8 + 0.23 * size)
    figure = Figure(figsize=(inches + 0.9, inches), layout="constrained")
    panel = figure.add_subplot()
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    small = 9 if size <= 15 else 7
    ticks = np.arange(size)
    panel.set_xticks(ticks, class_names, rotation=90, fontsize=small)
    panel.set_yticks(ticks, class_names, fontsize=small)
    panel.set(xlabel="predicted", ylabel="true", title=title)
    for true, predicted in zip(*counts.nonzero()):
        color = "white" if shares[true, predicted] > 55 else "black"
        text = str(counts[true, predicted])
        panel.text(predicted, true, text, ha="center", va="center", fontsize=small - 2, color=color)
    figure.colorbar(image, ax=panel, shrink=0.8, label="share of the true class, %")
    return figure


def class_accuracy_figure(per_class: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Plot the accuracy of each class, a dot for each run; classes by the accuracy of the first run.

    Args:
        per_class: by the name of the run, then by class: a fraction in [0, 1], or None where there is no sample.

    Raises:
        InputError: no run, or no class.

    Example:
        >>> figure = class_accuracy_figure({"a": {"box": 0.5, "mug": 1.0}})
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['box', 'mug']
    """
    if not any(per_class.values()):
        raise InputError("no class to plot the accuracy of")
    classes = list(dict.fromkeys(name for accuracies in per_class.values() for name in accuracies))
    first = next(iter(per_class.values()))
    classes.sort(key=lambda name: _number(first.get(name)) if first.get(name) is not None else -1.0)
    figure = Figure(figsize=(7.5, 1.3 + 0.21 * len(classes)), layout="constrained")
    panel = figure.add_subplot()
    for index, (run, accuracies) in enumerate(per_class.items()):
        values = [100 * _number(accuracies.get(name)) for name in classes]
        place = np.arange(len(classes)) + 0.12 * (index - (len(per_class) - 1) / 2)
        panel.plot(values, place, "os^Dv"[index % 5], markersize=5, color=COLORS[index % len(COLORS)], label=run)
    panel.set_yticks(np.arange(len(classes)), classes, fontsize=8)
    panel.set(xlabel="accuracy, %", xlim=(-2, 102), ylim=(-0.8, len(classes) - 0.2), title="Accuracy of each class")
    return _finish(figure)


def divergence_figure(logs: Mapping[str, Log]) -> Figure:
    """Plot how far the experts are from their mean, and the share rate that pulls them together, over the epochs.

    Args:
        logs: as for `training_curves`; columns `divergence` and `share_rate`. Runs without them are left out.

    Raises:
        InputError: no run has a divergence.

    Example:
        >>> figure = divergence_figure({"s2d": [{"epoch": 1, "divergence": 0.1, "share_rate": 0.0}]})
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['|W_i - mean| / |mean|', 'share rate']
    """
    sparse = {name: log for name, log in logs.items() if len(_series(log, "divergence")[0])}
    _check_any(sparse, "run with experts", "divergence")
    figure, (apart, rate) = _panels(1, 2, 10.5, 3.8)
    positive = False
    for index, (name, log) in enumerate(logs.items()):  # a run keeps its colour
        if name in sparse:
            _draw(apart, log, "divergence", 1, label=name, marker="o", markersize=3, **_style(index))
            _draw(rate, log, "share_rate", 1, label=name, **_style(index))
            positive |= bool((_series(log, "divergence")[1] > 0).any())
    scale = "log" if positive else "linear"
    apart.set(title="Experts' divergence from their mean", xlabel="epoch", ylabel="|W_i - mean| / |mean|", yscale=scale)
    rate.set(title="Share rate of Experts Weights Averaging", xlabel="epoch", ylabel="share rate")
    rate.set_ylim(bottom=0)
    return _finish(figure)


def corruption_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot accuracy against the severity of each corruption, and of their mean; severity 0 is the clean set.

    Args:
        results: by the name of the run, as `tools/evaluate.py --corruption all --output FILE.json` writes them.

    Raises:
        InputError: no result.

    Example:
        >>> result = {"clean": {"oa": 0.9}, "corruptions": {"jitter": {"oa": [0.8, 0.7, 0.6, 0.5, 0.4]}}}
        >>> figure = corruption_figure({"a": result})
        >>> figure.axes[0].lines[0].get_ydata().round().tolist()
        [90.0, 80.0, 70.0, 60.0, 50.0, 40.0]
    """
    if not results:
        raise InputError("no accuracies under corruptions to plot")
    names = list(dict.fromkeys(name for result in results.values() for name in result["corruptions"]))
    columns = min(4, len(names) + 1)
    rows = math.ceil((len(names) + 1) / columns)
    figure, panels = _panels(rows, columns, 2.9 * columns, 2.7 * rows, sharey=True)
    for index, (run, result) in enumerate(results.items()):
        curves = {name: result["corruptions"][name]["oa"] for name in names if name in result["corruptions"]}
        curves["mean"] = np.mean(list(curves.values()), axis=0).tolist()
        for name, accuracies in curves.items():
            panel = panels[[*names, "mean"].index(name)]
            values = 100 * np.array([result["clean"]["oa"], *accuracies])
            panel.plot(range(len(values)), values, marker="o", markersize=3, label=run, **_style(index))
    for number, (panel, name) in enumerate(zip(panels, [*names, "mean"])):
        panel.set_title(name if name != "mean" else "mean of all", fontsize=10)
        panel.set_xlabel("severity", fontsize=8)
        if number % columns == 0:
            panel.set_ylabel("OA, %")
    for panel in panels[len(names) + 1 :]:
        panel.set_visible(False)
    return _finish(figure, legends=panels[:1])


def throughput_figure(
    values: Mapping[str, float], *, errors: Mapping[str, float] | None = None, unit: str = "clouds a second"
) -> Figure:
    """Plot bars with their values written beside them, in the order given.

    Args:
        values: by label, at least 0.
        errors: by label, half the length of a bar's whisker, in the same unit.
        unit: what the numbers are.

    Raises:
        InputError: no value, or one that is negative or not finite.

    Example:
        >>> figure = throughput_figure({"dense": 100.0, "S2D": 98.0})
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [100.0, 98.0]
    """
    if not values:
        raise InputError("no throughput to plot")
    for label, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"throughput of {label} is {value}, must be a number of at least 0")
    figure = Figure(figsize=(7.5, 1.1 + 0.42 * len(values)), layout="constrained")
    panel = figure.add_subplot()
    whiskers = [errors.get(label, 0.0) for label in values] if errors else None
    colors = [COLORS[index % len(COLORS)] for index in range(len(values))]
    bars = panel.barh(list(values), list(values.values()), xerr=whiskers, color=colors, height=0.6)
    panel.bar_label(bars, [f"{value:.4g}" for value in values.values()], padding=4, fontsize=9)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlim(left=0)
    panel.set_xlabel(unit)
    panel.grid(axis="x", alpha=0.3)
    return figure


def training_throughput(log: Log, batch_size: int) -> float | None:
    """Return the clouds a second of a run's training: the median over its epochs; None without any.

    Args:
        log: columns `updates` (total) and `seconds` (of the epoch).
        batch_size: clouds of an update.

    Example:
        >>> training_throughput([{"updates": 10, "seconds": 2.0}, {"updates": 20, "seconds": 4.0}], batch_size=32)
        120.0
    """
    speeds, before = [], 0.0
    for row in log:
        updates, seconds = _number(row.get("updates")), _number(row.get("seconds"))
        if updates > before and seconds > 0:
            speeds.append(batch_size * (updates - before) / seconds)
            before = updates
    return float(np.median(speeds)) if speeds else None


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 110) -> Path:
    """Write a figure; its suffix chooses the format. The file appears whole or not at all.

    Args:
        figure: any.
        path: ends in one of `SUFFIXES`; an existing file is replaced.
        dpi: pixels of an inch in a PNG.

    Raises:
        InputError: another suffix.

    Example:
        >>> save_figure(throughput_figure({"dense": 100.0}), "bars.png")  # doctest: +SKIP
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise InputError(f"{path}: a plot is a PNG, SVG or PDF; give it a name that ends in {', '.join(SUFFIXES)}")
    content = io.BytesIO()
    _take_names_literally(figure)
    figure.savefig(content, format=kind[1:], dpi=dpi)
    write_bytes(path, content.getvalue())
    return path


def figure_svg(figure: Figure) -> str:
    """Return a figure as an SVG element whose text stays text and which names no other file: for a page.

    Example:
        >>> figure_svg(throughput_figure({"dense": 100.0}))[:4]
        '<svg'
    """
    content = io.StringIO()
    _take_names_literally(figure)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "s2d3d"}):  # the same figure, the same bytes
        figure.savefig(content, format="svg", metadata=nothing)
    text = content.getvalue()
    return text[text.index("<svg") :]  # without the head, which names a document type on the web


def _take_names_literally(figure: Figure) -> None:
    """Let `$` in the name of a run or class be a `$`, and no formula; the powers of logarithmic axes stay formulas."""
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis) if axis.get_scale() == "log"]
    powers = {label for axis in axes for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in powers:
            text.set_parse_math(False)


def _panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _finish(figure: Figure, *, legends: Sequence[Axes] | None = None) -> Figure:
    """Add grids, and a legend to each panel that has something to tell apart; hide panels without a line."""
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0] and (legends is None or panel in legends):
            panel.legend(fontsize=8)
        elif not panel.lines and panel.get_visible():
            panel.text(0.5, 0.5, "not measured", ha="center", color="#66727f", transform=panel.transAxes)
    return figure


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index < len(COLORS) else "--"}


def _series(log: Log, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs that have a value of a column, and the values."""
    pairs = [(_number(row.get("epoch")), _number(row.get(column))) for row in log]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return np.array([epoch for epoch, _ in pairs]), np.array([value for _, value in pairs])


def _draw(panel: Axes, log: Log, column: str, factor: float, **style: Any) -> None:
    epochs, values = _series(log, column)
    if len(epochs):
        panel.plot(epochs, factor * values, **{"linewidth": 1.5, **style})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _check_any(logs: Mapping[str, Log], what: str, column: str) -> None:
    if not any(len(_series(log, column)[0]) for log in logs.values()):
        raise InputError(f"no {what} with a column '{column}' to plot")
