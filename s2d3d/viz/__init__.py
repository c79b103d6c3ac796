"""Pictures: clouds (Open3D or browser), plots (matplotlib) and reports. Training and evaluation do not need them."""

from ..optional import optional

with optional("matplotlib", "drawing", extra="plots"):
    import matplotlib  # noqa: F401, all of this room builds on it

from .clouds import height_colors, render_clouds, show_window
from .grid import draw_grid
from .sheet import CloudSheet, sheet_paths, write_sheet

__all__ = [
    "CloudSheet",
    "draw_grid",
    "height_colors",
    "render_clouds",
    "sheet_paths",
    "show_window",
    "write_sheet",
]
