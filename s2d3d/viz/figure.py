"""Common parts of all plots: panels, colours, axes, and writing figures to files."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..atomic import write_bytes
from ..errors import InputError

Log = Sequence[Mapping[str, float]]
"""Rows of log.csv as numbers; a value that a row lacks is missing or NaN."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#b8a800")
"""Colours of the runs, in their order; from Okabe and Ito, with a darker yellow. After eight, lines are dashed."""
SUFFIXES = (".png", ".svg", ".pdf")


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure atomically; the suffix of the path selects the format.

    Args:
        figure: the figure.
        path: file with one of `SUFFIXES`; an existing file is replaced.

    Raises:
        InputError: the suffix is unknown.

    Example:
        >>> from s2d3d.viz.plots import throughput_figure
        >>> save_figure(throughput_figure({"dense": 100.0}), "bars.png")  # doctest: +SKIP
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise InputError(f"{path}: a plot is a PNG, SVG or PDF; give it a name that ends in {', '.join(SUFFIXES)}")
    content = io.BytesIO()
    _take_names_literally(figure)
    figure.savefig(content, format=kind[1:], dpi=110)
    write_bytes(path, content.getvalue())
    return path


def figure_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for a page. Text stays text, and no other file is referenced.

    Example:
        >>> from s2d3d.viz.plots import throughput_figure
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
    """Escape `$` in the name of a run or class, so that it is not read as a formula."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)


def make_panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def finish(figure: Figure, *, legends: Sequence[Axes] | None = None) -> Figure:
    """Add grids, readable ticks, and a legend to each panel with several labelled lines.

    Args:
        figure: changed in place. A panel without lines gets the text that it was not measured.
        legends: the panels that get a legend; default: all.
    """
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        for axis in (panel.xaxis, panel.yaxis):
            if axis.get_scale() == "log":
                _label_plainly(axis)
        if panel.get_legend_handles_labels()[0] and (legends is None or panel in legends):
            panel.legend(fontsize=8)
        elif not panel.lines and panel.get_visible():
            panel.text(0.5, 0.5, "not measured", ha="center", color="#66727f", transform=panel.transAxes)
    return figure


def _label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers such as 2 or 0.05, instead of 2 x 10^0."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 1:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def run_style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index < len(COLORS) else "--"}


def series(log: Log, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs that have a value of a column, and the values."""
    pairs = [(as_number(row.get("epoch")), as_number(row.get(column))) for row in log]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return np.array([epoch for epoch, _ in pairs]), np.array([value for _, value in pairs])


def draw_column(panel: Axes, log: Log, column: str, factor: float, **style: Any) -> None:
    epochs, values = series(log, column)
    if len(epochs):
        panel.plot(epochs, factor * values, **{"linewidth": 1.5, **style})


def as_number(value: float | None) -> float:
    return math.nan if value is None else float(value)
