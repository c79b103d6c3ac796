"""PLY files: points, and meshes where there are faces. What a header announces is compared with what is there first.

Source: Turk 1994, "The PLY Polygon File Format"; names of types as in the files of Stanford, MeshLab and CloudCompare.
"""

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..channels import NOUNS
from ..errors import InputError, quoted
from .attributes import Extras, as_announced, named_columns
from .polygons import cut_polygons
from .text import CHUNK, count_lines, parse_lines, parse_rows

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
CORNERS = ("vertex_indices", "vertex_index")
MAX_HEADER_LINES = 10_000


@dataclass(frozen=True)
class _Property:
    """A number of an element, or a list of numbers: then `counts` is the type of its length."""

    name: str
    type: str
    counts: str | None = None


@dataclass(frozen=True)
class _Element:
    """A table of a file: `count` rows of the same properties."""

    name: str
    count: int
    properties: list[_Property] = field(default_factory=list)

    def is_regular(self) -> bool:
        return all(item.counts is None for item in self.properties)

    def least_bytes(self) -> int:
        """Bytes of a row whose lists are empty."""
        return sum(np.dtype(item.counts or item.type).itemsize for item in self.properties)

    def place(self, name: str) -> int:
        """Return where a property stands, -1 without it; X is taken for x where there is no x."""
        names = [item.name for item in self.properties]
        return names.index(name) if name in names else names.index(name.upper()) if name.upper() in names else -1

    def further(self) -> dict[str, list[int]]:
        """Return where normals and colours stand."""
        return named_columns([item.name.lower() if item.counts is None else "" for item in self.properties])


def read_ply(path: Path, extras: Extras | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the vertices of a file, ascii or binary, and its faces as triangles.

    Args:
        path: the file.
        extras: takes the normals and colours of the vertices, where given.

    Returns:
        (V, 3) float64 vertices; (F, 3) int64 triangles, None without faces. Polygons are cut.

    Raises:
        InputError: not such a file, cut short, more in it than announced, or a face beyond the vertices.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    order, elements, start, line = _read_header(path, data)
    if not order and b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    _check_size(path, elements, data, start, ascii=not order)
    vertices, corners = None, None
    for element in elements:
        is_vertex, is_face = element.name == "vertex", element.name == "face"
        axes = [element.place(axis) for axis in "xyz"] if is_vertex else []
        further = element.further() if is_vertex and extras is not None else {}
        axes += [place for places in further.values() for place in places]
        wanted = max(map(element.place, CORNERS)) if is_face else -1
        if not order:
            stop, lines = _end_of_lines(data, start, element.count)
            found = _read_ascii(path, data, start, stop, line, element, axes, wanted)
            start, line = stop, line + lines
        else:
            start, found = _read_binary(path, data, start, order, element, axes, wanted)
        if is_vertex:
            assert isinstance(found, np.ndarray)
            vertices = found[:, :3]
            for number, (group, places) in enumerate(further.items(), 1):
                assert extras is not None
                stored = found[:, 3 * number : 3 * number + 3]
                kind = np.result_type(*(element.properties[place].type for place in places))
                extras[group] = as_announced(stored, kind, f"{path}: {NOUNS[group]}", points=vertices)
        elif is_face and wanted >= 0 and element.count:
            corners = found
        elif element.count and (is_face or element.name == "tristrips"):
            raise InputError(f"{path}: its {element.name} cannot be read (no {CORNERS[0]}); save triangles")
    rest = data[start:].strip(b"\0\r\n\t ")
    if rest:
        raise InputError(f"{path}: holds {len(rest)} bytes more than its header announces; is it damaged?")
    assert isinstance(vertices, np.ndarray)
    if corners is None:
        return vertices, None
    flat, counts = corners
    return vertices, cut_polygons(flat, counts, vertices, str(path))


def _read_header(path: Path, data: bytes) -> tuple[str, list[_Element], int, int]:
    """Return byte order ("" is ascii), elements, where the first of them begins, and the number of that line."""
    breaks = [at for at in (data.find(b"\r", 0, 100), data.find(b"\n", 0, 100)) if at >= 0]
    if data[:3] != b"ply" or not breaks or data[3 : min(breaks)].strip():
        raise InputError(f"{path}: holds no points, or is not a .ply file: its first line must be ply")
    end = min(breaks)
    mark = b"\r\n" if data[end : end + 2] == b"\r\n" else data[end : end + 1]
    order, start = None, end + len(mark)
    elements: list[_Element] = []
    for line in range(2, MAX_HEADER_LINES):
        end = data.find(mark, start)
        if end < 0:
            break
        words = data[start:end].decode("latin-1").split()
        start = end + len(mark)
        if words == ["end_header"]:
            if order is None or not any(element.name == "vertex" for element in elements):
                raise InputError(f"{path}: its header names no format or no vertices; is it damaged?")
            return order, elements, start, line + 1
        try:
            order = _take_line(words, order, elements)
        except (ValueError, IndexError, KeyError):
            shown = quoted(" ".join(words), 60)
            raise InputError(f"{path}: line {line}: {shown} is no line of a PLY header; is it damaged?") from None
    raise InputError(f"{path}: is cut short: its header has no end_header")


def _take_line(words: list[str], order: str | None, elements: list[_Element]) -> str | None:
    """Take a line of the header in; return the byte order as far as it is known."""
    if not words or words[0] in ("comment", "obj_info"):
        return order
    if words[0] == "format":
        if order is not None or words[2:] != ["1.0"]:
            raise ValueError
        return FORMATS[words[1]]
    if words[0] == "element" and len(words) == 3:
        count = int(words[2])
        if count < 0 or words[1] in (element.name for element in elements):
            raise ValueError
        elements.append(_Element(words[1], count))
    elif words[0] == "property":
        item = _Property(words[-1], TYPES[words[-2]], None)
        if words[1] == "list":
            item = _Property(words[4], TYPES[words[3]], TYPES[words[2]])
        if len(words) != (5 if item.counts else 3) or item.name in (other.name for other in elements[-1].properties):
            raise ValueError
        elements[-1].properties.append(item)
    else:
        raise ValueError
    return order


def _check_size(path: Path, elements: list[_Element], data: bytes, start: int, *, ascii: bool) -> None:
    """Refuse, before memory is taken, a file that announces more than its bytes can hold."""
    for element in elements:
        if element.count and not element.properties:
            raise InputError(f"{path}: announces {element.count} rows of '{element.name}' without properties")
        if element.name == "vertex" and (
            min(map(element.place, "xyz")) < 0
            or any(element.properties[element.place(axis)].counts is not None for axis in "xyz")
        ):
            raise InputError(f"{path}: its vertices have no x, y and z; name the properties so")
    left = len(data) - start
    if ascii:
        announced = sum(element.count for element in elements)
        there = count_lines(data, start)
        if announced > there:
            raise InputError(f"{path}: is cut short: {announced} rows are announced, {there} lines follow the header")
        return
    announced = sum(element.count * element.least_bytes() for element in elements)
    if announced > left:
        raise InputError(f"{path}: is cut short: {announced} bytes are announced, {left} follow the header")


def _end_of_lines(data: bytes, start: int, count: int) -> tuple[int, int]:
    """Return where the line after `count` lines that are not blank begins, and how many lines that are."""
    if re.compile(rb"\n\s*\n").search(data, start - 1):
        lines = 0
        while count > 0 and start < len(data):
            stop = data.find(b"\n", start) + 1 or len(data)
            count, lines, start = count - bool(data[start:stop].strip()), lines + 1, stop
        return start, lines
    lines = count
    while count > 0 and start < len(data):
        stop = min(start + CHUNK, len(data))
        breaks = np.frombuffer(data, np.uint8, stop - start, start) == 10
        there = int(np.count_nonzero(breaks))
        if count <= there:
            return start + int(np.flatnonzero(breaks)[count - 1]) + 1, lines
        count, start = count - there, stop
    return start, lines


def _read_ascii(
    path: Path, data: bytes, start: int, stop: int, line: int, element: _Element, axes: list[int], wanted: int
) -> np.ndarray | tuple[np.ndarray, np.ndarray] | None:
    if axes and element.is_regular():
        found = parse_rows(
            data, len(element.properties), axes, start=start, stop=stop, line=line, where=str(path)
        )  # fmt: skip
        if len(found) != element.count:
            raise InputError(f"{path}: holds {len(found)} of {element.count} vertices; is it cut short?")
        return found
    if not axes and wanted < 0:
        return None
    rows, corners, counts = [], [], []
    flat: np.ndarray
    for flat, lengths, numbers in parse_lines(data, start, stop, line=line, where=str(path)):
        if wanted == 0 and len(element.properties) == 1:  # the usual case: each line is a list
            first = np.cumsum(lengths) - lengths
            bad = flat[first] != lengths - 1
            if bad.any():
                raise InputError(f"{path}: line {numbers[bad.argmax()]}: a face is cut short or holds too many corners")
            corners.append(np.delete(flat, first))
            counts.append(lengths - 1)
            continue
        for number, values in zip(numbers.tolist(), np.split(flat, np.cumsum(lengths)[:-1])):
            places = _walk(values, element.properties)
            if places is None:
                raise InputError(f"{path}: line {number}: a row of '{element.name}' is cut short or too long")
            if axes:
                rows.append([float(values[places[axis].start]) for axis in axes])
            else:
                corners.append(values[places[wanted]])
                counts.append(np.array([len(corners[-1])]))
    there = len(rows) if axes else sum(map(len, counts))
    if there != element.count:
        raise InputError(f"{path}: holds {there} of {element.count} rows of '{element.name}'; is it cut short?")
    if axes:
        return np.array(rows, dtype=np.float64).reshape(-1, len(axes))
    return (np.concatenate(corners), np.concatenate(counts)) if counts else None


def _walk(values: np.ndarray, properties: list[_Property]) -> list[slice] | None:
    """Return where each property of a row lies among its numbers; None if they are too few or too many."""
    places, at = [], 0
    for item in properties:
        length = 1
        if item.counts:
            if at >= len(values) or not 0 <= values[at] <= len(values) or values[at] % 1:
                return None
            length, at = int(values[at]), at + 1
        places.append(slice(at, at + length))
        at += length
    return places if at == len(values) else None


def _read_binary(
    path: Path, data: bytes, start: int, order: str, element: _Element, axes: list[int], wanted: int
) -> tuple[int, np.ndarray | tuple[np.ndarray, np.ndarray] | None]:
    """Return where the next element begins, and the vertices or the corners and their counts."""
    if not element.count:
        return start, np.empty((0, len(axes))) if axes else None
    lengths = _first_lengths(data, start, order, element)
    table = None if lengths is None else _regular(data, start, order, element, lengths)
    if table is None:
        return _walk_binary(path, data, start, order, element, axes, wanted)
    stop = start + table.nbytes
    if axes:
        vertices = np.empty((len(axes), element.count))
        for row, axis in zip(vertices, axes):
            row[:] = table[f"p{axis}"]
        return stop, vertices.T
    if wanted < 0:
        return stop, None
    corners = table[f"p{wanted}"]
    return stop, (corners.ravel(), np.full(len(corners), corners.shape[1]))


def _first_lengths(data: bytes, start: int, order: str, element: _Element) -> list[int] | None:
    """Return the length of each list of the first row, 1 for numbers; None if the row is cut short."""
    lengths = []
    for item in element.properties:
        if item.counts:
            kind = np.dtype(order + item.counts)
            if start + kind.itemsize > len(data):
                return None
            value = np.frombuffer(data, kind, 1, start)[0]
            if not 0 <= value <= len(data) or value % 1:
                return None
            lengths.append(int(value))
            start += kind.itemsize
        else:
            lengths.append(1)
        start += lengths[-1] * np.dtype(item.type).itemsize
    return lengths


def _regular(data: bytes, start: int, order: str, element: _Element, lengths: list[int]) -> np.ndarray | None:
    """Return all rows as records if their lists are as long as those of the first row, else None."""
    fields: list[tuple] = []
    for place, (item, length) in enumerate(zip(element.properties, lengths)):
        if item.counts:
            fields += [(f"n{place}", order + item.counts), (f"p{place}", order + item.type, (length,))]
        else:
            fields.append((f"p{place}", order + item.type))
    kind = np.dtype(fields)
    if start + element.count * kind.itemsize > len(data):
        return None
    table = np.frombuffer(data, kind, element.count, start)
    lists = [place for place, item in enumerate(element.properties) if item.counts]
    return table if all((table[f"n{place}"] == lengths[place]).all() for place in lists) else None


def _walk_binary(
    path: Path, data: bytes, start: int, order: str, element: _Element, axes: list[int], wanted: int
) -> tuple[int, np.ndarray | tuple[np.ndarray, np.ndarray] | None]:
    """Read rows one by one, since their lists differ in length."""
    steps = [
        (struct.Struct(order + np.dtype(item.counts).char) if item.counts else None, np.dtype(order + item.type))
        for item in element.properties
    ]
    bounds = [(start, start)] * len(steps)
    rows, corners, counts = [], [], []
    for row in range(element.count):
        for place, (length, kind) in enumerate(steps):
            size = 1
            if length is not None:
                size = length.unpack_from(data, start)[0] if start + length.size <= len(data) else len(data)
                start += length.size
            if not 0 <= size <= len(data) or size % 1 or start + int(size) * kind.itemsize > len(data):
                raise InputError(
                    f"{path}: is cut short or damaged: {element.count} rows of '{element.name}' are announced, "
                    f"{row} are there"
                )
            bounds[place] = (start, int(size))
            start += int(size) * kind.itemsize
        if axes:
            rows.append([float(np.frombuffer(data, steps[axis][1], 1, bounds[axis][0])[0]) for axis in axes])
        elif wanted >= 0:
            at, size = bounds[wanted]
            corners.append(data[at : at + size * steps[wanted][1].itemsize])
            counts.append(size)
    if axes:
        return start, np.array(rows, dtype=np.float64).reshape(-1, len(axes))
    if wanted < 0:
        return start, None
    flat = np.frombuffer(b"".join(corners), steps[wanted][1])
    return start, (flat, np.array(counts, dtype=np.int64))
