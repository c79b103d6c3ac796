"""Pictures of point clouds. Each point is a small shaded ball; z is up; the view is from the front right and above.

Open3D draws them, with a screen or without one (EGL). It is imported when the first cloud is drawn.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .grid import INK, check_counts, columns_for
from .window import BACKGROUND, import_open3d, open_window

if TYPE_CHECKING:
    from torch import Tensor

Clouds: TypeAlias = "Sequence[ArrayLike] | Tensor"
"""Arrays or CPU tensors (N, 3), where N may differ, or one CPU tensor (n, N, 3)."""

VIEW = (-60.0, 20.0)
"""Azimuth of the camera about z, counted from +x towards +y, and its elevation above the ground; degrees."""

_SUPERSAMPLING = 2
_WINDOW = (1280, 800)
_DISTANCE = 4.0  # of the camera, in radii of the scene
_LIGHT = np.array([-0.44, 0.58, 0.68])  # unit vector to the light in view axes: from the left, above and in front
_AMBIENT, _DIFFUSE = 0.55, 0.5
_FOG = 0.4  # fraction of the background colour in the farthest point

Array = NDArray[np.float64]


def height_colors(points: ArrayLike) -> Array:
    """Colour points by their height within the cloud, dark at the bottom.

    Args:
        points: (N, 3), z up.

    Returns:
        (N, 3) RGB in [0, 1].

    Example:
        >>> height_colors([[0, 0, 0], [0, 0, 1]]).shape
        (2, 3)
    """
    height = _check_cloud(points, 0)[:, 2]
    # The ends of the colormap are cut: they are almost black, or as light as the background.
    return colormaps["viridis"](0.05 + 0.85 * _unit_range(height))[:, :3]


def render_clouds(
    clouds: Clouds,
    *,
    colors: Sequence[ArrayLike | None] | None = None,
    scales: Sequence[ArrayLike | None] | None = None,
    size: int = 320,
    point_size: float | None = None,
    view: tuple[float, float] = VIEW,
    centered: bool = True,
) -> list[NDArray[np.uint8]]:
    """Draw each cloud into a square image. All have the same scale: the largest cloud fills its image.

    Args:
        clouds: arrays or CPU tensors (N, 3), z up; N may differ. N = 0 gives an empty image.
        colors: for each cloud (N, 3) RGB in [0, 1], one RGB for all its points, or None for `height_colors`.
        scales: for each cloud (N,) sizes of its points relative to `point_size`, above 0, or None: all of one size.
        size: side length of an image in pixels.
        point_size: diameter of a point in pixels; by default it depends on the largest number of points.
        view: azimuth and elevation of the camera, degrees.
        centered: put each cloud in the middle of its image. False keeps the relative positions of the clouds, for
            example to show shifts or parts of one cloud.

    Returns:
        For each cloud (size, size, 3) uint8 RGB.

    Raises:
        InputError: a cloud or colours have a wrong shape or range; open3d or one of its libraries is missing.

    Example:
        >>> images = render_clouds([torch.rand(1024, 3)], colors=[(0.8, 0.1, 0.1)])  # doctest: +SKIP
    """
    scene = _prepare(clouds, colors, scales, size, point_size, view, centered)
    pixels = size * _SUPERSAMPLING
    images = []
    with open_window(pixels, pixels, visible=False) as visualizer:
        for points, rgb, radii in zip(scene.points, scene.colors, scene.radii):
            visualizer.clear_geometries()
            if len(points):
                visualizer.add_geometry(_balls(points, rgb, radii, scene.point_size))
                _aim(visualizer, scene.distance, scene.focal_length / size)
            visualizer.poll_events()
            visualizer.update_renderer()
            image = np.asarray(visualizer.capture_screen_float_buffer(do_render=True))
            images.append(_shrink(image, size))
    return images


def show_window(
    clouds: Clouds,
    captions: Sequence[str] = (),
    *,
    colors: Sequence[ArrayLike | None] | None = None,
    scales: Sequence[ArrayLike | None] | None = None,
    columns: int | None = None,
    marks: Sequence[str | None] | None = None,
    title: str = "s2d3d",
    point_size: float | None = None,
    view: tuple[float, float] = VIEW,
) -> None:
    """Show a grid of clouds in a window that can be rotated and zoomed; returns when the window is closed.

    Args:
        clouds: as in `render_clouds`; so are `colors`, `scales`, `view` and `point_size` (for a cloud of 320 pixels).
        captions: one for each cloud, or none.
        columns: as in `draw_grid`; so are `marks`.
        title: of the window.

    Raises:
        InputError: there is no screen; a shape or range is wrong; open3d or one of its libraries is missing.

    Example:
        >>> show_window([torch.rand(1024, 3)], ["noise"])  # doctest: +SKIP
    """
    no_screen = "leave out --window and write a picture with --output FILE.png"
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise InputError(f"no screen for a window: neither DISPLAY nor WAYLAND_DISPLAY is set; {no_screen}")
    captions, marks = captions or [""] * len(clouds), marks or [None] * len(clouds)
    check_counts("clouds", len(clouds), captions, marks)
    scene = _prepare(clouds, colors, scales, 320, point_size, view, True)
    columns = columns or columns_for(len(clouds))
    rows = math.ceil(len(clouds) / columns)
    with open_window(*_WINDOW, visible=True, title=title) as visualizer:
        if visualizer is None:
            raise InputError(f"no screen for a window: the display cannot be opened; {no_screen}")
        half = 160 * scene.distance / scene.focal_length  # of a cloud's square
        for index, (points, rgb, radii) in enumerate(zip(scene.points, scene.colors, scene.radii)):
            row, column = divmod(index, columns)
            middle = half * np.array([2.1 * (column - (columns - 1) / 2), 0.2 - 2.5 * (row - (rows - 1) / 2), 0])
            if len(points):
                visualizer.add_geometry(_balls(points + middle, rgb, radii, scene.point_size))
            for geometry in _labels(middle, half, captions[index], marks[index]):
                visualizer.add_geometry(geometry)
        wide, high = 2.1 * half * columns, 2.5 * half * rows
        distance = 3 * max(wide, high)
        _aim(visualizer, distance, 0.95 * distance * min(1 / high, _WINDOW[0] / _WINDOW[1] / wide))
        while visualizer.poll_events():  # run() would not react to Ctrl-C
            visualizer.update_renderer()
            time.sleep(0.01)


@dataclass(frozen=True)
class _Scene:
    """Clouds in view axes: x right, y up, z towards the camera, which sits at (0, 0, distance) and looks at 0."""

    points: list[Array]
    colors: list[Array]
    radii: list[Array]  # of the balls, (N,)
    distance: float
    focal_length: float  # pixels
    point_size: float  # pixels


def _prepare(
    clouds: Clouds,
    colors: Sequence[ArrayLike | None] | None,
    scales: Sequence[ArrayLike | None] | None,
    size: int,
    point_size: float | None,
    view: tuple[float, float],
    centered: bool,
) -> _Scene:
    """Rotate the clouds into view axes, and choose the scale so that the largest fits its image."""
    if not len(clouds):
        raise InputError("no cloud to draw")
    if size < 16:
        raise InputError(f"size is {size}, must be at least 16 pixels")
    arrays = [_check_cloud(cloud, index) for index, cloud in enumerate(clouds)]
    rgb = [_check_colors(*given) for given in zip(one_each("colors", colors, arrays), arrays, range(len(arrays)))]
    factors = [_check_scales(*given) for given in zip(one_each("scales", scales, arrays), arrays, range(len(arrays)))]

    turned = [cloud @ _view_axes(*view).T for cloud in arrays]
    every = np.concatenate(turned)
    if len(every):
        common = _middle(every)
        turned = [points - (_middle(points) if centered and len(points) else common) for points in turned]
        every = np.concatenate(turned)
    radius = float(np.linalg.norm(every, axis=1).max(initial=0)) or 1.0
    distance = _DISTANCE * radius

    if point_size is None:
        most = max(len(cloud) for cloud in arrays)
        point_size = float(np.clip(6.5 * (1024 / max(most, 1)) ** 0.4, 1.2, 20)) * size / 320
    elif not point_size > 0:
        raise InputError(f"point_size is {point_size}, must be above 0 pixels")
    largest = point_size * max((float(factor.max(initial=0)) for factor in factors), default=1.0)
    # Slopes of the lines of sight; the lower bound limits the magnification of a single point.
    slope = np.abs(every[:, :2] / (distance - every[:, 2:])).max(initial=0.25 / _DISTANCE)
    focal_length = (0.47 * size - min(largest, 0.2 * size)) / slope
    return _Scene(
        points=turned,
        colors=[_fade(c, points) for c, points in zip(rgb, turned)],
        radii=[factor * point_size / 2 * distance / focal_length for factor in factors],
        distance=distance,
        focal_length=focal_length,
        point_size=point_size,
    )


def one_each(what: str, given: Sequence[ArrayLike | None] | None, clouds: Clouds) -> Sequence[ArrayLike | None]:
    """Return what is given for each cloud, in their order; None for all where nothing is.

    Raises:
        InputError: another number than that of the clouds.
    """
    if given is not None and len(given) != len(clouds):
        raise InputError(f"{what} of {len(given)} clouds for {len(clouds)} clouds; give one entry for each")
    return [None] * len(clouds) if given is None else given


def _check_cloud(cloud: ArrayLike, index: int) -> Array:
    points = np.asarray(cloud, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"cloud {index} has shape {points.shape}, must be (N, 3)")
    if not np.isfinite(points).all():
        raise InputError(f"cloud {index} has coordinates that are not finite")
    return points


def _check_colors(colors: ArrayLike | None, cloud: Array, index: int) -> Array:
    if colors is None:
        return height_colors(cloud)
    rgb = np.asarray(colors, dtype=np.float64)
    if rgb.shape not in ((3,), cloud.shape):
        raise InputError(f"colors of cloud {index} have shape {rgb.shape}, must be {cloud.shape} or (3,)")
    if not ((rgb >= 0) & (rgb <= 1)).all():
        raise InputError(f"colors of cloud {index} must lie in [0, 1]")
    return np.broadcast_to(rgb, cloud.shape)


def _check_scales(scales: ArrayLike | None, cloud: Array, index: int) -> Array:
    factors = np.ones(len(cloud)) if scales is None else np.asarray(scales, dtype=np.float64)
    if factors.shape != cloud.shape[:1]:
        raise InputError(f"scales of cloud {index} have shape {factors.shape}, must be {cloud.shape[:1]}")
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise InputError(f"scales of cloud {index} must be above 0")
    return factors


def _view_axes(azimuth: float, elevation: float) -> Array:
    """Return the rows right, up, and towards the camera, in the axes of the clouds."""
    a, e = math.radians(azimuth), math.radians(elevation)
    towards = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    return np.stack([right, np.cross(towards, right), towards])


def _middle(points: Array) -> Array:
    return (points.min(0) + points.max(0)) / 2


def _unit_range(values: Array) -> Array:
    """Map values to [0, 1]; equal values to 0.5."""
    spread = np.ptp(values) if len(values) else 0.0
    return (values - values.min()) / spread if spread > 0 else np.full(len(values), 0.5)


def _fade(colors: Array, points: Array) -> Array:
    """Mix the colours of far points with the background, to separate front and back of a sparse cloud."""
    amount = _FOG * (1 - _unit_range(points[:, 2:].ravel()))[:, None]
    return (1 - amount) * colors + amount * np.array(BACKGROUND)


def _balls(points: Array, colors: Array, radii: Array, pixels: float) -> Any:
    """Build one mesh with a ball around each point; larger balls have more triangles.

    The shading is part of the vertex colours, so no lights are needed, and lit parts keep the given colour.
    """
    o3d = import_open3d()
    ball = o3d.geometry.TriangleMesh.create_icosahedron()
    if pixels > 2.5:
        ball = ball.subdivide_loop(2 if pixels > 8 else 1)
    corners = np.asarray(ball.vertices) / np.linalg.norm(ball.vertices, axis=1, keepdims=True)
    shade = _AMBIENT + _DIFFUSE * np.clip(corners @ _LIGHT, 0, 1)
    triangles = np.asarray(ball.triangles) + len(corners) * np.arange(len(points))[:, None, None]
    mesh = o3d.geometry.TriangleMesh(
        o3d.utility.Vector3dVector((points[:, None] + radii[:, None, None] * corners).reshape(-1, 3)),
        o3d.utility.Vector3iVector(triangles.reshape(-1, 3).astype(np.int32)),
    )
    shaded = np.clip(colors[:, None] * shade[:, None], 0, 1)
    mesh.vertex_colors = o3d.utility.Vector3dVector(shaded.reshape(-1, 3))
    return mesh


def _labels(middle: Array, half: float, caption: str, mark: str | None) -> list[Any]:
    """Build the caption and the frame of one cloud of a window."""
    o3d = import_open3d()
    geometries = []
    for number, line in enumerate(filter(None, caption.splitlines())):
        text = o3d.t.geometry.TriangleMesh.create_text(line, depth=0.0).to_legacy()
        if not len(text.vertices):  # Open3D's font has Latin letters only
            continue
        text.scale(min(0.011 * half, 1.9 * half / text.get_max_bound()[0]), center=(0, 0, 0))
        text.translate(middle + half * np.array([0, -1.1 - 0.18 * number, 0]) - text.get_center())
        text.paint_uniform_color(to_rgb(mark or INK))
        geometries.append(text)
    if mark:
        corners = middle + half * np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
        lines = o3d.utility.Vector2iVector(np.array([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=np.int32))
        frame = o3d.geometry.LineSet(o3d.utility.Vector3dVector(corners), lines)
        frame.paint_uniform_color(to_rgb(mark))
        geometries.append(frame)
    return geometries


def _aim(visualizer: Any, distance: float, focal_ratio: float) -> None:
    """Look from (0, 0, distance) at the origin; `focal_ratio` is focal length / height of the picture."""
    control = visualizer.get_view_control()
    camera = control.convert_to_pinhole_camera_parameters()
    # The size of the frame buffer; on some screens it is a multiple of the requested size.
    width, height = camera.intrinsic.width, camera.intrinsic.height
    focal = focal_ratio * height
    camera.intrinsic.set_intrinsics(width, height, focal, focal, width / 2 - 0.5, height / 2 - 0.5)
    extrinsic = np.diag([1.0, -1.0, -1.0, 1.0])
    extrinsic[2, 3] = distance
    camera.extrinsic = extrinsic
    control.convert_from_pinhole_camera_parameters(camera, allow_arbitrary=True)


def _shrink(image: Array, size: int) -> NDArray[np.uint8]:
    """Average blocks of pixels to smooth the edges: (k size, k size, 3) in [0, 1] -> (size, size, 3)."""
    height, width = image.shape[:2]
    if height != width or height < size:
        raise InputError(f"open3d draws {width} x {height} pixels here, {size} x {size} are needed; lower the size")
    factor = height // size
    blocks = image[: size * factor, : size * factor].reshape(size, factor, size, factor, 3)
    return (blocks.mean((1, 3)) * 255 + 0.5).astype(np.uint8)
