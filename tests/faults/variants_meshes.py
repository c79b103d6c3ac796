"""OFF, OBJ and STL files in many forms."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from faults.variants import COUNT, FACES, TRIANGLES, Variant, clouds


def read_with_trimesh(path: Path) -> np.ndarray:
    import trimesh  # takes seconds

    mesh = trimesh.load(path, process=False)
    return np.asarray(mesh.vertices, np.float64)[np.asarray(mesh.faces)]


def off(rng: np.random.Generator) -> Iterator[Variant]:
    for kind, points in clouds(rng).items():
        corners = [" ".join(map(repr, point)) for point in points.tolist()]
        faces = [" ".join(map(str, (len(face), *face))) for face in FACES]
        triangles = points[np.array(TRIANGLES)]
        counts = f"{COUNT} {len(FACES)} 0"
        for name, content in {
            "plain": f"OFF\n{counts}\n" + "\n".join(corners + faces) + "\n",
            "ModelNet": f"OFF{counts}\n" + "\n".join(corners + faces) + "\n",
            "one line": f"OFF {counts} " + " ".join(corners + faces),
            "word a line": f"off\n{counts}\n" + "\n".join(" ".join(corners + faces).split()) + "\n",
            "no keyword": f"{counts}\n" + "\n".join(corners + faces),
            "no edges": f"OFF\n{COUNT} {len(FACES)}\n" + "\n".join(corners + faces),
            "mark": f"\ufeffOFF\n{counts}\n" + "\n".join(corners + faces),
            "normals": f"NOFF\n{counts}\n" + "\n".join([f"{corner} 0 0 1" for corner in corners] + faces),
            "normals, a stream": f"NOFF\n{counts}\n" + " ".join([f"{corner} 0 0 1" for corner in corners] + faces),
            "colours": f"COFF\n{counts}\n"
            + "\n".join([f"{c} 9 9 9 255" for c in corners] + [f"{f} 0.5 0.5 1" for f in faces]),
            "textures, normals, a stream": f"STNOFF\n{counts}\n"
            + " ".join([f"{c} 0 0 1 0.5 0.5" for c in corners] + faces),
            "comments": f"# a\nOFF # b\n\n{counts}\n# c\n" + "\n".join([f"{corner} # d" for corner in corners] + faces),
            "windows": f"OFF\r\n{counts}\r\n" + "\r\n".join(corners + faces) + "\r\n",
        }.items():
            yield Variant(f"off {kind} {name}", ".off", content.encode(), triangles)
        content = (
            f"OFF\n{counts}\n" + "\n".join(corners + ["3 " + " ".join(map(str, face[:3])) for face in FACES]) + "\n"
        )
        expected = points[np.array([face[:3] for face in FACES])]
        yield Variant(f"off {kind} triangles", ".off", content.encode(), expected, read_with_trimesh)
        for name, old, new in (
            ("corner beyond", faces[1], "3 4 5 60"),
            ("corner negative", faces[1], "3 4 5 -1"),
            ("face of two", faces[1], "2 4 5"),
            ("face cut", faces[0], "4 0 1 2"),
            ("vertex cut", corners[7], "1 2"),
            ("vertex a word", corners[7], "1 two 3"),
            ("half a corner", faces[1], "3 4 5 6.5"),
            ("more", counts, "70 4 0"),
            ("a trillion", counts, "1000000000000 4 0"),
            ("a trillion faces", counts, f"{COUNT} 1000000000000 0"),
            ("four dimensions", "OFF", "4OFF"),
            ("binary", "OFF", "OFF BINARY"),
        ):
            content = f"OFF\n{counts}\n" + "\n".join(corners + faces) + "\n"
            yield Variant(f"off {kind} {name}", ".off", content.replace(old, new, 1).encode(), None)
        cloud = f"OFF\n{COUNT} 0 0\n" + "\n".join(corners) + "\n"
        yield Variant(f"off {kind} cloud", ".off", cloud.encode(), points)


def obj(rng: np.random.Generator) -> Iterator[Variant]:
    for kind, points in clouds(rng).items():
        corners = ["v " + " ".join(map(repr, point)) for point in points.tolist()]
        indices = [[index + 1 for index in face] for face in FACES]
        faces = ["f " + " ".join(map(str, face)) for face in indices]
        for name, lines in {
            "plain": corners + faces,
            "textures": [
                "vt 0 0",
                *corners,
                "vn 0 0 1",
                *("f " + " ".join(f"{i}/1/1" for i in face) for face in indices),
            ],
            "colours": [f"{corner} 0.5 0.5 0.5" for corner in corners] + ["g part", "s off", "usemtl a"] + faces,
            "relative": corners + ["f " + " ".join(str(i - COUNT - 1) for i in face) for face in indices],
            "continued": corners + [face.replace(" ", " \\\n", 2) for face in faces],
            "mark": ["\ufeff" + corners[0], *corners[1:], *faces],
            "comments": ["# größe", *(f"{corner} # {n}" for n, corner in enumerate(corners)), "", *faces],
        }.items():
            content = ("\n".join(lines) + "\n").encode()
            yield Variant(f"obj {kind} {name}", ".obj", content, points[np.array(TRIANGLES)])
        content = "\n".join(corners + [" ".join(face.split()[:4]) for face in faces]).encode()
        expected = points[np.array([face[:3] for face in FACES])]
        yield Variant(f"obj {kind} triangles", ".obj", content, expected, read_with_trimesh)
        yield Variant(f"obj {kind} cloud", ".obj", "\n".join(corners).encode(), points)
        for name, line in (
            ("corner beyond", "f 1 2 61"),
            ("corner far beyond", "f 1 2 99999999999999999999999"),
            ("corner zero", "f 0 1 2"),
            ("corner before", "f 1 2 -61"),
            ("face of two", "f 1 2"),
            ("word", "f 1 two 3"),
            ("vertex of two", "v 1 2"),
            ("vertex a word", "v 1 2 three"),
        ):
            yield Variant(f"obj {kind} {name}", ".obj", "\n".join([*corners, *faces, line]).encode(), None)


def stl(rng: np.random.Generator) -> Iterator[Variant]:
    for kind, points in clouds(rng).items():
        if kind == "utm":  # float32 cannot hold it
            continue
        triangles = points[np.array(TRIANGLES)].astype(np.float32)
        facets = np.zeros(len(triangles), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
        facets["corners"] = triangles
        for head in (b"made by a test", b"solid binary"):
            content = head.ljust(80, b" ") + struct.pack("<I", len(facets)) + facets.tobytes()
            yield Variant(f"stl {kind} {head}", ".stl", content, triangles.astype(np.float64), read_with_trimesh)
        lines = ["solid a"]
        for triangle in triangles.tolist():
            corners = [f"vertex {x!r} {y!r} {z!r}" for x, y, z in triangle]
            lines += ["facet normal 0 0 1", "outer loop", *corners, "endloop", "endfacet"]
        text = "\n".join([*lines, "endsolid a"]) + "\n"
        yield Variant(f"stl {kind} text", ".stl", text.encode(), triangles.astype(np.float64))
        for name, old, new in (
            ("word", "vertex", "vertex a b c #"),
            ("facet lost", "endfacet", ""),
            ("end lost", "endsolid", ""),
        ):
            yield Variant(f"stl {kind} {name}", ".stl", text.replace(old, new, 1).encode(), None)
