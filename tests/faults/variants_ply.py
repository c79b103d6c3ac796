"""PLY files in many forms."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import plyfile

from faults.variants import FACES, TRIANGLES, Variant, clouds

PLY_NAMES = {"f4": "float", "f8": "double", "i2": "short", "i4": "int32", "u1": "uchar"}


def read_with_plyfile(path: Path) -> np.ndarray:
    data = plyfile.PlyData.read(str(path))
    points = np.column_stack([data["vertex"][axis] for axis in "xyz"]).astype(np.float64)
    if "face" not in data or not data["face"].count:
        return points
    name = next(item.name for item in data["face"].properties if item.name.startswith("vertex_ind"))
    fans = [(c[0], c[i], c[i + 1]) for c in data["face"][name] for i in range(1, len(c) - 1)]
    return points[np.array(fans)]


def ply_file(
    points: np.ndarray,
    order: str,
    fields: list[tuple[str, str]],
    *,
    comment: bytes = b"",
    newline: bytes = b"\n",
    faces: list[list[int]] | None = None,
    extra: bool = False,
) -> bytes:
    """Write a PLY file; `fields` are (name, type), of which all but x, y, z are filled with 7."""
    forms = {"": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}
    lines = ["ply", f"format {forms[order]} 1.0", f"element vertex {len(points)}"]
    lines += [f"property {PLY_NAMES[kind]} {name}" for name, kind in fields]
    if extra:
        lines += ["element camera 1", "property float view", "property list uchar int matrix"]
    if faces is not None:
        lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "property uchar flag"]
    head = [line.encode() for line in lines]
    if comment:
        head.insert(2, b"comment " + comment)
    head.append(b"end_header" + newline)
    columns = dict(zip("xyzXYZ", np.tile(points.T, (2, 1))))
    table = np.empty(len(points), [(name, (order or "<") + kind) for name, kind in fields])
    for name, _ in fields:
        table[name] = columns.get(name, 7)
    body = b""
    if order:
        body += table.tobytes()
        body += struct.pack(order + "fBii", 1.5, 2, 3, 4) if extra else b""
        for face in faces or []:
            body += struct.pack(f"{order}B{len(face)}iB", len(face), *face, 9)
    else:
        rows = [" ".join(repr(value) for value in row) for row in table.tolist()]
        rows += ["1.5 2 3 4"] if extra else []
        rows += [" ".join(map(str, (len(face), *face, 9))) for face in faces or []]
        body = b"".join(row.encode() + newline for row in rows)
    return newline.join(head) + body


def ply(rng: np.random.Generator) -> Iterator[Variant]:
    layouts = {
        "xyz": [("x", "{}"), ("y", "{}"), ("z", "{}")],
        "zxy and more": [("red", "u1"), ("z", "{}"), ("nx", "f4"), ("x", "{}"), ("y", "{}"), ("label", "i2")],
    }
    for kind, points in clouds(rng).items():
        for order in ("", "<", ">"):
            for type_ in ("f8",) if kind == "utm" else ("f4", "f8"):
                for layout, fields in layouts.items():
                    stored = [(name, form.format(type_)) for name, form in fields]
                    content = ply_file(points, order, stored)
                    name = f"ply {kind} {order or 'ascii'} {type_} {layout}"
                    yield Variant(name, ".ply", content, points.astype(type_).astype(np.float64), read_with_plyfile)
    points, fields = clouds(rng)["plain"], [("x", "f8"), ("y", "f8"), ("z", "f8")]
    for order in ("", "<", ">"):
        for newline in (b"\n", b"\r\n"):
            for what, faces in (("mixed", FACES), ("triangles", [face[:3] for face in FACES]), ("no", [])):
                content = ply_file(points, order, fields, faces=faces, newline=newline, extra=newline == b"\n")
                corners = np.array(TRIANGLES if faces is FACES else faces or np.empty((0, 3)), dtype=int)
                expected = points[corners] if len(faces) else points
                yield Variant(f"ply {what} faces {order} {newline}", ".ply", content, expected, read_with_plyfile)
        for what, comment in (("latin-1", "Höhe über Grund".encode("latin-1")), ("long", b"x" * 5000)):
            yield Variant(
                f"ply {what} comment {order}", ".ply", ply_file(points, order, fields, comment=comment), points
            )
        whole = ply_file(points, order, fields, faces=FACES)
        for what, old, new in (
            ("more vertices", b"vertex 60", b"vertex 61"),
            ("fewer vertices", b"vertex 60", b"vertex 59"),
            ("negative", b"vertex 60", b"vertex -1"),
            ("a trillion", b"vertex 60", b"vertex 1000000000000"),
            ("more faces", b"face 11", b"face 12"),
            ("fewer faces", b"face 11", b"face 10"),
            ("a trillion faces", b"face 11", b"face 1000000000000"),
            ("no x", b"double x", b"double u"),
            ("x twice", b"double y", b"double x"),
            ("no type", b"double y", b"real y"),
            ("nothing a trillion times", b"element face 11", b"element void 1000000000000\nelement face 11"),
            ("no end", b"end_header", b"end_head"),
            ("no format", b"format", b"comment"),
            ("another", b"ply\n", b"plx\n"),
        ):
            assert old in whole
            yield Variant(f"ply {what} {order}", ".ply", whole.replace(old, new, 1), None)
        for what, corner in (("beyond", 60), ("far beyond", 2**30), ("negative", -5)):
            content = ply_file(points, order, fields, faces=[[0, 1, 2], [0, 1, corner]])
            yield Variant(f"ply corner {what} {order}", ".ply", content, None)
        yield Variant(f"ply face of two {order}", ".ply", ply_file(points, order, fields, faces=[[0, 1]]), None)
        yield Variant(
            f"ply capitals {order}", ".ply", ply_file(points, order, [("X", "f8"), ("Y", "f8"), ("Z", "f8")]), points
        )
    rows = ply_file(points, "", fields).split(b"\n")
    rows[20], rows[21] = rows[20].rsplit(b" ", 1)[0], rows[21] + b" 5"
    yield Variant("ply a field in another row", ".ply", b"\n".join(rows), None)
