"""Pictures: point clouds drawn by Open3D, put together by matplotlib. Neither is needed to train or evaluate."""

from .clouds import height_colors, render_clouds, show_window
from .grid import draw_grid

__all__ = ["draw_grid", "height_colors", "render_clouds", "show_window"]
