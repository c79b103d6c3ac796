"""What all plots share: panels, colours, readable axes, and the files that figures are written to."""

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
"""Of the runs, in their order; Okabe and Ito's, the yellow darkened. They repeat after eight, with dashed lines."""
SUFFIXES = (".png", ".svg", ".pdf")


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 110) -> Path:
    """Write a figure; its suffix chooses the format. The file appears whole or not at all.

    Args:
        figure: any.
        path: ends in one of `SUFFIXES`; an existing file is replaced.
        dpi: pixels of an inch in a PNG.

    Raises:
        InputError: another suffix.

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
    figure.savefig(content, format=kind[1:], dpi=dpi)
    write_bytes(path, content.getvalue())
    return path


def figure_svg(figure: Figure) -> str:
    """Return a figure as an SVG element whose text stays text and which names no other file: for a page.

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
    """Let `$` in the name of a run or class be a `$`, and no formula."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)


def make_panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def finish(figure: Figure, *, legends: Sequence[Axes] | None = None) -> Figure:
    """Add grids, readable ticks, and a legend to each panel that has something to tell apart.

    Args:
        figure: changed in place. A panel without a line says that it was not measured.
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
    """Label a logarithmic axis with numbers such as 2 or 0.05, where matplotlib would write 2 x 10^0."""
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
