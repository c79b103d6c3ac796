"""One figure of what the experts of a run did."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import save_figure


def draw_experts(result: dict[str, Any], path: str | Path) -> None:
    """Write `experts_figure` to a file; see `save_figure`."""
    save_figure(experts_figure(result), path)


def experts_figure(result: dict[str, Any]) -> Figure:
    """Plot divergence, accuracies and barriers over training, and the losses along lines between models.

    Args:
        result: as `s2d3d.runs.analysis.analyze_run` returns it.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_divergence(axes[0, 0], result)
    _draw_contraction(axes[0, 1], result["epochs"])
    _draw_accuracy(axes[0, 2], result["checkpoints"])
    _draw_gap(axes[1, 0], result["checkpoints"])
    _draw_lines(axes[1, 1], result["checkpoints"])
    _draw_path(axes[1, 2], result["between_checkpoints"])
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    return figure


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
    """Draw what the mean gains over its experts against their divergence, and the square that curvature makes of it."""
    measured = [(_mean_divergence(point), point["gap"]) for point in checkpoints]
    points = [(divergence, gap) for divergence, gap in measured if divergence > 0 and gap > 0]
    panel.set(xlabel="divergence", ylabel="gap of loss, nats", title="Mean loss of the experts less that of their mean")
    if not points:  # nothing that a logarithm could show
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
    """Draw each checkpoint's highest line between two experts, as excess over its ends."""
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
        panel.text(0.5, 0.5, "one checkpoint only\n(train.keep_every)", ha="center", transform=panel.transAxes)
    panel.set(xlabel="position between the checkpoints", ylabel="loss, nats", title="Lines between merged models")


def _mean_divergence(point: dict[str, Any]) -> float:
    return sum(point["divergence"].values()) / len(point["divergence"])
