"""Meshes: OFF and OBJ as streams of tokens, STL and GLB."""

import codecs
import io
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, quoted
from .attributes import Extras
from .polygons import cut_polygons, spans
from .text import number, parse_lines, read_bytes, without_comments

_OFF = re.compile(rb"\s*((ST)?(C)?(N)?(4)?n?OFF)(\s+BINARY)?", re.IGNORECASE)
_STL_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_STL_NAME = re.compile(rb"(?m)(^[^\S\n]*solid\b|(?<=endsolid))((?!facet\s+normal)[^\r\n])*")
"""The name of a solid, at its begin and its end."""
_STL_VERTEX = re.compile(rb"\bvertex\s+(\S+)\s+(\S+)\s+(\S+)", re.IGNORECASE)
_LOOKS = (
    "KHR_materials", "KHR_texture", "KHR_lights", "KHR_xmp", "EXT_texture", "EXT_lights", "MSFT_texture",
)  # fmt: skip
"""How extensions of GLB begin that change looks or say something, and no shapes."""
_SHAPES = {"EXT_mesh_gpu_instancing", "KHR_mesh_quantization"}
"""Extensions of GLB that a file may use without requiring them, and whose meshes are then others or elsewhere."""
_DRACO = "KHR_draco_mesh_compression"
_GLB_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, RuntimeError, AssertionError,
    struct.error,
)  # fmt: skip
"""What trimesh raises on a damaged file: it depends on the part that is damaged."""


def read_off(
    path: str | os.PathLike, *, faces_required: bool = True, extras: Extras | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a mesh. Polygons are cut into triangles; colours and normals are passed over, as are comments.

    The keyword may be any of OFF, COFF, NOFF, STOFF and their combinations, in small letters, or missing. Some files of
    ModelNet have the counts on the line of the keyword, `OFF490 518 0`. Vertices and faces stand one a line, with what
    the writer added, or anywhere in a stream of numbers without additions.

    Args:
        path: the file.
        faces_required: refuse vertices without faces, which are a cloud.
        extras: takes the normals and colours of the vertices, where given and announced by the keyword: NOFF, COFF.

    Returns:
        (V, 3) float64 vertices, (F, 3) int64 triangles.

    Raises:
        InputError: it is not there, is no OFF file, is cut short, or has a face beyond its vertices.

    Example:
        >>> _ = Path("one.off").write_text("OFF3 1 0\\n0 0 0\\n1 0 0\\n0 1 0\\n3 0 1 2\\n")  # doctest: +SKIP
        >>> read_off("one.off")[1].tolist()  # doctest: +SKIP
        [[0, 1, 2]]
    """
    path = Path(path)
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: not an OFF file ({error.strerror})") from None
    head = _OFF.match(data)
    if not (head or re.match(rb"\s*(#[^\n]*\n\s*)*\d", data) or _OFF.match(without_comments(data[:10_000]))):
        raise InputError(f"{path}: not an OFF file, its first word must be OFF")
    if b"#" in data:
        data = without_comments(data)
        head = _OFF.match(data)
    if head is not None and (head[5] or head[6] or b"nOFF" in head[1]):  # with capitals otherwise, n is a dimension
        kind = "binary" if head[6] else "of four or n dimensions"
        raise InputError(f"{path}: an OFF file that is {kind}, which is not read; write it as text in three dimensions")
    num_vertices, num_faces, start = _off_counts(path, data, head.end() if head else 0)
    if num_vertices < 0 or num_faces < 0 or (faces_required and (num_vertices < 3 or num_faces < 1)):
        raise InputError(f"{path}: {num_vertices} vertices and {num_faces} faces are no mesh")
    line = data.count(b"\n", 0, start) + 1
    parts = list(parse_lines(data, start, line=line, where=f"{path}: not an OFF file"))
    flat, counts, numbers = (np.concatenate([part[i] for part in parts] or [np.empty(0)]) for i in range(3))
    width = 3 + 4 * bool(head and head[3]) + 3 * bool(head and head[4]) + 2 * bool(head and head[2])
    further = {}
    if extras is not None and head is not None and num_vertices:
        announced = [group for group, letter in (("normal", head[4]), ("rgb", head[3])) if letter]
        further = {group: 3 + 3 * number for number, group in enumerate(announced)}
    need = 3 + 3 * len(further)
    found = _off_lines(flat, counts.astype(np.int64), num_vertices, num_faces, need)
    if isinstance(found, int) and further:  # not one a line, or lines without what is announced
        found = _off_lines(flat, counts.astype(np.int64), num_vertices, num_faces)
        further = {} if not isinstance(found, int) else further
    if isinstance(found, int):
        stream = _off_stream(flat, width, num_vertices, num_faces, need)
        if stream is None and head is None:
            raise InputError(f"{path}: not an OFF file, its first word must be OFF, and its numbers fit no mesh")
        if stream is None:
            raise _off_error(path, flat, counts.astype(np.int64), numbers, num_vertices, num_faces, found)
        found = stream
    vertices, corners, lengths = found
    for group, place in further.items():
        assert extras is not None
        extras[group] = vertices[:, place : place + 3]
    vertices = vertices[:, :3]
    if faces_required and not np.isfinite(vertices).all():
        raise InputError(f"{path}: a vertex is not three finite numbers")
    return vertices, cut_polygons(corners, lengths, vertices, str(path))


def _off_counts(path: Path, data: bytes, start: int) -> tuple[int, int, int]:
    """Return the numbers of vertices and faces, and where what follows them begins."""
    found = re.compile(rb"\s*(\d+)[^\S\n]+(\d+)(?:[^\S\n]+\d+(?=\s|$))?(?=\s|$)").match(data, start)
    if found is None:
        found = re.compile(rb"\s*(\d+)\s+(\d+)\s+\d+(?=\s|$)").match(data, start)
    if found is None:
        shown = quoted(data[start : start + 60].strip().partition(b"\n")[0].decode("latin-1"), 40)
        raise InputError(f"{path}: not an OFF file, {shown} is not its numbers of vertices, faces and edges")
    return int(found[1][:18]), int(found[2][:18]), found.end()


def _off_lines(
    flat: np.ndarray, counts: np.ndarray, num_vertices: int, num_faces: int, need: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | int:
    """Return vertices (V, need), corners and their counts where each has its line; else the place of a wrong line."""
    if len(counts) < num_vertices + num_faces:
        return len(counts)
    starts = np.cumsum(counts) - counts
    short = counts[:num_vertices] < need
    if short.any():
        return int(short.argmax())
    vertices = flat[starts[:num_vertices, None] + np.arange(need)]
    first = starts[num_vertices : num_vertices + num_faces]
    there = counts[num_vertices : num_vertices + num_faces] - 1
    lengths = flat[first]
    bad = ~((lengths >= 3) & (lengths <= there) & (lengths == np.floor(lengths)))
    if bad.any():
        return num_vertices + int(bad.argmax())
    if len(counts) > num_vertices + num_faces:
        return num_vertices + num_faces
    lengths = lengths.astype(np.int64)
    return vertices, flat[spans(first + 1, lengths)], lengths


def _off_stream(
    flat: np.ndarray, width: int, num_vertices: int, num_faces: int, need: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return vertices, corners and their counts of a stream without additions that holds nothing more; else None."""
    at = num_vertices * width
    if at + 4 * num_faces > len(flat):
        return None
    lengths, starts = np.empty(num_faces, np.int64), np.empty(num_faces, np.int64)
    for face in range(num_faces):
        if at >= len(flat) or not 3 <= flat[at] <= len(flat) or flat[at] != int(flat[at]):
            return None
        lengths[face], starts[face] = int(flat[at]), at + 1
        at += 1 + int(flat[at])
    if at != len(flat):
        return None
    return flat[: num_vertices * width].reshape(-1, width)[:, :need], flat[spans(starts, lengths)], lengths


def _off_error(
    path: Path, flat: np.ndarray, counts: np.ndarray, numbers: np.ndarray, num_vertices: int, num_faces: int, place: int
) -> InputError:
    if len(counts) < num_vertices + num_faces:
        announced = f"{num_vertices} vertices and {num_faces} faces are announced"
        return InputError(f"{path}: is cut short: {len(counts)} lines follow, {announced}")
    start = int(counts[:place].sum())
    shown = quoted(" ".join(f"{value:.9g}" for value in flat[start : start + counts[place]]), 60)
    if place >= num_vertices + num_faces:
        what = f"{len(counts) - place} lines more than {num_vertices} vertices and {num_faces} faces take"
        return InputError(f"{path}: not an OFF file: line {int(numbers[place])} begins {what}")
    what = "vertex" if place < num_vertices else "face"
    return InputError(f"{path}: not an OFF file: line {int(numbers[place])} is no {what}: {what} {shown}")


def read_obj(path: Path, extras: Extras | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read vertices and faces of a Wavefront file; a backslash at the end continues a line.

    Args:
        path: the file.
        extras: takes, where given, the colours of the vertices, which many programs write behind their coordinates, and
            the normals `vn` where there is one for each vertex.

    Returns:
        (V, 3) float64 vertices; (F, 3) int64 triangles, None without faces. Polygons are cut.

    Raises:
        InputError: a line that is no vertex or face, or a face beyond the vertices; the message names the line.
    """
    vertices: list[float] = []
    corners: list[int] = []
    lengths: list[int] = []
    more: dict[str, list[float | None]] = {"normal": [], "rgb": []}
    pending = b""
    for line, text in enumerate(read_bytes(path).split(b"\n"), 1):
        text = pending + without_comments(text).strip()
        pending = b""
        if text.endswith(b"\\"):
            pending = text[:-1] + b" "
            continue
        word, *rest = text.split() or [b""]
        word = word.lower()
        if word == b"v":
            values = [number(field) for field in rest[:3]]
            if len(values) != 3 or None in values:
                raise InputError(f"{path}: not an OBJ file: line {line} is no vertex: {_shown(text)}")
            if len(rest) == 4 and number(rest[3]) not in (0, 1):
                raise InputError(f"{path}: line {line}: a fourth number other than 1 is a weight: write three numbers")
            vertices += values  # type: ignore[arg-type]
            if extras is not None and len(rest) == 7:
                raise InputError(
                    f"{path}: line {line}: which of seven numbers are red, green and blue? Write six: {_shown(text)}"
                )
            if extras is not None and len(rest) == 6:
                more["rgb"] += [number(field) for field in rest[3:]]
        elif word == b"vn" and extras is not None:
            more["normal"] += [number(field) for field in rest[:3]]
        elif word in (b"f", b"fo"):  # corners such as 3, 3/1/2 or -1, which counts from the last vertex so far
            try:
                found = [int(corner.partition(b"/")[0]) for corner in rest]
            except ValueError:
                found = []
            so_far = len(vertices) // 3
            if len(found) < 3 or 0 in found:
                raise InputError(f"{path}: not an OBJ file: line {line} is no face: {_shown(text)}")
            if min(found) < -so_far:
                raise InputError(f"{path}: line {line}: a face names a vertex outside the {so_far} so far")
            corners += [corner - 1 if corner > 0 else so_far + corner for corner in found]
            lengths.append(len(found))
        elif word in (b"surf", b"curv", b"curv2", b"cstype"):
            raise InputError(f"{path}: line {line}: free-form curves and surfaces are not read; convert it to a mesh")
    if pending.strip():
        raise InputError(f"{path}: is cut short: its last line goes on after a backslash")
    points = np.array(vertices, dtype=np.float64).reshape(-1, 3)
    for group, values in more.items():
        if extras is not None and len(values) == points.size and None not in values:
            extras[group] = np.array(values, dtype=np.float64).reshape(-1, 3)
    if not lengths:
        return points, None
    return points, cut_polygons(np.array(corners, dtype=object), np.array(lengths), points, str(path))


def _shown(text: bytes) -> str:
    return quoted(text.decode("latin-1"), 60)


def read_stl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an STL file, binary or text: corners as (3 F, 3) float64 vertices, (F, 3) int64 triangles.

    Raises:
        InputError: not such a file, or cut short.
    """
    data = path.read_bytes()
    announced, text = int.from_bytes(data[80:84], "little"), data.removeprefix(codecs.BOM_UTF8).lstrip()
    if len(data) >= 84 and 84 + 50 * announced == len(data):
        vertices = np.frombuffer(data, _STL_FACET, announced, 84)["corners"].reshape(-1, 3).astype(np.float64)
    elif text[:5].lower() == b"solid" and b"\0" not in data[:84]:
        body = _STL_NAME.sub(b"", text.lower())  # the name may be any words
        facets, ends = (len(re.findall(rb"\b" + word + rb"\b", body)) for word in (b"facet", b"endfacet"))
        fields = [match.groups() for match in _STL_VERTEX.finditer(body)]
        before, _, rest = body.rpartition(b"endsolid")
        if not before or not facets == ends == len(fields) / 3 or rest.partition(b"\n")[2].strip():
            raise InputError(
                f"{path}: is cut short or damaged: {facets} facets begin, {ends} end, {len(fields)} corners are there"
            )
        values = [number(field) for row in fields for field in row]
        if None in values:
            lowered = data.lower()
            line = lowered.count(b"\n", 0, lowered.find(b" ".join(fields[values.index(None) // 3]))) + 1
            raise InputError(f"{path}: line {line}: a corner is not three numbers")
        vertices = np.array(values, dtype=np.float64).reshape(-1, 3)
    elif len(data) >= 84:
        raise InputError(
            f"{path}: is no STL file or cut short: {announced} facets take {84 + 50 * announced} bytes, "
            f"{len(data)} are there"
        )
    else:
        raise InputError(f"{path}: is no STL file, or cut short")
    return vertices, np.arange(len(vertices)).reshape(-1, 3)


def read_glb(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a binary glTF file with trimesh: its meshes in their places, or its points.

    Returns:
        (V, 3) float64 vertices; (F, 3) int64 triangles, None without faces.

    Raises:
        InputError: damaged, cut short, parts in other files, or trimesh is missing.
    """
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data) if len(data) >= 20 else (b"", 0, 0)
    if magic != b"glTF" or version != 2 or length != len(data):
        raise InputError(f"{path}: is no GLB file of version 2, or cut short")
    size = int.from_bytes(data[12:16], "little")
    try:
        tree = json.loads(data[20 : 20 + size])
        sizes = [item["count"] for item in tree.get("accessors", [])]
        foreign = [item for item in tree.get("buffers", []) if "uri" in item]
        if not all(isinstance(size, int) and 0 <= size <= len(data) for size in sizes) or foreign:
            raise ValueError
        unread = _unread_parts(tree)
        parts = [part for mesh in tree.get("meshes", []) for part in mesh["primitives"]]
        if any(part.get("extensions", {}).pop(_DRACO, None) for part in parts):  # its accessors hold the same
            text = json.dumps(tree).encode()
            text += b" " * (-len(text) % 4)
            head = struct.pack("<4sIII", magic, version, length - size + len(text), len(text))
            data = head + data[16:20] + text + data[20 + size :]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: is damaged, or keeps parts in other files; export it again as one GLB") from None
    if unread:
        raise InputError(f"{path}: holds {unread}: this is not read; export it again without, as plain triangles")
    try:
        import trimesh
    except ImportError as error:
        raise InputError(f"{path}: is read by trimesh, which is missing: pip install 's2d3d[mesh]'") from error
    try:
        scene = trimesh.load(io.BytesIO(data), file_type="glb", force="scene", process=False, skip_materials=True)
        parts = scene.dump()  # type: ignore[attr-defined]  # a scene, as forced
        meshes = [(np.asarray(part.vertices, np.float64), getattr(part, "faces", None)) for part in parts]
        has_points = any(isinstance(part, trimesh.PointCloud) and len(part.vertices) for part in parts)
    except _GLB_ERRORS as error:
        raise InputError(f"{path}: is damaged: trimesh cannot read it; export it again") from error
    meshes = [(vertices, faces) for vertices, faces in meshes if len(vertices)]
    vertices = np.concatenate([vertices for vertices, _ in meshes] or [np.empty((0, 3))])
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in meshes)])
    faces = [np.asarray(faces) + start for (_, faces), start in zip(meshes, starts) if faces is not None]
    if not faces:
        return vertices, None
    if has_points:  # lines, such as edges, are passed over
        raise InputError(f"{path}: holds points beside meshes; export one of them alone")
    corners = np.concatenate(faces)
    return vertices, cut_polygons(corners.ravel(), np.full(len(corners), 3), vertices, str(path))


def _unread_parts(tree: dict[str, Any]) -> str:
    """Name what the reader of GLB files would pass over or take for something else; empty if there is nothing."""
    for name in map(str, tree.get("extensionsRequired", [])):
        if not name.startswith(_LOOKS):
            return f"the extension {name}"
    for name in sorted(_SHAPES.intersection(map(str, tree.get("extensionsUsed", [])))):
        return f"the extension {name}"
    accessors, meshes, nodes = (tree.get(key, []) for key in ("accessors", "meshes", "nodes"))
    if any("sparse" in item for item in accessors):
        return "sparse accessors"
    parts = [part for mesh in meshes for part in mesh.get("primitives", [])]
    if any(part.get("mode", 4) in (5, 6) for part in parts):
        return "triangle strips or fans"
    used = [place for part in parts for place in (part["attributes"].get("POSITION"), part.get("indices"))]
    if any("bufferView" not in accessors[place] for place in used if place is not None):
        return "vertices or faces whose numbers are missing, or in an extension alone"
    shown = [node for node in nodes if "mesh" in node]
    if any(any(node.get("weights") or meshes[node["mesh"]].get("weights") or ()) for node in shown):
        return "morph targets that are in use"
    if any(node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible") is False for node in nodes):
        return "nodes that are not visible"
    return "a skin, which moves its vertices" if any("skin" in node for node in nodes) else ""
