"""Tables of points as text, in any common layout."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, quoted
from .arrays import COUNTED, refuse_numbering, refuse_transposed
from .attributes import UNNAMED, Extras, named_columns
from .text import COMMENTS, number, parse_rows, read_bytes, split_fields, without_comments

SAMPLE = 50
"""Rows from which the layout of a table is told."""
_NUMERIC = re.compile(rb'[\s\d+\-.,;eEnaifNAIF"]*\d[\s\d+\-.,;eEnaifNAIF"]*|[\s,;"]*[-+]?(?:nan|inf)\b.*', re.I)
_DECIMAL = re.compile(rb"[-+]?\d*,\d+(?:[eE][-+]?\d+)?|[-+]?\d+(?:[eE][-+]?\d+)?")
_BOTH_COMMAS = re.compile(rb"[-+]?\d+,\d+(?:,\s+[-+]?\d+,\d+)+")
"""Commas with blanks behind every second one."""
_THOUSANDS = re.compile(rb"[-+]?[1-9]\d{0,2},\d{3}")
_WHOLE = re.compile(rb"[-+]?\d{1,3}")
_MAX_COLUMNS = 10_000
_ANNOUNCE = {"columns", "column", "fields", "field", "format", "header", "names", "order"}
"""Words of a comment after which names of columns follow."""
_COLUMN_NAMES = {
    *"xyzrgbaituv", "id", "nx", "ny", "nz", "rgb", "red", "green", "blue", "alpha", "rgba", "normal_x", "normal_y",
    "normal_z", "normalx", "normaly", "normalz", "intensity", "reflectance", "reflectivity", "time", "timestamp",
    "gps_time", "gpstime", "index", "label", "class", "classification", "confidence", "curvature", "ring", "range",
    "scalar", "instance", "segment", "object", "row", "col",
}  # fmt: skip
"""What columns of tables of points are called; a comment of other words is a sentence."""


@dataclass(frozen=True)
class _Layout:
    """How a text file holds its points: what stands between the numbers, and where the first row begins."""

    separator: bytes | None
    decimal_comma: bool
    columns: int
    axes: tuple[int, int, int]
    names: list[str] | None
    start: int
    line: int
    count: int | None


def read_text_table(path: Path, extras: Extras | None = None) -> np.ndarray:
    """Read rows of three or more numbers, of which x, y and z are taken.

    Numbers stand between blanks, commas, semicolons or tabs, one of these in the whole file; with blanks, semicolons or
    tabs, commas may be decimal. A header names the columns (`x y z`, `//X Y Z R G B`); without one the first three
    count. Four or more without names are refused where the first one seems to number the rows. A line with the number
    of points may stand in front. Comments begin with `#`, `//` or `%`.

    Args:
        path: the file.
        extras: takes normals and colours, where given and named; without names all columns behind the third.

    Returns:
        (N, 3) float64.

    Raises:
        InputError: it is no such table; the message names the line.
    """
    data = read_bytes(path)
    layout = _find_layout(path, data)
    if layout.decimal_comma:
        _refuse_thousands(path, data[layout.start :], layout.separator)
    further: dict[str, list[int]] = {}
    if extras is not None:
        unnamed = {UNNAMED: list(range(3, layout.columns))} if layout.columns > 3 else {}
        further = unnamed if layout.names is None else named_columns(layout.names)
    keep = [*layout.axes, *(column for columns in further.values() for column in columns)]
    points = parse_rows(
        data, layout.columns, keep, start=layout.start, separator=layout.separator,
        decimal_comma=layout.decimal_comma, line=layout.line, where=f"{path}: cannot be read as a table",
    )  # fmt: skip
    if layout.count is not None and layout.count != len(points):
        raise InputError(f"{path}: announces {layout.count} points and holds {len(points)}; is it cut short?")
    refuse_transposed(path, (len(points), layout.columns))
    if layout.names is None:
        _refuse_counts(path, points, layout)
    at = 3
    for group, columns in further.items():
        assert extras is not None
        extras[group] = points[:, at : at + len(columns)]
        at += len(columns)
    return points[:, :3]


def _refuse_counts(path: Path, points: np.ndarray, layout: _Layout) -> None:
    """Refuse the first of columns without names where it numbers the rows, or its first number counts them."""
    first = points[:, 0]
    if layout.columns > 3:
        refuse_numbering(path, points, "name the columns in a first line: index x y z")
    if len(first) < COUNTED:
        return
    if first[0] == len(first) - 1 and (first[1:] % 1).any():  # whole numbers may be a grid
        raise InputError(
            f"{path}: line {layout.line} begins with {len(first) - 1}, and as many rows follow; remove the line if it "
            "is their number, or name the columns in a first line"
        )


def _find_layout(path: Path, data: bytes) -> _Layout:
    lines = _sample(data)
    for line, _, text in lines:
        if len(text.split(None, _MAX_COLUMNS)) > _MAX_COLUMNS or max(map(text.count, (b",", b";"))) >= _MAX_COLUMNS:
            raise InputError(f"{path}: line {line} has more than {_MAX_COLUMNS:,} numbers; a row is one point: x, y, z")
    rows = [text for _, _, text in lines if _NUMERIC.fullmatch(text)]
    rows = [text for text in rows if not text.strip().isdigit()] or rows
    if not lines:
        raise InputError(f"{path}: holds no points, or is not a {path.suffix.lower()} file")
    if not rows:
        raise _no_number(path, lines)
    if any(re.search(rb'"[-+]?\d*,\d+(?:[eE][-+]?\d+)?"', row) for row in rows):
        raise InputError(f"{path}: holds decimal commas in quotes; write decimal points")
    separator, decimal_comma = _find_separator(path, rows)
    names, is_header, named_in, count = None, False, 0, None
    for line, start, text in lines:
        fields = split_fields(text.replace(b",", b".") if decimal_comma else text, separator)
        values = [number(field) for field in fields]
        if len(fields) == 1 and fields[0].isdigit() and count is None:
            count = int(fields[0])
        elif all(value is None for value in values) and any(fields) and not named_in:
            names, named_in = _words(text) if separator is None else _named_fields(text, separator), line
        else:
            if not named_in:
                names, is_header = _comment_names(data[:start])
            axes = _find_axes(path, names, len(fields), named_in, is_header)
            if len(fields) < 3:
                raise InputError(f"{path}: line {line} holds {len(fields)} numbers, must be 3 or more: x, y, z")
            if fields == [b"%d" % column for column in range(len(fields))] and any(b"." in row for row in rows):
                raise InputError(f"{path}: line {line} numbers the columns, it is no point; remove it")
            known = names if names is not None and axes == _named_axes(names, len(fields)) else None
            return _Layout(separator, decimal_comma, len(fields), axes, known, start, line, count)
    raise InputError(f"{path}: holds no points, its lines are a header and a count at most")


def _sample(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return the first lines that are neither blank nor comments: number, place and text of each."""
    found: list[tuple[int, int, bytes]] = []
    start = line = 0
    while start < len(data) and len(found) < SAMPLE:
        line += 1
        end = data.find(b"\n", start) + 1 or len(data)
        text = without_comments(data[start:end]).strip()
        if text and not text.startswith(COMMENTS) and not (line == 1 and re.match(rb'"?sep=', text, re.I)):  # for Excel
            found.append((line, start, text))
        start = end
    return found


def _find_separator(path: Path, rows: list[bytes]) -> tuple[bytes | None, bool]:
    """Tell what separates the numbers of some rows, and whether commas are decimal."""
    for separator in (b";", b"\t"):
        if all(separator in row for row in rows):
            fields = [field for row in rows for field in split_fields(row, separator)]
            if any(b" " in field for field in fields):  # tabs among blanks
                continue
            return separator, any(b"," in field for field in fields)
    if not any(b"," in row for row in rows):
        return None, False
    words = [row.split() for row in rows]
    if all(len(row) >= 3 and all(_DECIMAL.fullmatch(word) for word in row) for row in words):
        return None, True
    fields = [field for row in rows for field in split_fields(row, b",")]
    doubtful = any(re.fullmatch(rb"-0|[-+]?0\d+", field) for field in fields)
    whole = all(re.fullmatch(rb"[-+]?\d*", field) for field in fields)
    if all(_BOTH_COMMAS.fullmatch(row.strip()) for row in rows) or (
        whole and (doubtful or (len(rows) >= COUNTED and all(map(_one_decimal, rows))))
    ):
        raise InputError(f"{path}: commas stand between its numbers and within them; write decimal points")
    return b",", False


def _refuse_thousands(path: Path, rows: bytes, separator: bytes | None) -> None:
    """Refuse a column with numbers such as 895 and 1,038, whose comma separates thousands, or else decimals."""
    doubtful: dict[int, bytes] = {}
    whole, decimal = set(), set()
    for row in rows.split(b"\n"):
        for column, field in enumerate(split_fields(row, separator)):
            if b"," not in field:
                if column not in whole and _WHOLE.fullmatch(field):
                    whole.add(column)
            elif column not in decimal:
                if _THOUSANDS.fullmatch(field):
                    doubtful.setdefault(column, field)
                else:
                    decimal.add(column)
    for column, field in doubtful.items():
        if column in whole - decimal:
            raise InputError(
                f"{path}: does the comma in {field.decode()} separate thousands or decimals? Write numbers "
                "without commas, with decimal points"
            )


def _one_decimal(row: bytes) -> bool:
    """Tell whether each second number of a row is a single digit, as where `2,3` stands for 2.3."""
    decimals = split_fields(row, b",")[1::2]
    return len(decimals) >= 3 and row.count(b",") % 2 == 1 and all(re.fullmatch(rb"\d", part) for part in decimals)


def _comment_names(head: bytes) -> tuple[list[str] | None, bool]:
    """Return the words of a comment in front of the table that names x, y and z, and if they are surely a header."""
    found = None
    for line in head.split(b"\n"):
        text = line.strip()
        if not text.startswith(COMMENTS):
            continue
        words = [re.sub(r"(?<=.)[\[(].*$", "", word) for word in _words(text)]
        announced = bool(words) and words[0].removesuffix(":") in _ANNOUNCE
        words = words[1:] if announced or (words and words[0].endswith(":")) else words
        if {"x", "y", "z"} <= set(words):
            if announced or set(words) <= _COLUMN_NAMES:
                return words, True
            found = found or words
    return found, False


def _words(text: bytes) -> list[str]:
    words = re.split(r'[\s,;"]+', text.decode("utf-8", "replace").strip().lstrip("#/%").strip(' \t"'))
    return [word.lower() for word in words if word]


def _named_fields(text: bytes, separator: bytes) -> list[str]:
    """Return the names in a header line, one a field: without quotes and units, as `x [m]` has them; "" without one."""
    fields = (
        text.decode("utf-8", "replace").strip().lstrip("#/%").removesuffix(separator.decode()).split(separator.decode())
    )
    names = [re.sub(r"\s*[\[(].*[\])]$", "", field.strip(' \t"')).lower() for field in fields]
    return names if set("xyz") <= set(names) else _words(text)


def _named_axes(names: list[str], columns: int) -> tuple[int, ...] | None:
    """Return which columns are x, y and z, None where the names do not tell."""
    if len(names) != columns or any(names.count(axis) != 1 for axis in "xyz"):
        return None
    return tuple(names.index(axis) for axis in "xyz")


def _find_axes(path: Path, names: list[str] | None, columns: int, line: int, is_header: bool) -> tuple[int, int, int]:
    """Return which columns are x, y and z, by their names where there are any."""
    unclear = names is None or any(names.count(axis) != 1 for axis in "xyz")
    if names is None or (not line and unclear):
        return (0, 1, 2)
    if not line and names[:3] == ["x", "y", "z"]:
        return (0, 1, 2)
    if not line and (len(names) != columns or not is_header):  # a sentence, as far as one can tell
        places = [names.index(axis) for axis in "xyz"]
        in_another_order = max(places) - min(places) == 2 and places != sorted(places)
        if columns == 3 and not in_another_order:
            return (0, 1, 2)
        shown = quoted(" ".join(names), 60)
        raise InputError(
            f"{path}: which columns are x, y and z? A comment says {shown}, the rows have {columns} columns; correct it"
        )
    if unclear:
        shown = quoted(" ".join(names), 60)
        raise InputError(f"{path}: line {line}: {shown} is neither numbers nor a header with x, y and z; correct it")
    if len(names) != columns:
        raise InputError(f"{path}: line {line} names {len(names)} columns, the rows have {columns}; correct it")
    return names.index("x"), names.index("y"), names.index("z")


def _no_number(path: Path, lines: list[tuple[int, int, bytes]]) -> InputError:
    """Name the first word of the first row, which is the first line with a number in it, if there is one."""
    split = [(line, [word.strip(b'"') for word in re.split(rb"[\s,;]+", text) if word]) for line, _, text in lines]
    rows = [(line, words) for line, words in split if any(number(word) is not None for word in words)]
    line, words = (rows or split)[0]
    word = next((word for word in words if number(word) is None), lines[0][2])
    shown = quoted(word.decode("utf-8", "replace"), 40)
    advice = "; remove this column" if len(rows) > 1 and not re.search(rb"[\d#]", word) else ""
    return InputError(f"{path}: cannot be read as a table: line {line}: {shown} is not a number{advice}")
