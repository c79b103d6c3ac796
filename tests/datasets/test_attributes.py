"""Normals and colours of files become unit vectors and shares in [0, 1]."""

import numpy as np
import pytest

from s2d3d.datasets.attributes import are_unit, unit_colors, unit_normals
from s2d3d.errors import InputError


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int32])
def test_normals_get_unit_length_and_keep_their_direction(dtype):
    normals = np.array([[0, 3, -4], [0, 0, 0], [2, 0, 0]]).astype(dtype)
    np.testing.assert_allclose(unit_normals(normals, "a"), [[0, 0.6, -0.8], [0, 0, 0], [1, 0, 0]], rtol=1e-6)


def test_the_largest_and_smallest_normals_keep_their_direction():
    for size in (1e-30, 1e30, 3e38):
        normals = np.array([[size, -size, 0]], np.float32)
        np.testing.assert_allclose(unit_normals(normals, "a"), [[0.5**0.5, -(0.5**0.5), 0]], rtol=1e-5)


def test_a_normal_that_is_not_finite_is_named():
    normals = np.ones((2, 4, 3))
    normals[1, 2, 0] = np.nan
    with pytest.raises(InputError, match=r"^a\.h5: normal 1, 2 is not three finite numbers; correct it$"):
        unit_normals(normals, "a.h5")


def test_unit_vectors_are_told_from_other_numbers():
    rng = np.random.default_rng(0)
    normals = unit_normals(rng.normal(size=(50, 3)), "a")
    assert are_unit(normals) and are_unit(normals.round(2)) and are_unit(normals.astype(np.float16))
    assert are_unit(np.concatenate([normals, np.zeros((1, 3))]))
    assert not are_unit(rng.random((50, 3))) and not are_unit(np.zeros((50, 3))) and not are_unit(normals * 1.1)
    assert not are_unit(np.full((1, 3), np.nan))


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 51, 255], "u1", [0, 0.2, 1]),
        ([0, 1, 1], "u1", [0, 1 / 255, 1 / 255]),
        ([0, 51, 255], "u2", [0, 0.2, 1]),
        ([0, 13107, 65535], "u2", [0, 0.2, 1]),
        ([0, 51, 255], "i4", [0, 0.2, 1]),
        ([0, 0.2, 1], "f4", [0, 0.2, 1]),
        ([0, 51, 255], "f8", [0, 0.2, 1]),
    ],
)
def test_colours_by_type_and_largest_number(values, dtype, expected):
    found = unit_colors(np.array([values], dtype), "a")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_in_an_hdf5_file_the_type_alone_tells():
    np.testing.assert_allclose(unit_colors(np.array([[0, 51, 255]], "u2"), "a", by_type=True)[0, 2], 255 / 65535)
    with pytest.raises(InputError, match=r"a: colours hold 51, must be in \[0, 1\]; correct them"):
        unit_colors(np.array([[0, 51.0, 51]]), "a", by_type=True)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-0.1, 0, 1], r"hold -0.1, must be in \[0, 1\], or all in \[0, 255\]"),
        ([0, 0, 256.0], "hold 256, must be in"),
        ([0, 0, np.nan], "hold a number that is not finite"),
        (np.array([0, 0, 70000]), r"hold 70000, must be in \[0, 65535\]"),
        (np.array([-1, 0, 3]), r"hold -1, must be in \[0, 255\]"),
    ],
)
def test_colours_out_of_range_are_refused(values, text):
    with pytest.raises(InputError, match=f"^a.ply: colours {text}"):
        unit_colors(np.array([values]), "a.ply")
