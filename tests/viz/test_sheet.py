"""Sheets as files: read back by another program, or opened in a browser."""

import io
import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from s2d3d.errors import InputError
from s2d3d.viz import CloudSheet, height_colors, sheet_paths, write_sheet
from s2d3d.viz.sheet import cloud_page, embed_json, encode_ply

GENERATOR = np.random.default_rng(0)
CLOUDS = [GENERATOR.normal(size=(count, 3)).astype(np.float32) for count in (50, 200, 3)]
COLORS = [GENERATOR.random((50, 3)), None, (1.0, 0.0, 0.0)]
SHEET = CloudSheet(CLOUDS, ["a\nfirst", "b", "ü"], "title\nmore", COLORS, [None, np.linspace(1, 3, 200), None])


def read_ply(path):
    """A reader of its own: head, points (N, 3), colours (N, 3) as bytes."""
    head, _, body = path.read_bytes().partition(b"end_header\n")
    rows = np.frombuffer(body, [("p", "<f4", 3), ("c", "u1", 3)])
    return head.decode().splitlines(), rows["p"], rows["c"]


def test_ply_files_are_numbered_and_hold_points_colours_and_captions(tmp_path):
    paths = write_sheet(SHEET, tmp_path / "cloud.ply")
    assert [path.name for path in paths] == ["cloud_1.ply", "cloud_2.ply", "cloud_3.ply"]
    assert sorted(tmp_path.iterdir()) == paths
    wanted = [COLORS[0], height_colors(CLOUDS[1]), np.tile((1.0, 0, 0), (3, 1))]
    for path, cloud, colors, comment in zip(paths, CLOUDS, wanted, ("a, first", "b", "?")):
        head, points, rgb = read_ply(path)
        assert head[:4] == [
            "ply",
            "format binary_little_endian 1.0",
            f"comment {comment}",
            f"element vertex {len(cloud)}",
        ]
        assert np.array_equal(points, cloud) and np.array_equal(rgb, np.rint(255 * colors))
    assert [path.name for path in write_sheet(CloudSheet(CLOUDS[:1], [""], "t"), tmp_path / "one.PLY")] == ["one.PLY"]


def test_open3d_reads_the_ply_files(drawing, tmp_path):
    import open3d

    (path,) = write_sheet(CloudSheet(CLOUDS[:1], ["a\nb"], "t", COLORS[:1]), tmp_path / "cloud.ply")
    cloud = open3d.io.read_point_cloud(str(path))
    assert np.array_equal(np.asarray(cloud.points).astype(np.float32), CLOUDS[0])
    assert np.asarray(cloud.colors) == pytest.approx(COLORS[0], abs=0.5 / 255)


def test_an_empty_cloud_is_a_file_too():
    assert b"element vertex 0\n" in encode_ply(np.zeros((0, 3)), np.zeros((0, 3)))


def test_png_is_the_grid(drawing, tmp_path):
    assert write_sheet(SHEET, tmp_path / "grid.png", size=64) == [tmp_path / "grid.png"]
    assert imread(tmp_path / "grid.png").shape[0] > 64


def test_the_page_needs_nothing_else():
    page = cloud_page(CloudSheet(CLOUDS, ["</script><b>", "b", "c"], "<title> & more"))
    assert page.count("</script>") == 3, "plotly, the data and the program; a caption ends none of them"
    assert "<title>&lt;title&gt; &amp; more</title>" in page
    for sign in ("src=", "<link", "@import"):
        head = page[: page.index("<script>")] + page[page.index("<body>") :]  # plotly's own text names much
        assert sign not in head


def test_the_page_shows_the_clouds_in_a_browser(browser, tmp_path):
    sheet = CloudSheet([CLOUDS[0], CLOUDS[2]], ["first", "second"], "title", [(1.0, 0.0, 0.0)] * 2)
    (tmp_path / "clouds.html").write_text(cloud_page(sheet, at_once=1))
    browser.open(tmp_path / "clouds.html")
    browser.wait("document.querySelectorAll('.plot .gl-container').length === 1")
    assert browser.evaluate("document.getElementById('place').textContent") == "1 to 1 of 2"
    shown = browser.evaluate("['x', 'y', 'z'].map(k => Array.from(document.querySelector('.plot').data[0][k]))")
    assert np.array_equal(np.array(shown, np.float32).T, CLOUDS[0])
    assert browser.evaluate("document.querySelector('.plot').data[0].marker.color[7]") == "rgb(255,0,0)"

    def red():
        pixels = imread(io.BytesIO(browser.screenshot()))[..., :3]
        return int(((pixels[..., 0] > 0.8) & (pixels[..., 1:].max(-1) < 0.3)).sum())

    assert any(red() > 300 for _ in range(50)), "points are drawn, not only known"
    browser.click("#next")
    captions = "Array.from(document.querySelectorAll('figcaption'), e => e.textContent)"
    assert browser.evaluate(captions) == ["second"]
    assert all(not address.startswith("http") for address in browser.requests) and browser.errors == []


@pytest.mark.parametrize(
    ("count", "name", "names"),
    [
        (1, "a.ply", ["a.ply"]),
        (2, "a.png", ["a.png"]),
        (2, "a.b.ply", ["a.b_1.ply", "a.b_2.ply"]),
        (9, "x.HTML", ["x.HTML"]),
    ],
)
def test_names_of_files(count, name, names):
    assert [path.name for path in sheet_paths(name, count)] == names


def test_wrong_sheets_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a.jpg: the picture is a PNG, PLY or HTML file; .* \.png, \.ply or \.html"):
        write_sheet(SHEET, tmp_path / "a.jpg")
    with pytest.raises(InputError, match="no cloud to draw"):
        CloudSheet([], [], "t")
    with pytest.raises(InputError, match="3 clouds, 1 captions and 3 marks"):
        CloudSheet(CLOUDS, ["a"], "t")
    with pytest.raises(InputError, match="scales of 1 clouds for 3 clouds"):
        CloudSheet(CLOUDS, ["a", "b", "c"], "t", scales=[None])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=r'^the page needs plotly .*: pip install "s2d3d\[html\]"$'):
        write_sheet(SHEET, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_json_in_a_page_is_the_same_json():
    content = {"text": "</script><!-- & \u2028", "number": 1.5}
    assert json.loads(embed_json(content)) == content and "<" not in embed_json(content)
