"""Long tables: the fast reader gives what Python's `float` gives, and the line of a mistake is the right one."""

import numpy as np
import pytest

from s2d3d.datasets import text
from s2d3d.datasets.files import read_points
from s2d3d.datasets.text import parse_rows
from s2d3d.errors import InputError

ROWS = 8_000  # more than a block


@pytest.fixture(scope="module")
def fields() -> list[list[str]]:
    points = np.random.default_rng(0).normal(size=(ROWS, 3)) * 10.0 ** np.arange(-4, 5, 4)
    forms = ("%.6f", "%.17g", "%.18e")
    return [[form % value for form, value in zip(forms, row)] for row in points.tolist()]


@pytest.mark.parametrize("separator", [" ", ",", ";", "\t", "  "])
def test_numbers_are_rounded_as_by_float(tmp_path, monkeypatch, fields, separator):
    monkeypatch.setattr(text, "CHUNK", 2**17)
    monkeypatch.setattr(text, "FAST_BYTES", 2**16)
    path = tmp_path / "long.txt"
    path.write_text("".join(separator.join(row) + "\n" for row in fields))
    assert path.stat().st_size > 4 * text.FAST_BYTES
    expected = np.array([[float(field) for field in row] for row in fields])
    assert np.array_equal(read_points(path, 1), expected)
    monkeypatch.setattr(text, "FAST_BYTES", 2**60)
    assert np.array_equal(read_points(path, 1), expected), "the slow reader gives the same"


@pytest.mark.parametrize("place", [0, 1_999, 4_000, ROWS])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,,3", "line {}: field 2 is empty"), ("1,2", "line {} holds 2 numbers, must be 3"),
        ("1,2,x", "line {}: 'x' is not a number"),
        ("1,2,3,4", "line {} holds 4 numbers, must be 3"), ("1,true,3", "line {}: 'true' is not a number"),
        ("1,1_0,3", "line {}: '1_0' is not a number"), ("1,0x1,3", "line {}: '0x1' is not a number"),
    ],
)  # fmt: skip
def test_the_line_of_a_mistake_is_named(fields, monkeypatch, place, row, message):
    monkeypatch.setattr(text, "CHUNK", 2**17)
    monkeypatch.setattr(text, "FAST_BYTES", 2**16)
    lines = [",".join(row) for row in fields]
    lines.insert(place, row)
    lines.insert(5, "# a comment")
    lines.insert(5, "")
    data = "\n".join(lines).encode()
    line = place + 1 + 2 * (place >= 5)
    with pytest.raises(InputError) as error:
        parse_rows(data, 3, separator=b",", where="long.csv")
    assert str(error.value).startswith("long.csv: " + message.format(line))


def test_points_that_are_missing_are_counted(tmp_path, fields, caplog):
    rows = [row if number % 1000 else ["nan", "inf", "-inf"] for number, row in enumerate(fields)]
    path = tmp_path / "long.xyz"
    path.write_text("".join(" ".join(row) + "\n" for row in rows))
    assert len(read_points(path, 1)) == ROWS - ROWS // 1000
    assert caplog.messages == [f"{path}: {ROWS // 1000} of {ROWS} points are not finite and left out"]
    with pytest.raises(InputError, match="point 0 is not three finite numbers; remove it"):
        read_points(path, 1, allow_missing=False)
