"""Drawn clouds: where their points appear, in which colour, at which scale; grids to the pixel; windows; errors."""

import contextlib
import math
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from s2d3d.errors import InputError
from s2d3d.viz import clouds as module
from s2d3d.viz import draw_grid, height_colors, render_clouds, show_window

FRONT = (-90.0, 0.0)
"""Camera on the -y axis: x to the right, z up."""
SQUARE = np.array([(x, 0.0, z) for x in (-1, 1) for z in (-1, 1)])
RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def drawn(image):
    """(H, W) bool: where the image is not background."""
    return (np.abs(image.astype(int) - np.rint(255 * np.array(module.BACKGROUND))) > 3).any(-1)


def extent(mask):
    """First and last drawn column, first and last drawn row."""
    columns, rows = mask.any(0).nonzero()[0], mask.any(1).nonzero()[0]
    return columns[0], columns[-1], rows[0], rows[-1]


@pytest.fixture
def flag():
    """A pole along z with a flag at its top, towards +x."""
    pole = np.stack([np.zeros(200), np.zeros(200), np.linspace(-1, 1, 200)], 1)
    x, z = np.meshgrid(np.linspace(0, 0.8, 30), np.linspace(0.5, 1, 20))
    return np.concatenate([pole, np.stack([x.ravel(), np.zeros(x.size), z.ravel()], 1)])


@pytest.mark.parametrize("view", [module.VIEW, FRONT])
def test_z_is_up_and_x_is_to_the_right(drawing, flag, view):
    mask = drawn(render_clouds([flag], view=view, point_size=4)[0])
    left, _, top, bottom = extent(mask)
    upper = extent(mask[top : top + (bottom - top) // 4])
    lower = extent(mask[bottom - (bottom - top) // 4 : bottom])
    assert abs(lower[0] - left) < 8 and lower[1] - lower[0] < 12, (
        "the pole, at the left of the flag, reaches down alone"
    )
    assert upper[0] - left < 12 and upper[1] - lower[1] > 60, "the flag is at the top and flies to the right"
    mirrored = drawn(render_clouds([flag * (-1, 1, 1)], view=view, point_size=4)[0])
    assert extent(mirrored)[1] - extent(mirrored[bottom - 40 : bottom])[1] < 8, "towards -x it flies to the left"


def test_the_camera_looks_from_the_front_and_above(drawing):
    """With the default view the point nearer to -y hides the one behind it, and a lid hides what lies below."""
    azimuth, elevation = np.radians(module.VIEW)
    assert -math.pi < azimuth < 0 < elevation
    towards = np.array(
        [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
    )
    (image,) = render_clouds([np.stack([towards, -towards])], colors=[np.array([RED, BLUE])], point_size=20)
    mask = drawn(image)
    assert mask.any() and (image[mask][:, 0].astype(int) > image[mask][:, 2]).all()


def test_one_scale_for_all_and_the_largest_fills_its_image(drawing):
    size, point = 200, 4
    images = render_clouds([SQUARE, SQUARE / 2, SQUARE + 5], size=size, view=FRONT, point_size=point)
    boxes = [extent(drawn(image)) for image in images]
    widths = [box[1] - box[0] + 1 - point for box in boxes]
    assert widths[0] == pytest.approx(2 * (0.47 * size - point), abs=2)
    assert widths[1] == pytest.approx(widths[0] / 2, abs=2)
    assert boxes[2] == boxes[0], "centred, wherever the cloud lies"
    for left, right, top, bottom in boxes:
        assert right - left == pytest.approx(bottom - top, abs=1)
        assert left + right == pytest.approx(size - 1, abs=2) and top + bottom == pytest.approx(size - 1, abs=2)


def test_clouds_keep_their_places_when_not_centred(drawing):
    parts = [SQUARE / 4 + (-0.75, 0, 0.75), SQUARE / 4 + (0.75, 0, -0.75)]  # two corners of the unit square
    images = render_clouds([*parts, SQUARE], size=200, view=FRONT, point_size=4, centered=False)
    boxes = [extent(drawn(image)) for image in images]
    quarter = (boxes[2][1] - boxes[2][0] - 4) / 4
    left, right, top, bottom = boxes[2]
    assert boxes[0] == pytest.approx((left, left + quarter + 4, top, top + quarter + 4), abs=2)
    assert boxes[1] == pytest.approx((right - quarter - 4, right, bottom - quarter - 4, bottom), abs=2)


@pytest.mark.parametrize("num_points", [1, 8, 256, 4000])
def test_nothing_is_cut_off(drawing, num_points):
    points = np.random.default_rng(0).normal(size=(num_points, 3))
    mask = drawn(render_clouds([points], size=120)[0])
    assert mask.any()
    assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.mark.parametrize("point_size", [3, 12, 24])
def test_point_size_is_the_diameter_in_pixels(drawing, point_size):
    left, right, top, bottom = extent(drawn(render_clouds([np.zeros((1, 3))], point_size=point_size)[0]))
    assert right - left + 1 == pytest.approx(point_size, abs=2)
    assert bottom - top + 1 == pytest.approx(point_size, abs=2)


def test_scales_are_relative_to_the_point_size(drawing):
    pair = np.array([(-1.0, 0, 0), (1.0, 0, 0)])
    (image,) = render_clouds([pair], scales=[[1.0, 3.0]], view=FRONT, point_size=8)
    mask = drawn(image)
    small, large = extent(mask[:, :160]), extent(mask[:, 160:])
    assert small[3] - small[2] + 1 == pytest.approx(8, abs=2) and large[3] - large[2] + 1 == pytest.approx(24, abs=2)
    assert large[1] < 158, "and is not cut off"


def test_points_are_smaller_where_they_are_many(drawing):
    line = np.stack([np.zeros(2000), np.zeros(2000), np.linspace(-1, 1, 2000)], 1)
    widths = []
    for step in (200, 20, 1):
        left, right, _, _ = extent(drawn(render_clouds([line[::step]])[0]))
        widths.append(right - left)
    assert widths[0] > widths[1] > widths[2] >= 1


def test_colours_per_point_and_per_cloud_come_out(drawing):
    halves = np.where(SQUARE[:, :1] < 0, RED, BLUE)
    red, both = render_clouds([SQUARE, SQUARE], colors=[RED, halves], view=FRONT, point_size=16)
    pixels = red[drawn(red)].astype(int)
    assert len(pixels) > 400
    assert (pixels[:, 0] > pixels[:, 1] + 3).all() and (abs(pixels[:, 1] - pixels[:, 2]) <= 2).all()
    mask = drawn(both)
    redder = both[..., 0].astype(int) > both[..., 2]
    assert redder[:, :160][mask[:, :160]].all() and not redder[:, 160:][mask[:, 160:]].any()


def test_height_is_a_colormap_from_dark_to_light(drawing):
    points = np.array([(0, 0, z) for z in (-3.0, 0.0, 1.0)])
    expected = colormaps["viridis"](np.array([0.05, 0.05 + 0.85 * 0.75, 0.9]))[:, :3]
    assert np.allclose(height_colors(points), expected)
    assert np.allclose(height_colors(np.zeros((4, 3))), colormaps["viridis"](0.475)[:3]), "flat: the middle"
    (image,) = render_clouds([SQUARE], view=FRONT, point_size=16)
    (given,) = render_clouds([SQUARE], colors=[height_colors(SQUARE)], view=FRONT, point_size=16)
    assert np.array_equal(image, given), "the default colours"
    mask = drawn(image)
    assert image[:160][mask[:160]].mean() > image[160:][mask[160:]].mean() + 30


def test_far_points_fade(drawing):
    near_and_far = np.array([(-1.0, -1.0, 0.0), (1.0, 1.0, 0.0)])
    (image,) = render_clouds([near_and_far], colors=[RED], view=FRONT, point_size=16)
    mask = drawn(image)
    assert image[:, :160][mask[:, :160]][:, 1].min() == 0, "the nearest point has its own colour"
    assert image[:, 160:][mask[:, 160:]][:, 1].min() > 40


def test_empty_clouds_and_tensors(drawing):
    import torch

    empty, array, tensor = render_clouds([np.zeros((0, 3)), SQUARE, torch.tensor(SQUARE, dtype=torch.float32)])
    assert not drawn(empty).any()
    assert drawn(array).any() and np.array_equal(array, tensor)
    assert array.shape == (320, 320, 3) and array.dtype == np.uint8


def test_nothing_is_printed(drawing, capfd):
    render_clouds([SQUARE])
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "after\n" and captured.err == ""


@pytest.mark.parametrize(
    ("clouds", "options", "message"),
    [
        ([], {}, "no cloud to draw"),
        ([SQUARE, np.zeros((5, 2))], {}, r"cloud 1 has shape \(5, 2\), must be \(N, 3\)"),
        ([np.full((4, 3), np.nan)], {}, "cloud 0 has coordinates that are not finite"),
        (
            [SQUARE],
            {"colors": [np.zeros((3, 3))]},
            r"colors of cloud 0 have shape \(3, 3\), must be \(4, 3\) or \(3,\)",
        ),
        ([SQUARE], {"colors": [(255, 0, 0)]}, r"colors of cloud 0 must lie in \[0, 1\]"),
        ([SQUARE], {"colors": [RED, RED]}, "colors of 2 clouds for 1 clouds"),
        ([SQUARE], {"scales": [None, None]}, "scales of 2 clouds for 1 clouds"),
        ([SQUARE], {"scales": [[1.0, 2.0]]}, r"scales of cloud 0 have shape \(2,\), must be \(4,\)"),
        ([SQUARE], {"scales": [[1.0, 2.0, 0.0, 1.0]]}, "scales of cloud 0 must be above 0"),
        ([SQUARE], {"size": 4}, "size is 4, must be at least 16"),
        ([SQUARE], {"point_size": 0}, "point_size is 0, must be above 0"),
    ],
)
def test_wrong_arguments_are_named(clouds, options, message):
    with pytest.raises(InputError, match=message):
        render_clouds(clouds, **options)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_open3d_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(InputError, match=r"need open3d .*install it: pip install open3d$") as error:
        render_clouds([SQUARE])
    one_line(error)


def test_missing_system_library_is_named(monkeypatch, tmp_path):
    """What Python says when a library of the system is missing: an ImportError out of open3d."""
    package = tmp_path / "open3d"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise ImportError('libusb-1.0.so.0: cannot open shared object file: No such file or directory')\n"
    )
    monkeypatch.delitem(sys.modules, "open3d", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"libusb-1\.0\.so\.0.*sudo apt-get install libusb-1\.0-0 ") as error:
        render_clouds([SQUARE])
    one_line(error)


def test_no_renderer_is_named(drawing, monkeypatch):
    import open3d

    monkeypatch.setattr(open3d.visualization.Visualizer, "create_window", lambda *args, **kwargs: False)
    with pytest.raises(InputError, match=r"nothing to draw with .*sudo apt-get install .*libgl1-mesa-dri$") as error:
        render_clouds([SQUARE])
    one_line(error)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DISPLAY is how Linux names a screen")
@pytest.mark.parametrize("display", [None, ":4711"])
def test_a_window_without_a_screen_is_refused(drawing, monkeypatch, display):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if display:
        monkeypatch.setenv("DISPLAY", display)  # no server there: Open3D would draw on no screen, for ever
    with pytest.raises(InputError, match=r"no screen for a window: .*--output FILE\.png") as error:
        show_window([SQUARE])
    one_line(error)


def test_a_window_shows_the_clouds_as_a_grid(drawing, monkeypatch):
    frames = []
    open_window = module.open_window

    @contextlib.contextmanager
    def on_no_screen(width, height, **_):
        """The real window but for the screen; it is closed after the first frame."""
        with open_window(width, height, visible=False) as visualizer:
            poll = visualizer.poll_events

            class Watched:
                def __getattr__(self, name):
                    return getattr(visualizer, name)

                def poll_events(self):
                    frames.append(np.asarray(visualizer.capture_screen_float_buffer(do_render=True)))
                    return poll() and len(frames) < 2

            yield Watched()

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(module, "open_window", on_no_screen)
    show_window([SQUARE, SQUARE], ["left", "right"], colors=[RED, BLUE], columns=2, marks=["lime", None], view=FRONT)
    image = (255 * frames[-1]).astype(int)
    r, g, b = np.moveaxis(image, -1, 0)
    red, blue, green = (extent(m) for m in ((r > g + 40) & (r > b + 40), (b > r + 40) & (b > g + 40), g > r + 100))
    middle = image.shape[1] / 2
    assert red[1] < middle < blue[0]
    assert red[2:] == pytest.approx(blue[2:], abs=1) and blue[0] + red[1] == pytest.approx(image.shape[1] - 1, abs=4)
    assert green[0] < red[0] and red[1] < green[1] < blue[0] and green[2] < red[2] and red[3] < green[3], "the frame"
    ink = image.max(-1) < 80
    assert ink[blue[3] :, blue[0] :].any() and not ink[: blue[3]].any(), "the caption is below"


def test_a_window_wants_a_caption_for_each_cloud(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(InputError, match="2 clouds, 1 captions and 2 marks"):
        show_window([SQUARE, SQUARE], ["one"])


# Grids need no Open3D: flat images stand for clouds.

FLAT = [np.full((100, 100, 3), (200, 10 * index, 100), np.uint8) for index in range(5)]


def read(path):
    return np.rint(255 * imread(path)[..., :3]).astype(int)


def test_a_grid_has_every_image_unchanged_in_reading_order(tmp_path):
    path = tmp_path / "grid.png"
    assert draw_grid(FLAT, ["one", "two", "three", "four", "five"], path, columns=2) == path
    image = read(path)
    boxes = []
    for flat in FLAT:
        mask = (image == flat[0, 0]).all(-1)
        assert mask.sum() == 100 * 100
        left, right, top, bottom = extent(mask)
        assert (right - left, bottom - top) == (99, 99)
        assert (image[bottom + 1 : bottom + 16, left : right + 1] < 100).any(), "its caption is below"
        boxes.append((left, top))
    columns, rows = sorted({left for left, _ in boxes}), sorted({top for _, top in boxes})
    assert boxes == [(columns[index % 2], rows[index // 2]) for index in range(5)]
    assert (image[0] == 255).all() and (image[:, 0] == 255).all()
    assert list(tmp_path.iterdir()) == [path]


def test_a_mark_frames_one_image_and_colours_its_caption(tmp_path):
    image = read(draw_grid(FLAT[:2], ["right", "wrong"], tmp_path / "grid.png", columns=2, marks=[None, "#0000ff"]))
    blue = (image == (0, 0, 255)).all(-1)
    left, right, top, bottom = extent(blue)
    inner = extent((image == FLAT[1][0, 0]).all(-1))
    assert left < inner[0] and inner[1] < right and top < inner[2] and bottom > inner[3] + 4
    assert left > image.shape[1] / 2


@pytest.mark.parametrize("title", [None, "short", "a title that is far too long for one image of this width " * 3])
def test_texts_stay_within_their_room(tmp_path, title):
    captions = ["a caption that is far too long for an image of this size", "$b_1$"]
    image = read(draw_grid(FLAT[:2], captions, tmp_path / "grid.png", columns=2, title=title))
    ink = (image < 250).any(-1)
    first, second = (extent((image == flat[0, 0]).all(-1)) for flat in FLAT[:2])
    below = ink[first[3] + 2 :]
    assert below[:, first[0] : first[1] + 1].any() and below[:, second[0] : second[1] + 1].any()
    assert not below[:, first[1] + 2 : second[0] - 1].any(), "the caption does not reach its neighbour"
    assert ink[: first[2] - 1].any() == (title is not None)
    assert not ink[:, -3:].any() and not ink[:, :3].any()


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (3, 1)), (12, (4, 3)), (40, (8, 5))])
def test_the_default_grid_is_wider_than_high(tmp_path, count, shape):
    flat = np.full((50, 50, 3), (200, 0, 100), np.uint8)
    image = read(draw_grid([flat] * count, [""] * count, tmp_path / "grid.png"))
    mask = (image == (200, 0, 100)).all(-1)
    starts = [int((np.diff(mask.any(axis).astype(int)) == 1).sum()) for axis in (0, 1)]
    assert tuple(starts) == shape


def test_a_failed_grid_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def full_disk(self, target, **_):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        draw_grid(FLAT, list("abcde"), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("images", "captions", "options", "message"),
    [
        ([], [], {}, "no image to draw"),
        (FLAT, ["one"], {}, "5 images, 1 captions and 5 marks"),
        (FLAT, list("abcde"), {"marks": ["red"]}, "5 images, 5 captions and 1 marks"),
        ([FLAT[0], FLAT[1][:50, :50]], ["a", "b"], {}, "images of several sizes"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, images, captions, options, message):
    with pytest.raises(InputError, match=message):
        draw_grid(images, captions, tmp_path / "grid.png", **options)
    assert not list(tmp_path.iterdir())
