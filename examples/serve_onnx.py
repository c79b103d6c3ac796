"""Classify files with an exported model: NumPy and ONNX Runtime are all it needs, no torch, no Open3D.

    python tools/export.py --checkpoint runs/demo/merged.pt --output model.onnx
    python examples/serve_onnx.py model.onnx chair.ply scan.npy table.off

Reads .ply (ASCII and binary; vertices, and polygons as a mesh), .off (meshes) and .npy (N, 3). Points are sampled from
the surface of a mesh, whose polygons must be convex or nearly so. More points than the model takes: farthest point
sampling, as in the evaluation of s2d3d.
"""

import argparse
import json
import sys
import tokenize
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

UNREADABLE = (
    runtime.Fail, runtime.InvalidProtobuf, runtime.InvalidGraph, runtime.InvalidArgument, runtime.NotImplemented,
    runtime.RuntimeException, RuntimeError,
)  # fmt: skip
DAMAGED = (
    OSError, EOFError, ValueError, LookupError, StopIteration, MemoryError, SyntaxError, TypeError, ArithmeticError,
    RecursionError, tokenize.TokenError,
)  # fmt: skip
"""What NumPy and the readers here raise on files that are damaged: it depends on the byte."""
MAX_POINTS = 1_000_000
PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip


def read_ply(path: Path) -> tuple[np.ndarray, list[list[int]]]:
    """Return vertices (V, 3) and faces, lists of corners, of a PLY file."""
    content = path.read_bytes()
    head, end, body = content.partition(b"end_header")
    lines = head.decode("latin-1").splitlines()
    if not end or not lines or lines[0].strip() != "ply":
        raise ValueError("not a PLY file")
    body = body[body.index(b"\n") + 1 :]
    encoding = ""
    elements: list[tuple[str, int, list[list[str]]]] = []
    for word, *rest in (line.split() for line in lines[1:] if line.strip()):
        if word == "format":
            encoding = rest[0]
        elif word == "element":
            elements.append((rest[0], int(rest[1]), []))
        elif word == "property":
            elements[-1][2].append(rest)
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[encoding]
    for name, count, properties in elements:  # before memory is taken: each property takes a byte or more
        if not 0 <= count * max(1, len(properties)) <= len(body) or (count and not properties):
            raise ValueError(f"is cut short, {count} rows of {name} are announced, {len(body)} bytes follow the header")
    tokens, at = iter(body.split()) if not order else None, 0

    def take(kind: str, count: int = 1) -> list[float]:
        nonlocal at
        if count < 0:
            raise ValueError("a list of negative length")
        if tokens is not None:
            return [float(next(tokens)) for _ in range(count)]
        values = np.frombuffer(body, order + PLY_TYPES[kind], count, at)
        at += values.nbytes
        return values.tolist()

    vertices, faces = np.empty((0, 3)), []
    for name, count, properties in elements:
        if name == "vertex":
            names = [p[-1] for p in properties]
            rows = np.array([[take(p[0])[0] for p in properties] for _ in range(count)]).reshape(count, len(names))
            vertices = rows[:, [names.index(axis) for axis in "xyz"]]
            continue
        for _ in range(count):
            for kind, *rest in properties:
                values = take(rest[1], int(take(rest[0])[0])) if kind == "list" else take(kind)
                if kind == "list" and rest[2] in ("vertex_indices", "vertex_index"):
                    faces.append([int(value) for value in values])
    if next(tokens, None) is not None if tokens is not None else body[at:].strip(b"\0\r\n "):
        raise ValueError("holds more than its header announces")
    return vertices, faces


def read_off(path: Path) -> tuple[np.ndarray, list[list[int]]]:
    """Return vertices (V, 3) and faces of a plain OFF file, a stream of numbers; colours are not read."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    tokens = " ".join(line.partition("#")[0] for line in text.splitlines()).split()
    if not tokens or not tokens[0].upper().startswith("OFF"):
        raise ValueError("not an OFF file")
    tokens = [*([tokens[0][3:]] if tokens[0][3:] else []), *tokens[1:]]  # the counts may touch the keyword
    num_vertices, num_faces = int(tokens[0]), int(tokens[1])
    if not 0 <= 3 * num_vertices + 4 * num_faces <= len(tokens) - 3:
        raise ValueError(f"is cut short, {num_vertices} vertices and {num_faces} faces are announced")
    at = 3 + 3 * num_vertices
    vertices, faces = np.array(tokens[3:at], dtype=np.float64).reshape(-1, 3), []
    for _ in range(num_faces):
        count = int(tokens[at])
        faces.append([int(index) for index in tokens[at + 1 : at + 1 + count]])
        if count < 3 or len(faces[-1]) != count:
            raise ValueError("a face is cut short")
        at += 1 + count
    if at != len(tokens):
        raise ValueError("holds more numbers than vertices and faces take; colours are not read")
    return vertices, faces


def read_points(path: Path, num_points: int, seed: int = 0) -> np.ndarray:
    """Return the points of a file (N, 3) float64; of a mesh `num_points` of them, drawn from its surface."""
    readers = {".ply": read_ply, ".off": read_off, ".npy": lambda file: (np.load(file, allow_pickle=False), [])}
    if path.suffix.lower() not in readers:
        raise ValueError(f"unknown kind of file, must be one of {', '.join(readers)}")
    if not path.is_file():
        raise ValueError("no such file, or not a regular one")
    vertices, faces = readers[path.suffix.lower()](path)
    if not isinstance(vertices, np.ndarray) or vertices.dtype.kind not in "fiu":
        raise ValueError("holds no array of numbers")
    if vertices.ndim != 2 or vertices.shape[1] < 3 or not np.isfinite(vertices[:, :3]).all():
        raise ValueError(f"holds an array of shape {vertices.shape}, must be (N, 3) of finite numbers")
    if vertices.shape[0] == 3 < vertices.shape[1]:
        raise ValueError(f"holds an array of shape {vertices.shape}; are points its columns? Transpose it")
    vertices = vertices[:, :3].astype(np.float64)
    if not all(0 <= corner < len(vertices) for face in faces for corner in face):
        raise ValueError(f"a face names a vertex outside the {len(vertices)} of the file")
    triangles, folded = [], []
    for face in faces:
        own, fits = fan(face, vertices)
        triangles.extend(own)
        folded.extend([not fits] * len(own))
    corners = np.array(triangles, dtype=np.int64).reshape(-1, 3)
    a, b, c = vertices[corners].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if area[np.array(folded, dtype=bool)].sum() > 1e-3 * area.sum():
        raise ValueError("a face is not convex, so a fan of triangles does not cover it; save triangles")
    if corners.size and 2 * len(np.unique(corners)) < len(vertices):
        raise ValueError("most of its vertices are corners of no face; remove them, or the faces if it is a cloud")
    return sample_mesh(vertices[corners], num_points, seed) if corners.size else vertices


def fan(face: list[int], vertices: np.ndarray) -> tuple[list[tuple[int, int, int]], bool]:
    """Cut a polygon into triangles that share a corner, the first or the second one; tell whether they cover it."""
    for first in range(2):
        face = face[first:] + face[:first]
        triangles = [(face[0], b, c) for b, c in pairwise(face[1:])]
        if len(face) <= 3:
            return triangles, True
        a, b, c = vertices[np.array(triangles)].transpose(1, 0, 2)
        normals = np.cross(b - a, c - a)
        normal, area = normals.sum(axis=0), np.linalg.norm(normals, axis=1).sum()
        if (normals @ normal >= -1e-4 * (normal @ normal)).all() and np.linalg.norm(normal) >= 1e-4 * area:
            return triangles, True
    sides, normal = vertices[face] - vertices[face[0]], normals[np.linalg.norm(normals, axis=1).argmax()]
    is_flat = np.abs(sides @ normal).max() <= 0.05 * np.abs(sides).max() * np.linalg.norm(normal)
    return triangles, len(face) == 4 and not is_flat  # a quad that is not flat has no plane in which it could be folded


def sample_mesh(triangles: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw points (count, 3) evenly from the area of triangles (F, 3, 3)."""
    random = np.random.default_rng(seed)
    a, b, c = triangles.transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.any():
        raise ValueError("all triangles have area 0")
    chosen = random.choice(len(triangles), count, p=area / area.sum())
    u, v = random.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]


def prepare(points: np.ndarray, metadata: dict, up_axis: str = "z") -> np.ndarray:
    """Return a cloud as the model saw them in its evaluation: turned, normalised, of `num_points` points, float32."""
    if len(points) < metadata["num_points"]:
        raise ValueError(f"{len(points)} points are fewer than the {metadata['num_points']} that the model takes")
    points = np.asarray(points, dtype=np.float64)
    extent, distance = float(np.ptp(points, axis=0).max()), float(np.abs(points).max())
    normalized = metadata.get("normalize") == "unit_sphere"
    is_single = bool((points.astype(np.float32) == points).all())
    if extent <= 32 * np.spacing(np.float32(distance) if is_single or not normalized else distance):
        raise ValueError(f"spans {extent:.3g} at a distance of {distance:.3g} from the origin, its shape is lost")
    if normalized and not is_single:  # in float64 first: far from the origin float32 would round the shape
        points = points - points.mean(axis=0, keepdims=True)
    points = points.astype(np.float32)
    x, y, z = points.T
    if up_axis != metadata.get("up_axis", "z"):
        points = np.stack([x, -z, y] if up_axis == "y" else [x, z, -y], axis=1)
    if metadata.get("normalize") == "unit_sphere":
        points = points - points.mean(axis=0, keepdims=True)
        points = points / max(float(np.linalg.norm(points, axis=1).max()), np.finfo(np.float32).tiny)
    return points[farthest_points(points, metadata["num_points"])] if len(points) > metadata["num_points"] else points


def farthest_points(points: np.ndarray, count: int) -> list[int]:
    """Choose points one by one, each as far as possible from those chosen before; the first is number 0."""
    distance, chosen = np.full(len(points), np.inf, dtype=np.float32), [0]
    while len(chosen) < count:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="file that tools/export.py wrote")
    parser.add_argument("files", type=Path, nargs="+", help=".ply, .off or .npy")
    parser.add_argument("--up-axis", choices=("y", "z"), default="z", help="vertical axis of the files (default: z)")
    parser.add_argument("--seed", type=int, default=0, help="of the points drawn from meshes (default: 0)")
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        parser.error(f"{arguments.model}: no such file; tools/export.py --output {arguments.model} writes it")
    try:
        session = onnxruntime.InferenceSession(str(arguments.model), providers=["CPUExecutionProvider"])
    except UNREADABLE as error:
        parser.error(f"{arguments.model}: not an ONNX file that this ONNX Runtime reads ({str(error).splitlines()[0]})")
    try:
        metadata = read_metadata(session.get_modelmeta().custom_metadata_map)
        if [item.name for item in session.get_inputs()] != ["points"] or not session.get_outputs():
            raise ValueError("does not take points and give logits; write it with tools/export.py")
    except (ValueError, RecursionError) as error:
        parser.error(f"{arguments.model}: {error}")
    failed = False
    for path in arguments.files:
        try:
            points = read_points(path, metadata["num_points"], arguments.seed)
            cloud = prepare(points, metadata, arguments.up_axis)
        except DAMAGED as error:
            print(
                f"error: {plain(path)}: {plain(str(error).splitlines()[0] if str(error) else 'is cut short')}",
                file=sys.stderr,
            )
            failed = True
            continue
        try:
            logits = np.asarray(session.run(["logits"], {"points": cloud[None]})[0], dtype=np.float64)
        except (*UNREADABLE, ValueError, TypeError) as error:
            parser.error(f"{arguments.model}: cannot be run on a cloud ({plain(str(error).splitlines()[0])})")
        names = metadata.get("class_names") or [str(index) for index in range(logits.size)]
        if logits.shape != (1, len(names)) or not np.isfinite(logits).all():
            parser.error(f"{arguments.model}: gives no finite number for each of its {len(names)} classes")
        shares = np.exp(logits[0] - logits.max())
        best = int(shares.argmax())
        print(f"{plain(path)}: {plain(names[best])} ({100 * shares[best] / shares.sum():.1f} %)")
    return int(failed)


def read_metadata(texts: dict[str, str]) -> dict:
    """Return what the file says about its input and classes, checked: the file may be a stranger's."""
    if "num_points" not in texts:
        raise ValueError("does not say how many points it takes; write it with tools/export.py")
    try:
        metadata: dict = {key: json.loads(texts[key]) for key in ("num_points", "class_names") if key in texts}
    except ValueError:
        raise ValueError("its description is damaged; write it with tools/export.py") from None
    metadata |= {key: texts[key] for key in ("up_axis", "normalize") if key in texts}
    if texts.get("in_channels", "3") != "3":
        raise ValueError(f"takes {texts.get('channels', 'more than x, y, z')}; this program gives it x, y, z alone")
    count, names = metadata["num_points"], metadata.get("class_names", ["any"])
    if type(count) is not int or not 1 <= count <= MAX_POINTS:
        raise ValueError(f"its num_points must be a whole number from 1 to {MAX_POINTS}; write it with tools/export.py")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("its class_names are no list of names; write it with tools/export.py")
    for key, known in (("up_axis", ("y", "z")), ("normalize", ("unit_sphere", "none"))):
        if metadata.get(key, known[0]) not in known:
            raise ValueError(f"its {key} must be one of {', '.join(known)}; write it with tools/export.py")
    return metadata


def plain(text: object) -> str:
    """Escape what could steer the terminal."""
    return str(text) if str(text).isprintable() else repr(str(text))[1:-1]


if __name__ == "__main__":
    sys.exit(main())
