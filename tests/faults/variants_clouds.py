"""PCD and LAS files in many forms."""

import struct
from collections.abc import Iterator

import numpy as np

from faults.variants import COUNT, Variant, clouds


def pack_lzf(content: bytes) -> bytes:
    """Pack with liblzf's format: repetitions of the last 8 bytes by reference, the rest as it is."""
    packed, at = b"", 0
    while at < len(content):
        distance = next(
            (d for d in (1, 4, 8, 24) if content[at : at + 3] == content[at - d : at - d + 3] and at >= d), 0
        )
        if distance and at + 3 <= len(content):
            length = 3
            while (
                at + length < len(content) and length < 200 and content[at + length] == content[at + length - distance]
            ):
                length += 1
            high, low = divmod(distance - 1, 256)
            if length - 2 < 7:
                packed += bytes([(length - 2) << 5 | high, low])
            else:
                packed += bytes([7 << 5 | high, length - 9, low])
            at += length
        else:
            packed += bytes([0, content[at]])
            at += 1
    return packed


def pcd_file(points: np.ndarray, form: str, fields: list[tuple[str, str, int]], **replaced: str) -> bytes:
    """Write a PCD file; `fields` are (name, type, count), of which all but x, y, z are filled with 7."""
    head = {
        "VERSION": "0.7",
        "FIELDS": " ".join(name for name, _, _ in fields),
        "SIZE": " ".join(kind[1] for _, kind, _ in fields),
        "TYPE": " ".join(kind[0].upper() for _, kind, _ in fields),
        "COUNT": " ".join(str(count) for _, _, count in fields),
        "WIDTH": f"{len(points)}",
        "HEIGHT": "1",
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": f"{len(points)}",
        "DATA": form,
    } | replaced
    table = np.full(len(points), 7, [(name, "<" + kind, (count,)) for name, kind, count in fields])
    for axis, column in zip("xyz", points.T):
        table[axis] = column[:, None]
    if form == "ascii":
        rows = (" ".join(repr(value) for part in row for value in part.tolist()) for row in table)
        body = "".join(row + "\n" for row in rows).encode()
    else:
        body = table.tobytes()
    if form == "binary_compressed":
        columns = b"".join(table[name].tobytes() for name, _, _ in fields)
        packed = pack_lzf(columns)
        body = struct.pack("<II", len(packed), len(columns)) + packed
    lines = "".join(f"{key} {value}\n" for key, value in head.items() if value)
    return "# .PCD v0.7 - Größe\n".encode("latin-1") + lines.encode() + body


def pcd(rng: np.random.Generator) -> Iterator[Variant]:
    layouts = {
        "xyz": [("x", "{}", 1), ("y", "{}", 1), ("z", "{}", 1)],
        "more": [
            ("rgb", "u4", 1),
            ("y", "{}", 1),
            ("normal", "f4", 3),
            ("x", "{}", 1),
            ("z", "{}", 1),
            ("ring", "u2", 1),
        ],
    }
    for kind, points in clouds(rng).items():
        for form in ("ascii", "binary", "binary_compressed"):
            for type_ in ("f8",) if kind == "utm" else ("f4", "f8"):
                for layout, fields in layouts.items():
                    stored = [(name, text.format(type_), count) for name, text, count in fields]
                    content = pcd_file(points, form, stored)
                    name = f"pcd {kind} {form} {type_} {layout}"
                    yield Variant(name, ".pcd", content, points.astype(type_).astype(np.float64))
    points, fields = clouds(rng)["plain"], [("x", "f8", 1), ("y", "f8", 1), ("z", "f8", 1)]
    holes = points.copy()
    holes[5], holes[17, 1], holes[40, 2] = np.nan, np.inf, -np.inf
    left = np.delete(points, (5, 17, 40), axis=0)
    for form in ("ascii", "binary", "binary_compressed"):
        yield Variant(f"pcd holes {form}", ".pcd", pcd_file(holes, form, fields), left)
        for what, replaced in {
            "more points": {"POINTS": "61"},
            "more": {"POINTS": "61", "WIDTH": "61"},
            "fewer": {"POINTS": "59", "WIDTH": "59"},
            "a trillion": {"POINTS": "1000000000000", "WIDTH": "1000000000000"},
            "negative": {"POINTS": "-60"},
            "other fields": {"FIELDS": "a b c"},
            "two fields": {"FIELDS": "x y"},
            "no data": {"DATA": "packed"},
            "no type": {"TYPE": "F F Q"},
            "halves": {"SIZE": "4 4 4"},
            "no size": {"SIZE": ""},
            "of bytes": {"SIZE": "x 8 8"},
        }.items():
            if form != "ascii" or "SIZE" not in replaced or what != "halves":  # sizes say nothing of text
                yield Variant(f"pcd {what} {form}", ".pcd", pcd_file(points, form, fields, **replaced), None)


def las(rng: np.random.Generator) -> Iterator[Variant]:
    """LAS 1.2 and 1.4: whole numbers, scales and offsets as the specification lays them out."""
    for kind, points in clouds(rng).items():
        scale, offset = max(np.ptp(points, axis=0).max(), 1e-6) * 1e-6, points.mean(axis=0).round(3)
        stored = np.rint((points - offset) / scale).astype("<i4")
        for version, length, form in ((2, 20, 0), (2, 34, 3), (4, 30, 6)):
            size = 375 if version == 4 else 227
            head = bytearray(size)
            head[:4], head[24:26] = b"LASF", bytes([1, version])
            head[94:100] = struct.pack("<HI", size, size)
            head[104:111] = struct.pack("<BHI", form, length, 0 if version == 4 else COUNT)
            head[131:179] = struct.pack("<6d", *[scale] * 3, *offset)
            if version == 4:
                head[247:255] = struct.pack("<Q", COUNT)
            body = b"".join(row.tobytes() + bytes(length - 12) for row in stored)
            expected = stored * scale + offset
            yield Variant(f"las {kind} 1.{version} {form}", ".las", bytes(head) + body, expected)
            for name, at, new in (
                ("packed", 104, bytes([form | 128])),
                ("scale 0", 131, bytes(8)),
                ("scale nan", 131, struct.pack("<d", np.nan)),
                ("more", 247 if version == 4 else 107, struct.pack("<I", COUNT + 1)),
                ("records of 1", 105, b"\1\0"),
                ("billions", 247 if version == 4 else 107, struct.pack("<I", 2**32 - 1)),
                ("another", 0, b"LAZF"),
            ):
                content = bytearray(bytes(head) + body)
                content[at : at + len(new)] = new
                yield Variant(f"las {kind} 1.{version} {form} {name}", ".las", bytes(content), None)
