"""PCD files of the Point Cloud Library, and LAS files of laser scanners.

Sources: "The PCD (Point Cloud Data) file format", documentation of PCL; ASPRS, "LAS Specification", 1.2 and 1.4; the
compression is that of Lehmann's liblzf.
"""

import struct
from pathlib import Path

import numpy as np

from ..channels import NOUNS
from ..errors import InputError, quoted
from .attributes import Extras, as_announced, named_columns
from .text import count_lines, parse_rows

KINDS = {"I": "i", "U": "u", "F": "f"}
MAX_EXPANSION = 100
"""Above the largest ratio that LZF reaches: 264 bytes from 3."""
MAX_HEADER = 2**16


PACKED = ("rgb", "rgba")
"""Names of a field that holds a colour in the bytes of one 32-bit number: blue in the lowest, then green, then red."""
RGB_OFFSETS = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}
"""By form of a LAS record: where its colour stands, three 16-bit numbers."""


def read_pcd(path: Path, extras: Extras | None = None) -> np.ndarray:
    """Read the points of a file: ascii, binary or binary_compressed.

    Args:
        path: the file.
        extras: takes normals and colours, where given; other fields are passed over.

    Returns:
        (N, 3) float64.

    Raises:
        InputError: not such a file, cut short, or its header contradicts itself or what follows.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    header, start, line = _pcd_header(path, data)
    try:
        names = [name.lower() for name in header["FIELDS"]]
        sizes = [int(value) for value in header["SIZE"]]
        counts = [int(value) for value in header.get("COUNT", ["1"] * len(names))]
        kinds = [np.dtype(f"<{KINDS[kind.upper()]}{size}") for kind, size in zip(header["TYPE"], sizes, strict=True)]
        width, height = (int(header[key][0]) if key in header else None for key in ("WIDTH", "HEIGHT"))
        (form,) = header["DATA"]
        points = int(header["POINTS"][0]) if "POINTS" in header else None
        if not len(names) == len(sizes) == len(counts) or not 0 <= min(counts) <= max(counts) <= MAX_HEADER:
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not a PCD file, or its header is damaged") from error
    if any(names.count(axis) != 1 or counts[names.index(axis)] != 1 for axis in "xyz"):
        raise InputError(f"{path}: its fields are {quoted(' '.join(names), 60)}; x, y and z are needed")
    area = None if width is None else width * (1 if height is None else height)
    if points is None:
        points = area
    if points is None or points < 0 or area not in (None, points):
        raise InputError(f"{path}: announces {points} points and {width} x {height}; is its header damaged?")
    places = np.cumsum([0, *counts])
    axes = [names.index(axis) for axis in "xyz"]
    further = {} if extras is None else _further_fields(names, sizes, counts)
    axes += [place for fields in further.values() for place in fields]
    if form == "ascii":
        room = count_lines(data, start)
        if points > room:
            raise InputError(f"{path}: is cut short: {points} points are announced, {room} lines follow the header")
        keep = [int(places[axis]) for axis in axes]
        found = parse_rows(data, int(places[-1]), keep, start=start, line=line, where=str(path))
        if len(found) != points:
            state = "is cut short" if len(found) < points else "is damaged"
            raise InputError(f"{path}: {state}: {points} points are announced, {len(found)} rows follow the header")
        _keep_extras(path, extras, further, list(found.T), kinds)
        return found[:, :3]
    fields = [(f"f{place}", kind, (count,)) for place, (kind, count) in enumerate(zip(kinds, counts))]
    record = np.dtype(fields)
    wanted = points * record.itemsize
    if form == "binary":
        _check_length(path, wanted, data, start)
        table = np.frombuffer(data, record, points, start)
        columns = [table[f"f{axis}"][:, 0] for axis in axes]
    elif form == "binary_compressed":
        packed, unpacked = struct.unpack_from("<II", data, start) if len(data) >= start + 8 else (0, -1)
        if unpacked != wanted or packed > len(data) - start - 8 or unpacked > MAX_EXPANSION * packed:
            raise InputError(
                f"{path}: is cut short or damaged: {points} points take {wanted} bytes, {unpacked} are announced, "
                f"packed in {packed} of {max(0, len(data) - start - 8)} bytes"
            )
        _check_length(path, packed + 8, data, start)
        flat = unpack_lzf(data[start + 8 : start + 8 + packed], wanted)
        if flat is None:
            raise InputError(f"{path}: is damaged: its points cannot be unpacked")
        offsets = [points * record.fields[f"f{axis}"][1] for axis in axes]  # type: ignore[index]
        columns = [np.frombuffer(flat, kinds[axis], points, offset) for axis, offset in zip(axes, offsets)]
    else:
        raise InputError(f"{path}: its data are {quoted(form, 30)}, must be ascii, binary or binary_compressed")
    _keep_extras(path, extras, further, columns, kinds)
    return np.stack([column.astype(np.float64) for column in columns[:3]]).T


def _further_fields(names: list[str], sizes: list[int], counts: list[int]) -> dict[str, list[int]]:
    """Return the fields of normals and colours; a packed colour is one field."""
    single = [name if count == 1 else "" for name, count in zip(names, counts)]
    further = named_columns(single)
    packed = next((single.index(name) for name in PACKED if single.count(name) == 1), -1)
    if packed >= 0 and sizes[packed] == 4:
        further["rgb"] = [packed]
    return further


def _keep_extras(
    path: Path, extras: Extras | None, further: dict[str, list[int]], columns: list[np.ndarray], kinds: list[np.dtype]
) -> None:
    """Put the columns of normals and colours into `extras`, in the types that the header names; first are x, y, z."""
    points, at = np.stack(columns[:3], axis=1) if further else np.empty((0, 3)), 3
    for group, fields in further.items():
        assert extras is not None
        values, types = columns[at : at + len(fields)], [kinds[field] for field in fields]
        at += len(fields)
        if len(fields) == 3:
            where = f"{path}: {NOUNS[group]}"
            typed = [as_announced(value, kind, where, points=points) for value, kind in zip(values, types)]
            extras[group] = np.stack(typed, axis=1)
            continue
        if not np.isfinite(values[0]).all() and values[0].dtype == np.float64:  # text has one word for all NaN
            raise InputError(f"{path}: its packed colours hold NaN, in which they are lost; store them as type U")
        with np.errstate(over="ignore"):
            if types[0].kind in "iu":  # 32 bits, with or without a sign
                bits = as_announced(values[0], np.int64, f"{path}: {NOUNS[group]}", points=points)
            else:
                bits = values[0].astype("<f4").view("<u4")
        extras[group] = np.stack([bits >> shift & 255 for shift in (16, 8, 0)], axis=1).astype(np.uint8)


def _pcd_header(path: Path, data: bytes) -> tuple[dict[str, list[str]], int, int]:
    """Return the words of each line of the header, where the points begin, and the number of that line."""
    header: dict[str, list[str]] = {}
    start, line = 0, 1
    while start < min(len(data), MAX_HEADER):
        end = data.find(b"\n", start) + 1 or len(data)
        word, *rest = data[start:end].decode("latin-1").partition("#")[0].split() or [""]
        start, line = end, line + 1
        if word and word.upper() in header:
            raise InputError(f"{path}: line {line - 1}: a second {quoted(word, 20)} in its header; is it damaged?")
        if word:
            header[word.upper()] = rest
        if word.upper() == "DATA":
            return header, start, line
    raise InputError(f"{path}: holds no points, or is not a .pcd file: its header has no DATA")


def _check_length(path: Path, wanted: int, data: bytes, start: int) -> None:
    there = len(data) - start
    if there < wanted:
        raise InputError(f"{path}: is cut short: its points take {wanted} bytes, {there} follow the header")
    if data[start + wanted :].strip(b"\0\r\n "):
        raise InputError(f"{path}: holds {there - wanted} bytes more than its header announces; is it damaged?")


def unpack_lzf(packed: bytes, size: int) -> bytes | None:
    """Unpack what liblzf packed into exactly `size` bytes; None if it is damaged.

    Example:
        >>> unpack_lzf(bytes([1, 97, 98, 0x60, 1]), 7)
        b'abababa'
    """
    found, at = bytearray(), 0
    while at < len(packed):
        control = packed[at]
        at += 1
        if control < 32:  # so many bytes and one as they are
            found += packed[at : at + control + 1]
            at += control + 1
            if at > len(packed):
                return None
            continue
        length = control >> 5
        if length == 7:
            if at >= len(packed):
                return None
            length += packed[at]
            at += 1
        if at >= len(packed):
            return None
        distance = ((control & 31) << 8 | packed[at]) + 1
        at += 1
        length += 2
        if distance > len(found) or len(found) + length > size:
            return None
        piece = bytes(found[-distance:])
        found += (piece * (length // distance + 1))[:length]
    return bytes(found) if len(found) == size else None


LAS_LENGTHS = {0: 20, 1: 28, 2: 26, 3: 34, 4: 57, 5: 63, 6: 30, 7: 36, 8: 38, 9: 59, 10: 67}
"""By form of a LAS record, its least bytes."""


def read_las(path: Path, extras: Extras | None = None) -> np.ndarray:
    """Read the points of an uncompressed LAS file, in its units: whole numbers times scale plus offset.

    Args:
        path: the file.
        extras: takes the colours, where given and there.

    Returns:
        (N, 3) float64.

    Raises:
        InputError: not such a file, compressed (LAZ), cut short, or its header is damaged.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if data[:4] != b"LASF" or len(data) < 227:
        raise InputError(f"{path}: is no LAS file, or cut short in its header")
    header, start, form, length, count = struct.unpack_from("<H", data, 94)[0], *struct.unpack_from("<I4xBHI", data, 96)
    if (data[24], data[25]) >= (1, 4) and header >= 375 and len(data) >= 375:
        count = struct.unpack_from("<Q", data, 247)[0] or count
    if form & 0xC0:
        raise InputError(f"{path}: is compressed (LAZ), which is not read; unpack it to LAS")
    steps = np.frombuffer(data, "<f8", 6, 131)
    if (
        length < LAS_LENGTHS.get(form & 0x3F, 20)
        or start < header
        or not np.isfinite(steps).all()
        or not steps[:3].all()
    ):
        raise InputError(f"{path}: its header is damaged")
    if start + count * length > len(data):
        raise InputError(
            f"{path}: is cut short: {count} points take {count * length} bytes, {max(0, len(data) - start)} are there"
        )
    rest = len(data) - start - count * length
    if rest >= length and (data[24], data[25]) < (1, 3):  # later versions may have other records behind the points
        raise InputError(
            f"{path}: announces {count} points, and room for {rest // length} more follows; is it damaged?"
        )
    record = np.dtype({"names": ["p"], "formats": [("<i4", 3)], "offsets": [0], "itemsize": length})
    whole = np.frombuffer(data, record, count, start)["p"]
    place = RGB_OFFSETS.get(form & 0x3F, length)
    if extras is not None and place + 6 <= length:
        colored = np.dtype({"names": ["c"], "formats": [("<u2", 3)], "offsets": [place], "itemsize": length})
        extras["rgb"] = np.frombuffer(data, colored, count, start)["c"]
    return np.stack([whole[:, axis] * steps[axis] + steps[3 + axis] for axis in range(3)]).T
