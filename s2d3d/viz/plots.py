"""Plots of runs and studies as matplotlib figures, without global state or windows. `save_figure` writes a figure.

Logs are the rows of log.csv as numbers; absent values are missing or NaN.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ..errors import InputError
from .figure import COLORS, Log, as_number, draw_column, finish, make_panels, run_style, series
from .figure import save_figure as save_figure


def training_curves(logs: Mapping[str, Log], final: Mapping[str, float] | None = None) -> Figure:
    """Plot loss, accuracies and learning rate over the epochs, for one or several runs.

    Args:
        logs: by the name of the run. Used columns, if present: `epoch`, `train_loss`, `train_oa`, `val_oa`,
            `test_oa` (fractions), `lr`.
        final: by the name of a finished run, the OA of its final model on the test split, a fraction. It is the last
            point of the test accuracy curve.

    Raises:
        InputError: there is no run, or a run has no row.

    Example:
        >>> figure = training_curves({"a": [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}]})
        >>> figure.axes[0].lines[0].get_ydata().tolist()
        [2.0, 1.0]
    """
    _check_any(logs, "run", "epoch")
    figure, (loss, train, test, rate) = make_panels(2, 2, 10.5, 7)
    for index, (name, log) in enumerate(logs.items()):
        style = run_style(index)
        draw_column(loss, log, "train_loss", 1, label=name, **style)
        draw_column(train, log, "train_oa", 100, label=name, **style)
        tested = [*log[:-1], {**log[-1], "test_oa": final[name]}] if final and name in final and log else log
        draw_column(test, tested, "test_oa", 100, label=name, marker="o", markersize=4, **style)
        draw_column(test, log, "val_oa", 100, label=f"{name}, validation", marker="x", markersize=4, alpha=0.6, **style)
        draw_column(rate, log, "lr", 1, label=name, **style)
    loss.set(title="Training loss", xlabel="epoch", ylabel="loss, nats", yscale="log")
    train.set(title="Training accuracy, with augmentation", xlabel="epoch", ylabel="OA, %")
    title = "Accuracy of evaluations during training" + (", and of the final model" if final else "")
    test.set(title=title, xlabel="epoch", ylabel="OA, %")
    rate.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
    return finish(figure)


def confusion_figure(confusion: ArrayLike, class_names: Sequence[str], *, title: str = "") -> Figure:
    """Plot a confusion matrix, each row as fractions of its class; counts are written if there is room.

    Args:
        confusion: (C, C) counts, `confusion[true][predicted]`.
        class_names: C names.
        title: above the matrix.

    Raises:
        InputError: the shape does not match the names, or a count is negative.

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
    """Plot the accuracy of each class, a dot for each run. Classes are sorted by the accuracy of the first run.

    Args:
        per_class: by the name of the run, then by class: a fraction in [0, 1], or None without samples.

    Raises:
        InputError: there is no run, or no class.

    Example:
        >>> figure = class_accuracy_figure({"a": {"box": 0.5, "mug": 1.0}})
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['box', 'mug']
    """
    if not any(per_class.values()):
        raise InputError("no class to plot the accuracy of")
    classes = list(dict.fromkeys(name for accuracies in per_class.values() for name in accuracies))
    first = next(iter(per_class.values()))
    classes.sort(key=lambda name: as_number(first.get(name)) if first.get(name) is not None else -1.0)
    figure = Figure(figsize=(7.5, 1.3 + 0.21 * len(classes)), layout="constrained")
    panel = figure.add_subplot()
    for index, (run, accuracies) in enumerate(per_class.items()):
        values = [100 * as_number(accuracies.get(name)) for name in classes]
        place = np.arange(len(classes)) + 0.12 * (index - (len(per_class) - 1) / 2)
        panel.plot(values, place, "os^Dv"[index % 5], markersize=5, color=COLORS[index % len(COLORS)], label=run)
    panel.set_yticks(np.arange(len(classes)), classes, fontsize=8)
    panel.set(xlabel="accuracy, %", xlim=(-2, 102), ylim=(-0.8, len(classes) - 0.2), title="Accuracy of each class")
    return finish(figure)


def divergence_figure(logs: Mapping[str, Log]) -> Figure:
    """Plot the divergence of the experts from their mean, and the share rate, over the epochs.

    Args:
        logs: as for `training_curves`; columns `divergence` and `share_rate`. Runs without them are left out.

    Raises:
        InputError: no run has a divergence.

    Example:
        >>> figure = divergence_figure({"s2d": [{"epoch": 1, "divergence": 0.1, "share_rate": 0.0}]})
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['|W_i - mean| / |mean|', 'share rate']
    """
    sparse = {name: log for name, log in logs.items() if len(series(log, "divergence")[0])}
    _check_any(sparse, "run with experts", "divergence")
    figure, (apart, rate) = make_panels(1, 2, 10.5, 3.8)
    positive = False
    for index, (name, log) in enumerate(logs.items()):  # a run keeps its colour
        if name in sparse:
            draw_column(apart, log, "divergence", 1, label=name, marker="o", markersize=3, **run_style(index))
            draw_column(rate, log, "share_rate", 1, label=name, **run_style(index))
            positive |= bool((series(log, "divergence")[1] > 0).any())
    scale = "log" if positive else "linear"
    apart.set(title="Experts' divergence from their mean", xlabel="epoch", ylabel="|W_i - mean| / |mean|", yscale=scale)
    rate.set(title="Share rate of Experts Weights Averaging", xlabel="epoch", ylabel="share rate")
    rate.set_ylim(bottom=0)
    return finish(figure)


def corruption_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot accuracy over severity, for each corruption and for their mean; severity 0 is the clean set.

    Args:
        results: by the name of the run, the content of the file of `tools/evaluate.py --corruption all --output
            FILE.json`.

    Raises:
        InputError: there is no result.

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
    figure, panels = make_panels(rows, columns, 2.9 * columns, 2.7 * rows, sharey=True)
    for index, (run, result) in enumerate(results.items()):
        curves = {name: result["corruptions"][name]["oa"] for name in names if name in result["corruptions"]}
        curves["mean"] = np.mean(list(curves.values()), axis=0).tolist()
        for name, accuracies in curves.items():
            panel = panels[[*names, "mean"].index(name)]
            values = 100 * np.array([result["clean"]["oa"], *accuracies])
            panel.plot(range(len(values)), values, marker="o", markersize=3, label=run, **run_style(index))
    for number, (panel, name) in enumerate(zip(panels, [*names, "mean"])):
        panel.set_title(name if name != "mean" else "mean of all", fontsize=10)
        panel.set_xlabel("severity", fontsize=8)
        if number % columns == 0:
            panel.set_ylabel("OA, %")
    for panel in panels[len(names) + 1 :]:
        panel.set_visible(False)
    return finish(figure, legends=panels[:1])


def throughput_figure(
    values: Mapping[str, float], *, errors: Mapping[str, float] | None = None, unit: str = "clouds a second"
) -> Figure:
    """Plot labelled bars with their values, in the given order.

    Args:
        values: by label, at least 0.
        errors: by label, half the length of the error bar, in the same unit.
        unit: unit of the values.

    Raises:
        InputError: there is no value, or a value is negative or not finite.

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


def experts_figure(result: dict[str, Any]) -> Figure:
    """Plot divergence, accuracies and barriers over training, and the losses along lines between models.

    Args:
        result: result of `s2d3d.runs.analysis.analyze_run`.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_divergence(axes[0, 0], result)
    _draw_contraction(axes[0, 1], result["epochs"])
    _draw_accuracy(axes[0, 2], result["checkpoints"])
    _draw_gap(axes[1, 0], result["checkpoints"])
    _draw_lines(axes[1, 1], result["checkpoints"])
    _draw_path(axes[1, 2], result["between_checkpoints"])
    return finish(figure)


def _draw_divergence(panel: Axes, result: dict[str, Any]) -> None:
    rows = [row for row in result["epochs"] if row.get("divergence")]
    if rows:
        epochs = [row["epoch"] for row in rows]
        panel.plot(epochs, [row["divergence"] for row in rows], "o-", markersize=3, label="measured, mean over layers")
        if "predicted" in rows[0]:
            panel.plot(epochs, [row["predicted"] for row in rows], "--", label="predicted, one constant fitted")
    for name in result["checkpoints"][0]["divergence"]:
        points = [(point["epoch"], point["divergence"][name]) for point in result["checkpoints"]]
        panel.plot(*zip(*points), ".:", linewidth=0.7, alpha=0.6, label=name if len(points) > 1 else None)
    positive = any(value > 0 for point in result["checkpoints"] for value in point["divergence"].values())
    panel.set(xlabel="epoch", ylabel="|W_i - mean| / |mean|", title="Experts' divergence from their mean")
    panel.set_yscale("log" if positive or rows else "linear")


def _draw_accuracy(panel: Axes, checkpoints: list[dict[str, Any]]) -> None:
    epochs = [point["epoch"] for point in checkpoints]
    for index in range(len(checkpoints[0]["experts"])):
        own = [100 * point["experts"][index]["oa"] for point in checkpoints]
        panel.plot(epochs, own, "x-", linewidth=0.8, label=f"expert {index}")
    merged = [100 * point["merged"]["oa"] for point in checkpoints]
    panel.plot(epochs, merged, "ks-", markersize=4, label="mean of the experts (merged)")
    panel.set(xlabel="epoch", ylabel="OA, %", title="Single experts and their mean")


def _draw_gap(panel: Axes, checkpoints: list[dict[str, Any]]) -> None:
    """Draw the loss gap between the experts and their mean over the divergence, with a fitted square function."""
    measured = [(_mean_divergence(point), point["gap"]) for point in checkpoints]
    points = [(divergence, gap) for divergence, gap in measured if divergence > 0 and gap > 0]
    panel.set(xlabel="divergence", ylabel="gap of loss, nats", title="Mean loss of the experts minus loss of the mean")
    if not points:  # no positive values for a logarithmic axis
        panel.plot(*zip(*measured), "o", label="checkpoints")
        return
    panel.loglog(*zip(*points), "o", label="checkpoints")
    ratios = sorted(gap / divergence**2 for divergence, gap in points)
    middle = ratios[len(ratios) // 2]
    ends = [min(points)[0], max(points)[0]]
    panel.loglog(ends, [middle * end**2 for end in ends], "--", label=f"{middle:.3g} x divergence squared")


def _draw_contraction(panel: Axes, epochs: list[dict[str, float]]) -> None:
    panel.plot([row["epoch"] for row in epochs], [row["contraction"] for row in epochs], "o-", markersize=3)
    panel.set(xlabel="epoch", ylabel="1 - b K / (K - 1)", title="Contraction by EWA after each update")


def _draw_lines(panel: Axes, checkpoints: list[dict[str, Any]]) -> None:
    """Draw each checkpoint's line with the highest barrier between two experts, as excess over its ends."""
    for point in checkpoints:
        line = max(point["barriers"], key=lambda candidate: candidate["height"])
        first, last = line["losses"][0], line["losses"][-1]
        excess = [loss - first - t * (last - first) for t, loss in zip(line["positions"], line["losses"])]
        label = f"epoch {point['epoch']}, experts {line['experts'][0]} and {line['experts'][1]}"
        panel.plot(line["positions"], excess, "o-", markersize=3, label=label)
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set(xlabel="position between the experts", ylabel="excess of loss, nats", title="Lines between two experts")


def _draw_path(panel: Axes, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        label = f"epoch {line['epochs'][0]} to {line['epochs'][1]}: barrier {line['height']:.3f}"
        panel.plot(line["positions"], line["losses"], "o-", markersize=3, label=label)
    if not lines:
        panel.text(0.5, 0.5, "only one checkpoint\n(train.keep_every)", ha="center", transform=panel.transAxes)
    panel.set(xlabel="position between the checkpoints", ylabel="loss, nats", title="Lines between merged models")


def _mean_divergence(point: dict[str, Any]) -> float:
    return sum(point["divergence"].values()) / len(point["divergence"])


def study_figure(summary: dict[str, Any]) -> Figure:
    """Plot each comparison's mean difference in OA, percentage points, with its intervals and single seeds.

    The thick line is the 95 % paired t interval, the thin line next to it is the bootstrap interval, and grey dots are
    seeds. With `along`, that config key is the x axis; otherwise each comparison has its own row. Comparisons without a
    finished pair are left out.

    Args:
        summary: result of `s2d3d.studies.summary.summarize`.
    """
    items = [item for item in summary["comparisons"] if item["n"]]
    places = {row["name"]: row["along"] for row in summary["rows"]}
    numeric = all(isinstance(places[item["name"]], (int, float)) for item in items)
    along = summary["along"] if items and numeric else None
    size = (7.0, 4.5) if along else (7.5, 1.6 + 0.42 * max(1, len(items)))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    if not items:
        panel.text(0.5, 0.5, "no finished pair yet", ha="center", va="center", transform=panel.transAxes)
        panel.set_axis_off()
    elif along:
        _draw_along(panel, items, places, along)
    else:
        _draw_comparisons(panel, items)
    panel.set_title(f"{summary['study']}: {summary['split']}, {len(summary['seeds'])} seeds planned", fontsize=10)
    return figure


def _draw_comparisons(panel: Axes, items: list[dict[str, Any]]) -> None:
    for place, item in enumerate(reversed(items)):
        seeds = [100 * value for value in item["differences"].values()]
        panel.plot(seeds, [place - 0.22] * len(seeds), ".", color="0.6", markersize=5)
        if item["t_low"] is not None:
            panel.plot([100 * item["t_low"], 100 * item["t_high"]], [place] * 2, color="C0", linewidth=3, alpha=0.6)
            low, high = 100 * item["bootstrap_low"], 100 * item["bootstrap_high"]
            panel.plot([low, high], [place + 0.18] * 2, color="C1", linewidth=1.2)
        panel.plot(100 * item["mean"], place, "o", color="C0")
    labels = [f"{item['name']} - {item['reference']} (n={item['n']})" for item in reversed(items)]
    panel.set_yticks(range(len(items)), labels)
    panel.set_ylim(-0.6, len(items) - 0.4)
    panel.axvline(0, color="0.3", linewidth=0.8)
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel("difference in OA, points (thick: 95 % paired t, thin: bootstrap, grey: seeds)")


def _draw_along(panel: Axes, items: list[dict[str, Any]], places: dict[str, float], along: str) -> None:
    """Draw the comparisons over the key's values, evenly spaced; those with the same value are side by side."""
    values = sorted({places[item["name"]] for item in items})
    for place, value in enumerate(values):
        here = [item for item in items if places[item["name"]] == value]
        for index, item in enumerate(here):
            x = place + 0.25 * (index - (len(here) - 1) / 2)
            seeds = [100 * difference for difference in item["differences"].values()]
            panel.plot([x - 0.06] * len(seeds), seeds, ".", color="0.6", markersize=5)
            if item["t_low"] is not None:
                panel.plot([x] * 2, [100 * item["t_low"], 100 * item["t_high"]], color="C0", linewidth=3, alpha=0.6)
                low, high = 100 * item["bootstrap_low"], 100 * item["bootstrap_high"]
                panel.plot([x + 0.05] * 2, [low, high], color="C1", linewidth=1.2)
            panel.plot(x, 100 * item["mean"], "o", color="C0")
            note = f"{item['name']} - {item['reference']} (n={item['n']})"
            panel.annotate(note, (x, 100 * item["mean"]), (10, 4), textcoords="offset points", fontsize=7)
    panel.axhline(0, color="0.3", linewidth=0.8)
    panel.grid(axis="y", alpha=0.3)
    panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    panel.set_xlim(-0.4, len(values) - 0.2)
    panel.set(xlabel=along, ylabel="difference in OA, points\n(thick: 95 % paired t, thin: bootstrap, grey: seeds)")


def _check_any(logs: Mapping[str, Log], what: str, column: str) -> None:
    if not any(len(series(log, column)[0]) for log in logs.values()):
        raise InputError(f"no {what} with a column '{column}' to plot")
