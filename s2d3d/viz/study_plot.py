"""The figure of a study: paired differences with their intervals, one line each or along a config key."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import save_figure


def draw_study(summary: dict[str, Any], path: str | Path) -> None:
    """Write `study_figure` to a file; see `save_figure`."""
    save_figure(study_figure(summary), path)


def study_figure(summary: dict[str, Any]) -> Figure:
    """Plot each comparison's mean difference in OA, percentage points, with its intervals and single seeds.

    The thick line is the 95 % paired t interval, the thin one beside it the bootstrap interval; grey dots are seeds.
    With `along` the comparisons stand at the values of that config key, otherwise below each other. Comparisons
    without a finished pair are left out.

    Args:
        summary: as `s2d3d.studies.summary.summarize` returns it.
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
        _draw_lines(panel, items)
    panel.set_title(f"{summary['study']}: {summary['split']}, {len(summary['seeds'])} seeds planned", fontsize=10)
    return figure


def _draw_lines(panel: Axes, items: list[dict[str, Any]]) -> None:
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
    """Draw the comparisons at the key's values, evenly spaced; those at one value stand side by side."""
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
