"""Arrays of points: NumPy's files, one array or an archive of several."""

import logging
import lzma
import math
import tokenize
import warnings
import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import InputError, quoted
from .attributes import UNNAMED, Extras, named_columns

log = logging.getLogger(__name__)

MAX_EXPANSION = 100
"""Largest ratio of an array to its compressed bytes, above `SMALL`."""
SMALL = 2**28
MOST_COLUMNS = 32
"""Of an array whose first three columns are taken for x, y and z."""

_ZIP = b"PK\x03\x04"
_PREFERRED = ("points", "xyz", "pos", "data")
_ARRAYS = {"normal": ("normals", "normal"), "rgb": ("colors", "colours", "color", "rgb")}
"""Names of arrays in an archive, beside that of the points."""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

COUNTED = 16
"""Fewest rows of which a column is taken to count or number them."""
DATE = 1e8
"""From here on, beside smaller numbers, a column holds times: seconds since 1970, since 1980, or shorter units."""
WEEK = (1e5, 7 * 86_400)
"""Between these, rising and 50 times as large as the other numbers, a column holds seconds of the week, as of GPS."""
_NARROW = 16
"""Points of a row of a map; in a narrower one neighbours are not close."""
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, OSError,
    UnicodeDecodeError,
)  # fmt: skip
"""What Python's own readers of archives raise."""


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
        refuse_transposed(path, array.shape)
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
    points = np.stack([array[:, axis].astype(np.float64) for axis in range(3)]).T
    if array.shape[1] > 3:
        refuse_numbering(path, points, "save the points alone, or records with fields x, y and z")
    return points


def _is_batch(grid: np.ndarray) -> bool:
    """Tell (B, N, 3) clouds from an (H, W, 3) map: points that follow each other in a map are close to each other."""
    if len(grid) < 2 or grid.shape[1] < _NARROW:
        return False
    with np.errstate(all="ignore"):
        steps = np.linalg.norm(np.diff(grid, axis=1), axis=2)
        points = grid[np.isfinite(grid).all(axis=2)]
        steps = steps[np.isfinite(steps)]
        return bool(len(steps) and np.median(steps) > 0.5 * np.linalg.norm(points.std(axis=0)))


def refuse_numbering(path: Path, points: np.ndarray, remedy: str) -> None:
    """Refuse the first of four or more columns without names where it seems to hold numbers, labels or times of rows.

    Args:
        path: the file.
        points: (N, 3 or more), its first columns.
        remedy: what to do else than to remove the column.

    Raises:
        InputError: as said; `docs/own_data.md` lists how they are told from coordinates.
    """
    with np.errstate(all="ignore"):
        held = _held_instead_of_x(points[np.isfinite(points[:, :3]).all(axis=1), :3])
    if held:
        raise InputError(f"{path}: its first column {held}, so it is not taken for x; remove it, or {remedy}")


def _held_instead_of_x(points: np.ndarray) -> str:
    """Say what the first of three columns (N, 3) seems to hold; empty for coordinates."""
    count = len(points)
    if count < COUNTED:
        return ""
    first, steps = points[:, 0], np.diff(points[:, 0])
    low, others = first.min(), np.abs(points[:, 1:]).max()
    counts = first / steps[0]
    if (np.abs(counts - np.round(counts)) < 0.01).all() and (np.abs(np.diff(counts) - 1) < 0.01).all():
        return "counts the rows"
    of_week = WEEK[0] <= low <= first.max() <= WEEK[1] and low > 50 * max(others, np.ptp(first))
    if (of_week and (steps >= 0).all()) or (low >= DATE and (others < DATE or (steps > 0).all())):
        return "seems to hold times"
    if (first % 1).any():
        return ""
    if ((points[:, 1:] % 1) != 0).mean(axis=0).min() > 0.5:
        return "holds whole numbers only"
    kinds, *along = (len(np.unique(column)) for column in points.T)
    if kinds == count and count**2 > 8 * (np.ptp(first) + 1):  # by chance, four pairs or more would be equal
        return "seems to number the rows"
    return "seems to hold labels" if low >= -1 and first.max() < 1000 and min(along) >= 20 * kinds else ""


def refuse_transposed(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse numbers whose columns seem to be the points.

    Raises:
        InputError: as said.
    """
    wide = len(shape) == 2 and shape[0] < 10 and shape[1] > 100
    clouds = len(shape) == 3 and (shape[2] > MOST_COLUMNS or shape[1] == 3 != shape[2])
    if wide or clouds or (shape[0] == 3 and shape[-1] != 3 and math.prod(shape[1:]) > 3):
        raise InputError(
            f"{path}: holds numbers of shape {shape}; are points its columns? Transpose it: a row is a point"
        )
