"""Tables of points: text of any common layout, and NumPy's files."""

import logging
import lzma
import math
import re
import tokenize
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import InputError, quoted
from .attributes import UNNAMED, Extras, named_columns
from .text import COMMENTS, number, parse_rows, read_bytes, split_fields

log = logging.getLogger(__name__)

SAMPLE = 50
"""Rows from which the layout of a table is told."""
MAX_EXPANSION = 100
"""Largest ratio of an array to its compressed bytes, above `SMALL`."""
SMALL = 2**28
MOST_COLUMNS = 32
"""Of an array whose first three columns are taken for x, y and z."""

_NUMERIC = re.compile(rb'[\s\d+\-.,;eEnaifNAIF"]*\d[\s\d+\-.,;eEnaifNAIF"]*|[\s,;"]*[-+]?(?:nan|inf)\b.*', re.I)
_DECIMAL = re.compile(rb"[-+]?\d*,\d+(?:[eE][-+]?\d+)?|[-+]?\d+(?:[eE][-+]?\d+)?")
_BOTH_COMMAS = re.compile(rb"[-+]?\d+,\d+(?:,\s+[-+]?\d+,\d+)+")
"""Commas with blanks behind every second one."""
_ZIP = b"PK\x03\x04"
_PREFERRED = ("points", "xyz", "pos", "data")
_ARRAYS = {"normal": ("normals", "normal"), "rgb": ("colors", "colours", "color", "rgb")}
"""Names of arrays in an archive, beside that of the points."""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

_MAX_COLUMNS = 10_000
_NARROW = 16
"""Points of a row of a map, in a narrower one neighbours are not close; and rows of a table that count themselves."""
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, OSError,
    UnicodeDecodeError,
)  # fmt: skip
"""What Python's own readers of archives raise."""
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
    count. A line with the number of points may stand in front. Comments begin with `#`, `//` or `%`.

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
    _refuse_transposed(path, (len(points), layout.columns))
    if layout.names is None:
        _refuse_counts(path, points[:, 0], layout)
    at = 3
    for group, columns in further.items():
        assert extras is not None
        extras[group] = points[:, at : at + len(columns)]
        at += len(columns)
    return points[:, :3]


def read_array(path: Path, extras: Extras | None = None) -> np.ndarray:
    """Read the points of a `.npy` or `.npz` file, told apart by their content.

    Arrays are (N, 3 or more), maps (H, W, 3), or records with fields x, y and z. Of several arrays in an archive the
    one called points, xyz, pos or data is read, or the only one of such a shape.

    Args:
        path: the file.
        extras: takes normals and colours, where given: fields of records, arrays of the archive called normals or
            colors, or else all columns behind the third.

    Returns:
        (N, 3) float64.

    Raises:
        InputError: damaged, cut short, of another shape or type.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(_ZIP))
        file.seek(0)
        if head.startswith(_ZIP):
            return _read_archive(path, file, extras)
        return _to_points(path, _read_npy(f"{path}", file, size), extras)


def _read_npy(where: str, file: BinaryIO, size: int) -> np.ndarray:
    """Read one array after comparing what its header announces with what is there."""
    shape, order, dtype = _npy_header(where, file)
    if dtype.hasobject:
        raise InputError(f"{where}: holds Python objects, which are not read; save an array of numbers")
    wanted, left = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or wanted != left:
        state = "is cut short" if wanted > left else "is damaged"
        raise InputError(f"{where}: {state}: shape {shape} of {dtype} takes {wanted} bytes, {left} are there")
    content = file.read(wanted)
    if len(content) != wanted:
        raise InputError(f"{where}: is cut short: {len(content)} of {wanted} bytes are there")
    array = np.frombuffer(content, dtype) if wanted else np.empty(0, dtype)
    return array.reshape(shape, order="F" if order else "C")


def _npy_header(where: str, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (3, 0):  # as (2, 0), with names of fields in UTF-8
            version = (2, 0)
        with warnings.catch_warnings():  # of headers that Python 2 wrote
            warnings.simplefilter("ignore", UserWarning)
            return _HEADERS[version](file)
    except (ValueError, SyntaxError, TypeError, KeyError, EOFError, RecursionError, tokenize.TokenError) as error:
        raise InputError(f"{where}: cannot be read as a table: not a NumPy file, or its header is damaged") from error


def _read_archive(path: Path, file: BinaryIO, extras: Extras | None) -> np.ndarray:
    try:
        with zipfile.ZipFile(file) as archive:
            found: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    found[info.filename.removesuffix(".npy")] = info
            if not found:
                raise InputError(f"{path}: is an archive without arrays; save the points in it")
            points = _to_points(path, _read_member(path, archive, found[_choose(path, archive, found)]), extras)
            for group, names in _ARRAYS.items() if extras is not None else ():
                name = next((name for name in names if name in found), None)
                if name is None:
                    continue
                assert extras is not None
                values = _read_member(path, archive, found[name])
                if values.dtype.kind not in "fiu" or values.shape[-1:] != (3,) or values.size != points.size:
                    raise InputError(f"{path}: its {name} have shape {values.shape}, must be one for each point")
                extras.pop(UNNAMED, None)
                extras[group] = values.reshape(-1, 3)
            return points
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise InputError(f"{path}: is a damaged archive; save the points again") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.file_size > max(SMALL, MAX_EXPANSION * info.compress_size):
        raise InputError(f"{path}: {quoted(info.filename)} unpacks to {info.file_size} bytes; is it broken?")
    with archive.open(info) as member:
        return _read_npy(str(path), member, info.file_size)  # type: ignore[arg-type]


def _choose(path: Path, archive: zipfile.ZipFile, found: dict[str, zipfile.ZipInfo]) -> str:
    others = {name for names in _ARRAYS.values() for name in names}
    for name in (*_PREFERRED, *found):
        if name in found and (name in _PREFERRED or len(found) == 1) and name not in others:
            return name
    fitting = []
    for name, info in found.items():
        if name in others:
            continue
        with archive.open(info) as member:
            shape, _, dtype = _npy_header(str(path), member)  # type: ignore[arg-type]
        if len(shape) >= 2 and shape[-1] >= 3 and dtype.kind in "fiu":
            fitting.append(name)
    if len(fitting) == 1 and not {"x", "y", "z"} <= found.keys():
        return fitting[0]
    listed = ", ".join(quoted(name, 30) for name in islice(found, 10))
    raise InputError(f"{path}: which of its arrays holds the points? ({listed}); call it 'points'")


def _to_points(path: Path, array: np.ndarray, extras: Extras | None) -> np.ndarray:
    if array.dtype.names is not None:
        names = [name.lower() for name in array.dtype.names]
        if any(names.count(axis) != 1 for axis in "xyz"):
            listed = ", ".join(quoted(name, 20) for name in islice(array.dtype.names, 10))
            raise InputError(f"{path}: holds records of {listed}; fields x, y and z are needed")
        fields = [array[array.dtype.names[names.index(axis)]] for axis in "xyz"]
        if any(field.dtype.kind not in "fiu" or field.ndim != 1 for field in fields):
            raise InputError(f"{path}: its fields x, y and z must be numbers, one a record")
        for group, columns in named_columns(names).items() if extras is not None else ():
            assert extras is not None
            further = [array[array.dtype.names[column]] for column in columns]
            if all(column.dtype.kind in "fiu" and column.ndim == 1 for column in further):
                extras[group] = np.stack(further, axis=1)
        return np.stack([field.astype(np.float64) for field in fields]).T
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds values of type {array.dtype}, must be numbers")
    if array.ndim >= 2:
        _refuse_transposed(path, array.shape)
    if (array.ndim == 3 and array.dtype == np.uint8) or (array.ndim == 2 and array.shape[1] > MOST_COLUMNS):
        raise InputError(
            f"{path}: holds numbers of type {array.dtype} and shape {array.shape}: is it an image, or features? "
            "Save the points alone"
        )
    if array.ndim == 3 and array.shape[2] >= 3:
        if _is_batch(array[:, :, :3].astype(np.float64)):
            raise InputError(
                f"{path}: holds numbers of shape {array.shape}: are they {array.shape[0]} clouds? Save each in a file "
                "of its own; in a map of a depth camera neighbours are close to each other"
            )
        log.info("%s: a map of %d x %d points", path, *array.shape[:2])
        array = array.reshape(-1, array.shape[2])
    if array.ndim != 2 or array.shape[1] < 3:
        raise InputError(f"{path}: holds numbers of shape {array.shape}, must be (N, 3) or more columns")
    if extras is not None and array.shape[1] > 3:
        extras[UNNAMED] = array[:, 3:]
    return np.stack([array[:, axis].astype(np.float64) for axis in range(3)]).T


def _is_batch(grid: np.ndarray) -> bool:
    """Tell (B, N, 3) clouds from an (H, W, 3) map: points that follow each other in a map are close to each other."""
    if len(grid) < 2 or grid.shape[1] < _NARROW:
        return False
    with np.errstate(all="ignore"):
        steps = np.linalg.norm(np.diff(grid, axis=1), axis=2)
        points = grid[np.isfinite(grid).all(axis=2)]
        steps = steps[np.isfinite(steps)]
        return bool(len(steps) and np.median(steps) > 0.5 * np.linalg.norm(points.std(axis=0)))


def _refuse_transposed(path: Path, shape: tuple[int, ...]) -> None:
    wide = len(shape) == 2 and shape[0] < 10 and shape[1] > 100
    if wide or (shape[0] == 3 and shape[-1] != 3 and math.prod(shape[1:]) > 3):
        raise InputError(
            f"{path}: holds numbers of shape {shape}; are points its columns? Transpose it: a row is a point"
        )


def _refuse_counts(path: Path, first: np.ndarray, layout: _Layout) -> None:
    """Refuse the first of columns without names where it counts the rows, or its first number does."""
    if len(first) < _NARROW:
        return
    if layout.columns > 3 and (np.diff(first) == 1).all() and first[0] in (0, 1):
        raise InputError(
            f"{path}: its first column counts the rows; remove it, or name the columns in a first line: index x y z"
        )
    if first[0] == len(first) - 1 and not first[1:].max() == first[0]:
        raise InputError(
            f"{path}: line {layout.line} begins with {len(first) - 1}, and as many rows follow; remove the line if it "
            "is their number, or write a first line: x y z"
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
        raise _no_number(path, lines[0])
    if any(re.search(rb'"[-+]?\d*,\d+(?:[eE][-+]?\d+)?"', row) for row in rows):
        raise InputError(f"{path}: holds decimal commas in quotes; write decimal points")
    separator, decimal_comma = _find_separator(path, rows)
    (names, is_header), count = _comment_names(data), None
    named_in = 0
    for line, start, text in lines:
        fields = split_fields(text.replace(b",", b".") if decimal_comma else text, separator)
        values = [number(field) for field in fields]
        if len(fields) == 1 and fields[0].isdigit() and count is None:
            count = int(fields[0])
        elif all(value is None for value in values) and any(fields) and not named_in:
            names, named_in = _words(text) if separator is None else _named_fields(text, separator), line
        else:
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
        text = data[start:end].partition(b"#")[0].strip()
        if text and not text.startswith(COMMENTS):
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
    if all(_BOTH_COMMAS.fullmatch(row.strip()) for row in rows) or (
        doubtful and all(re.fullmatch(rb"[-+]?\d*", field) for field in fields)
    ):
        raise InputError(f"{path}: commas stand between its numbers and within them; write decimal points")
    return b",", False


def _comment_names(data: bytes) -> tuple[list[str] | None, bool]:
    """Return the words of a comment in front of the table that names x, y and z, and if they are surely a header."""
    for line in data[:4096].split(b"\n"):
        text = line.strip()
        if text and not text.startswith(COMMENTS):
            break
        words = [re.sub(r"(?<=.)[\[(].*$", "", word) for word in _words(text)]
        announced = bool(words) and words[0].removesuffix(":") in _ANNOUNCE
        words = words[1:] if announced or (words and words[0].endswith(":")) else words
        if {"x", "y", "z"} <= set(words):
            return words, announced or set(words) <= _COLUMN_NAMES
    return None, False


def _words(text: bytes) -> list[str]:
    words = re.split(r'[\s,;"]+', text.decode("latin-1").strip().lstrip("#/%").strip(' \t"'))
    return [word.lower() for word in words if word]


def _named_fields(text: bytes, separator: bytes) -> list[str]:
    """Return the names in a header line, one a field: without quotes and units, as `x [m]` has them; "" without one."""
    fields = text.decode("latin-1").strip().lstrip("#/%").removesuffix(separator.decode()).split(separator.decode())
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


def _no_number(path: Path, first: tuple[int, int, bytes]) -> InputError:
    line, _, text = first
    word = quoted((text.split() or [text])[0].decode("latin-1"), 40)
    return InputError(f"{path}: cannot be read as a table: line {line}: {word} is not a number")
