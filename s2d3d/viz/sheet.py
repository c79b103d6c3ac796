"""A sheet of clouds with captions, and its output formats: picture, files for other viewers, web page."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..atomic import write_bytes
from ..errors import InputError
from ..optional import optional
from .clouds import Clouds, height_colors, one_each, render_clouds, show_window
from .grid import check_counts, draw_grid

SUFFIXES = (".png", ".ply", ".html")
_VERTEX = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]


@dataclass(frozen=True)
class CloudSheet:
    """Clouds with captions.

    Attributes:
        clouds: arrays or CPU tensors (N, 3), z up; N may differ.
        captions: one for each cloud; the first line is bold.
        title: of the sheet; the first line is bold.
        colors: for each cloud (N, 3) RGB in [0, 1], one RGB, or None: by height.
        scales: for each cloud (N,) sizes of its points relative to the default, or None.
        marks: for each cloud the matplotlib colour of its frame and caption, or None.
        columns: clouds per row; None: chosen automatically.

    Raises:
        InputError: there is no cloud, or the number of captions, colours, scales or marks is wrong.

    Example:
        >>> import torch
        >>> len(CloudSheet([torch.rand(64, 3)], ["noise"], "an example").clouds)
        1
    """

    clouds: Clouds
    captions: Sequence[str]
    title: str
    colors: Sequence[ArrayLike | None] | None = None
    scales: Sequence[ArrayLike | None] | None = None
    marks: Sequence[str | None] | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        count = len(self.clouds)
        if not count:
            raise InputError("no cloud to draw")
        check_counts("clouds", count, self.captions, self.marks or [None] * count)
        one_each("colors", self.colors, self.clouds)
        one_each("scales", self.scales, self.clouds)

    def show(self) -> None:
        """Open a window with the clouds; see `show_window`."""
        show_window(
            self.clouds, self.captions, colors=self.colors, scales=self.scales, columns=self.columns,
            marks=self.marks, title=self.title.splitlines()[0],
        )  # fmt: skip


def sheet_paths(path: str | os.PathLike, num_clouds: int) -> list[Path]:
    """Return the files that `write_sheet` makes: `path`, or numbered files for several clouds as `.ply`.

    Raises:
        InputError: the suffix is not one of `SUFFIXES`.

    Example:
        >>> [path.name for path in sheet_paths("out/cloud.ply", 12)][::11]
        ['cloud_01.ply', 'cloud_12.ply']
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        kinds = "the picture is a PNG, PLY or HTML file"
        raise InputError(f"{path}: {kinds}; give it a name that ends in .png, .ply or .html")
    if path.suffix.lower() != ".ply" or num_clouds == 1:
        return [path]
    digits = len(str(num_clouds))
    return [path.with_name(f"{path.stem}_{number:0{digits}d}{path.suffix}") for number in range(1, num_clouds + 1)]


def write_sheet(sheet: CloudSheet, path: str | os.PathLike, *, size: int = 320) -> list[Path]:
    """Write a sheet in the format of the suffix of `path`; each file is written atomically.

    - `.png`: a grid of pictures, drawn by Open3D.
    - `.ply`: a binary file with colours for each cloud, for MeshLab, CloudCompare, Blender, Open3D and others; the
      caption is a comment in its header. Point sizes and frames are not stored.
    - `.html`: a page in which the clouds can be rotated and zoomed. It includes plotly and has at least 5 MB.

    Args:
        sheet: the sheet.
        path: file to write; existing files are replaced.
        size: side length of a cloud's image in a `.png`, in pixels.

    Returns:
        The written files, see `sheet_paths`.

    Raises:
        InputError: the suffix is unknown, a shape or range is wrong, or a package or system library is missing.

    Example:
        >>> write_sheet(CloudSheet([torch.rand(64, 3)], ["noise"], "an example"), "noise.html")  # doctest: +SKIP
    """
    paths = sheet_paths(path, len(sheet.clouds))
    kind = paths[0].suffix.lower()
    if kind == ".png":
        images = render_clouds(sheet.clouds, colors=sheet.colors, scales=sheet.scales, size=size)
        draw_grid(images, sheet.captions, path, columns=sheet.columns, marks=sheet.marks, title=sheet.title)
    elif kind == ".html":
        write_bytes(paths[0], cloud_page(sheet).encode())
    else:
        for index, place in enumerate(paths):
            points, rgb, _ = _cloud(sheet, index)
            write_bytes(place, encode_ply(points, rgb, comment=sheet.captions[index]))
    return paths


def encode_ply(points: ArrayLike, colors: ArrayLike, *, comment: str = "") -> bytes:
    """Return a cloud as a binary PLY file.

    Args:
        points: (N, 3).
        colors: (N, 3) RGB in [0, 1].
        comment: for the header of the file; its lines are joined.

    Example:
        >>> encode_ply([[0, 0, 0]], [[1, 0, 0]])[:3]
        b'ply'
    """
    points, colors = np.asarray(points), np.asarray(colors)
    vertices = np.empty(len(points), _VERTEX)
    for axis, name in enumerate("xyz"):
        vertices[name] = points[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = np.rint(255 * colors[:, channel])
    types = {"<f4": "float", "u1": "uchar"}
    text = ", ".join(comment.split("\n")).encode("ascii", "replace").decode()
    head = ["ply", "format binary_little_endian 1.0", *([f"comment {text}"] if text else [])]
    head += [f"element vertex {len(points)}", *(f"property {types[kind]} {name}" for name, kind in _VERTEX)]
    return "\n".join([*head, "end_header", ""]).encode() + vertices.tobytes()


def cloud_page(sheet: CloudSheet, *, at_once: int = 8) -> str:
    """Return a sheet as one HTML page that needs no server, no network and no other file.

    Args:
        sheet: the sheet.
        at_once: approximate number of clouds shown at a time, at least 1; browsers draw at most 16 scenes.

    Raises:
        InputError: plotly is missing.

    Example:
        >>> cloud_page(CloudSheet([[[0, 0, 0]]], ["a point"], "an example"))[:15]
        '<!DOCTYPE html>'
    """
    with optional("plotly", "the page", extra="html"):
        from plotly.offline import get_plotlyjs
    marks = sheet.marks or [None] * len(sheet.clouds)
    clouds = []
    for index, (caption, mark) in enumerate(zip(sheet.captions, marks)):
        points, rgb, factors = _cloud(sheet, index)
        clouds.append(
            {
                "points": pack(points, "<f4"),
                "colors": pack(np.rint(255 * rgb), "u1"),
                "scales": None if (factors == 1).all() else pack(factors, "<f4"),
                "caption": caption,
                "mark": mark,
            }
        )
    columns = min(sheet.columns or 3, len(clouds), 4, at_once)
    return fill_template(
        "clouds.html",
        title=escape(sheet.title.splitlines()[0]),
        heading="".join(f"<p>{escape(line)}</p>" for line in sheet.title.splitlines()[1:]),
        plotly=get_plotlyjs(),
        data=embed_json({"clouds": clouds, "columns": columns, "rows": at_once // columns}),
    )


def pack(values: ArrayLike, dtype: str) -> str:
    """Return numbers as base64 of their bytes; a page reads them as a typed array.

    Example:
        >>> pack([1, 2], "u1")
        'AQI='
    """
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def embed_json(content: Any) -> str:
    """Return JSON for a script element of a page; its text cannot end the element.

    Example:
        >>> embed_json("</script>")
        '"\\\\u003c/script>"'
    """
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def fill_template(name: str, **parts: str) -> str:
    """Return a page of this folder with each `{{part}}` replaced; the inserted parts are not searched."""
    pieces = resources.files(__package__).joinpath(name).read_text(encoding="utf-8").split("{{")
    text = [pieces[0]]
    for piece in pieces[1:]:
        key, rest = piece.split("}}", 1)
        text += [parts[key], rest]
    return "".join(text)


def _cloud(sheet: CloudSheet, index: int) -> tuple[NDArray, NDArray, NDArray]:
    """Return points (N, 3), colours (N, 3) and sizes (N,) of one cloud."""
    points = np.asarray(sheet.clouds[index], dtype=np.float64)
    colors = None if sheet.colors is None else sheet.colors[index]
    rgb = height_colors(points) if colors is None else np.asarray(colors, dtype=np.float64)
    factors = None if sheet.scales is None else sheet.scales[index]
    factors = np.ones(len(points)) if factors is None else np.asarray(factors, dtype=np.float64)
    return points, np.broadcast_to(rgb, points.shape), factors
