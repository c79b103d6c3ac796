"""Polygons of any shape: their triangles cover them once and nothing else."""

import numpy as np
import pytest

from s2d3d.datasets.files import read_points
from s2d3d.datasets.polygons import cut_polygons
from s2d3d.errors import InputError

C = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (0, 3)]
SQUARE_WITH_A_HOLE = [(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)]
STAR = [(np.cos(t) * r, np.sin(t) * r) for t, r in zip(np.arange(10) * np.pi / 5, [3, 1] * 5)]
SPIRAL = [(r * np.cos(t), r * np.sin(t)) for t, r in zip(np.linspace(0, 12, 60), np.linspace(1, 9, 60))]
SPIRAL += [(1.2 * x, 1.2 * y) for x, y in SPIRAL[::-1]]
COMB = [(0, -1), *((x, 5 * (x % 2)) for x in range(41)), (40, -1)][::-1]
SHAPES = {
    "arrow": [(0, 0), (2, 1), (0, 2), (0.5, 1)], "C": C, "hole": SQUARE_WITH_A_HOLE, "star": STAR, "spiral": SPIRAL,
    "comb": COMB, "collinear": [(0, 0), (1, 0), (2, 0), (2, 2), (1, 1), (0, 2), (0, 1)],
    "double corners": [corner for corner in C for _ in range(2)],
}  # fmt: skip


def inside(points, polygon):
    """Tell by the even-odd rule which points (n, 2) lie in a polygon."""
    found = np.zeros(len(points), bool)
    for (x, y), (u, v) in zip(polygon, np.roll(polygon, -1, axis=0)):
        crosses = (y > points[:, 1]) != (v > points[:, 1])
        with np.errstate(all="ignore"):
            found ^= crosses & (points[:, 0] < x + (points[:, 1] - y) / (v - y) * (u - x))
    return found


def shoelace(polygon):
    x, y = np.transpose(polygon)
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def check(polygon, triangles):
    sides = polygon[triangles[:, 1:]] - polygon[triangles[:, :1]]
    areas = np.abs(np.linalg.det(sides)) / 2
    assert areas.sum() == pytest.approx(shoelace(polygon))
    shares = np.random.default_rng(0).dirichlet([1, 1, 1], 20)
    drawn = (shares @ polygon[triangles[areas > 1e-9]]).reshape(-1, 2)
    assert inside(drawn, polygon).mean() > 0.999


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_every_first_corner_and_every_plane(name, turned):
    shape, rng = np.array(SHAPES[name], float)[:: -1 if turned else 1], np.random.default_rng(1)
    for first in range(len(shape)):
        polygon = np.roll(shape, first, axis=0)
        frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        placed = np.c_[polygon, np.zeros(len(polygon))] @ frame + [5e5, 4e6, 30]
        triangles = cut_polygons(np.arange(len(polygon)), np.array([len(polygon)]), placed, "a.off")
        assert triangles.shape == (len(polygon) - 2, 3)
        check(polygon, triangles)


def test_random_polygons_beside_each_other():
    """Corners go once round the origin at random distances; quads among them are concave or convex."""
    rng = np.random.default_rng(2)
    counts = rng.integers(3, 12, 300)
    shapes = []
    for count in counts:
        angles = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.random() * 6
        shapes.append((np.stack([np.cos(angles), np.sin(angles)]) * rng.uniform(0.1, 1, count)).T)
    vertices = np.concatenate([np.c_[shape, np.full(len(shape), place)] for place, shape in enumerate(shapes)])
    triangles = cut_polygons(np.arange(len(vertices)), counts, vertices, "a.off")
    owners = np.repeat(np.arange(300), counts - 2)
    assert (vertices[triangles][:, :, 2] == owners[:, None]).all(), "in the order of the polygons"
    begins = np.cumsum(counts) - counts
    for place, shape in enumerate(shapes):
        check(shape, triangles[owners == place] - begins[place])


def test_quads_that_are_bent_stay_as_they_are():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0.3], [1, 1, 0], [0, 1, 0.3]])
    assert cut_polygons(np.arange(4), np.array([4]), vertices, "a").tolist() == [[0, 1, 2], [0, 2, 3]]


def test_quads_far_from_flat_are_no_crossing_polygons():
    """A noisy depth map: quads have no plane in which they could cross themselves."""
    noisy = np.random.default_rng(0)
    size = 30
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    vertices = np.stack([x, y, noisy.normal(size=x.shape)], axis=-1).reshape(-1, 3)
    first = (np.arange(size - 1)[:, None] * size + np.arange(size - 1)).ravel()
    quads = np.stack([first, first + 1, first + size + 1, first + size], axis=1)
    triangles = cut_polygons(quads.ravel(), np.full(len(quads), 4), vertices, "a")
    assert sorted(set(triangles[:2].ravel())) == sorted(quads[0]) and len(triangles) == 2 * len(quads)


def test_corners_that_are_rounded_far_from_the_origin_are_no_crossing():
    """What is wrong with such a file is said where its extent is looked at."""
    bow = np.array([[0.0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]])
    assert len(cut_polygons(np.arange(4), np.array([4]), bow + 1e6, "a")) == 2


def write(path, polygon, more=()):
    """Write a mesh of one polygon and other faces, as .off, .obj or .ply."""
    corners = [f"{x!r} {y!r} 0" for x, y in np.asarray(polygon, float).tolist()]
    faces = [range(len(corners)), *more]
    if path.suffix == ".obj":
        lines = [*("v " + c for c in corners), *("f " + " ".join(str(i + 1) for i in face) for face in faces)]
    else:
        head = [f"OFF {len(corners)} {len(faces)} 0"]
        if path.suffix == ".ply":
            head = [
                "ply",
                "format ascii 1.0",
                f"element vertex {len(corners)}",
                *(f"property float {a}" for a in "xyz"),
            ]
            head += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
        lines = [*head, *corners, *(" ".join(map(str, (len(face), *face))) for face in faces)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("suffix", [".off", ".obj", ".ply"])
def test_no_point_is_drawn_in_the_notch_of_a_letter(tmp_path, suffix):
    write(tmp_path / f"a{suffix}", C)
    points = read_points(tmp_path / f"a{suffix}", 4000)[:, :2]
    assert inside(points, np.array(C)).all()
    arms = ((points[:, 0] > 1) & (points[:, 1] < 1)).mean(), ((points[:, 0] > 1) & (points[:, 1] > 2)).mean()
    assert arms == pytest.approx((2 / 7, 2 / 7), abs=0.03)


@pytest.mark.parametrize("shape", [[(0, 0), (1, 1), (1, 0), (0, 1)], STAR[::2][::2] + STAR[::2][1::2]])
def test_a_polygon_that_crosses_itself_is_refused_unless_it_is_tiny(tmp_path, shape):
    write(tmp_path / "a.off", shape)
    with pytest.raises(InputError, match=r"a\.off: face 0 crosses itself, or cannot be cut into triangles; save tri"):
        read_points(tmp_path / "a.off", 8)
    corners = np.array([*shape, (0, 0), (999, 0), (999, 999)])
    vertices, counts = np.c_[corners, np.zeros(len(corners))], np.array([len(shape), 3])
    assert len(cut_polygons(np.arange(len(corners)), counts, vertices, "a.off")) == len(shape) - 1
