"""A grid of images with captions as one PNG, drawn by matplotlib without its global state."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from ..atomic import write_bytes
from ..errors import InputError

INK = "#1f2933"
_FAINT = "#66727f"


def draw_grid(
    images: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    path: str | os.PathLike,
    *,
    columns: int | None = None,
    marks: Sequence[str | None] | None = None,
    title: str | None = None,
) -> Path:
    """Write images as one PNG, row by row, with a caption below each.

    The first line of a caption and of the title is bold. The file is written atomically.

    Args:
        images: (S, S, 3) uint8 of equal size, such as the results of `render_clouds`.
        captions: one for each image; all get the height of the longest.
        path: file to write; an existing file is replaced.
        columns: images per row; by default the grid is about 1.5 times as wide as high.
        marks: for each image the matplotlib colour of its frame and caption, or None for no frame.
        title: above the grid.

    Returns:
        `path`.

    Raises:
        InputError: there is no image, the sizes differ, or the number of captions or marks is wrong.

    Example:
        >>> draw_grid(render_clouds(clouds), ["chair", "table"], "clouds.png")  # doctest: +SKIP
    """
    marks = marks or [None] * len(images)
    if not len(images):
        raise InputError("no image to draw")
    check_counts("images", len(images), captions, marks)
    if any(image.shape != images[0].shape for image in images):
        raise InputError(f"images of several sizes: {sorted({image.shape[:2] for image in images})}")
    figure = _layout(images, captions, columns or columns_for(len(images)), marks, title)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=figure.dpi)
    write_bytes(path, content.getvalue())
    return Path(path)


def check_counts(what: str, count: int, captions: Sequence[str], marks: Sequence[str | None]) -> None:
    if not count == len(captions) == len(marks):
        raise InputError(f"{count} {what}, {len(captions)} captions and {len(marks)} marks; give one of each")


def columns_for(count: int) -> int:
    """Return the number of columns of a grid: about 1.5 times as wide as high, with few empty places."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns / rows / 1.5)) + (rows * columns - count) / count

    return min(range(1, count + 1), key=cost)


def _layout(
    images: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    columns: int,
    marks: Sequence[str | None],
    title: str | None,
) -> Figure:
    """Draw the grid with exact pixel positions."""
    size, dpi = images[0].shape[0], 100
    rows, columns = math.ceil(len(images) / columns), min(columns, len(images))
    # Smaller letters would not be readable.
    gap, line, title_line = round(0.05 * size), max(14, round(0.062 * size)), max(18, round(0.08 * size))
    below = line * max(len(caption.splitlines()) for caption in captions) + gap
    above = title_line * len(title.splitlines()) + gap if title else 0
    width, height = columns * (size + gap) + gap, gap + above + rows * (size + below + gap)
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    texts = []
    for index, (image, caption, mark) in enumerate(zip(images, captions, marks)):
        row, column = divmod(index, columns)
        left, top = gap + column * (size + gap), gap + above + row * (size + below + gap)
        if mark:
            edge = max(1, size // 80)
            canvas[top - edge : top + size + edge, left - edge : left + size + edge] = np.rint(
                255 * np.array(to_rgb(mark))
            )
        canvas[top : top + size, left : left + size] = image
        colors = (mark, mark) if mark else (INK, _FAINT)
        texts += _write(figure, left + size / 2, top + size + gap / 2, caption, line, colors, "center")
    figure.figimage(canvas)
    _fit(texts, size)
    if title:
        _fit(_write(figure, gap, gap, title, title_line, (INK, _FAINT), "left"), width - 2 * gap)
    return figure


def _write(
    figure: Figure, x: float, y: float, text: str, line: float, colors: tuple[str, str], align: str
) -> list[Text]:
    """Write lines from (x, y) downwards, the first one bold; pixels from the top left, `line` is the line height."""
    width, height = figure.get_size_inches() * figure.dpi
    return [
        figure.text(
            x / width,
            1 - (y + number * line) / height,
            content,
            horizontalalignment=align,
            verticalalignment="top",
            fontsize=0.72 * line * 72 / figure.dpi,
            fontweight="normal" if number else "bold",
            color=colors[number > 0],
            parse_math=False,
        )
        for number, content in enumerate(text.splitlines())
    ]


def _fit(texts: list[Text], width: float) -> None:
    """Shrink all texts by the same factor until the widest one fits."""
    for _ in range(2):  # the width of hinted letters is not quite proportional to their size
        widest = max((text.get_window_extent().width for text in texts), default=0)
        if widest > width:
            for text in texts:
                text.set_fontsize(float(text.get_fontsize()) * width / widest)
