import numpy as np
import pytest

from s2d3d.datasets.mesh import read_off
from s2d3d.errors import InputError

TETRAHEDRON = "0 0 0\n1 0 0\n0 1 0\n0 0 1.5e0\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"


@pytest.fixture
def off(tmp_path):
    def write(text):
        path = tmp_path / "mesh.off"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    "header",
    ["OFF\n4 4 0\n", "OFF4 4 0\n", "OFF 4 4 0\n", "OFF4 4 6\n", "OFF\r\n4 4 0\r\n", "# made by hand\n\nOFF\n\n4 4 0\n"],
)
def test_headers(off, header):
    vertices, faces = read_off(off(header + TETRAHEDRON))
    np.testing.assert_array_equal(vertices, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.5]])
    np.testing.assert_array_equal(faces, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])


def test_polygons_become_fans_and_colours_are_passed_over(off):
    corners = ("0 0 0", "1 0 0", "1 1 0", "0 1 0", "0 0 1")
    body = "".join(f"{corner} 255 0 0\n" for corner in corners) + "4 0 1 2 3 0.5 0.5 0.5\n3 0 1 4 # side\n"
    vertices, faces = read_off(off("OFF\n5 2 0\n" + body))
    np.testing.assert_array_equal(vertices[2], [1, 1, 0])
    np.testing.assert_array_equal(faces, [[0, 1, 2], [0, 2, 3], [0, 1, 4]])
    corners = vertices[faces[:2]]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    assert area == 1, "the fan covers the square once"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its first word must be OFF"),
        ("ply\nformat ascii 1.0\n", "its first word must be OFF"),
        (b"OFF\n\xff\xfe", "not an OFF file"),
        ("OFF\n", "not an OFF file"),
        ("OFF\nfour 4 0\n" + TETRAHEDRON, "not an OFF file"),
        ("OFF\n4 5 0\n" + TETRAHEDRON, "is cut short: 8 lines follow, 4 vertices and 5 faces are announced"),
        ("OFF\n4 0 0\n" + TETRAHEDRON, "4 vertices and 0 faces are no mesh"),
        ("OFF\n4 4 0\n" + TETRAHEDRON.replace("3 1 2 3", "3 1 2 4"), "a face names a vertex outside the 4"),
        ("OFF\n4 4 0\n" + TETRAHEDRON.replace("3 1 2 3", "3 1 2 -1"), "a face names a vertex outside the 4"),
        ("OFF\n4 4 0\n" + TETRAHEDRON.replace("3 1 2 3", "4 1 2 3"), "face '4 1 2 3'"),
        ("OFF\n4 4 0\n" + TETRAHEDRON.replace("3 1 2 3", "2 1 2"), "face '2 1 2'"),
        ("OFF\n4 4 0\n" + TETRAHEDRON.replace("1.5e0", "nan"), "a vertex is not three finite numbers"),
        ("OFF\n4 4 0\n" + TETRAHEDRON.replace("0 1 0\n", "0 1\n"), "not an OFF file"),
    ],
)
def test_what_is_wrong_is_one_line(off, text, words):
    path = off(text)
    with pytest.raises(InputError) as caught:
        read_off(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.off: no such file"):
        read_off(tmp_path / "none.off")
