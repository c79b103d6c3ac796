"""Files of all kinds give the same cloud, and one that is none says so in one line."""

import io
import json
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from s2d3d import create_dataset
from s2d3d.datasets import files
from s2d3d.datasets.files import read_cloud, read_points
from s2d3d.datasets.h5 import write_h5
from s2d3d.datasets.mesh import read_stl
from s2d3d.datasets.ply import read_ply
from s2d3d.errors import InputError

CUBE = [(x, y, z) for x in (0, 2) for y in (0, 1) for z in (0, 1)]
QUADS = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 3)) * (1.0, 2.0, 4.0) + 5.0


def write_cloud(path, cloud):
    rows = "".join(f"{x!r} {y!r} {z!r}\n" for x, y, z in cloud.tolist())
    if path.suffix == ".npy":
        np.save(path, cloud)
    elif path.suffix == ".txt":  # as modelnet40_normal_resampled: more columns, commas
        path.write_text(rows.replace(" ", ",").replace("\n", ",0,0,1\n"))
    elif path.suffix == ".xyz":
        path.write_text("# a comment\n" + rows)
    elif path.suffix == ".ply":
        head = "".join(f"property double {axis}\n" for axis in "xyz")
        path.write_text(f"ply\nformat ascii 1.0\nelement vertex {len(cloud)}\n{head}end_header\n{rows}")
    else:
        head = "VERSION .7\nFIELDS x y z\nSIZE 8 8 8\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {0}\nHEIGHT 1\n"
        path.write_text((head + "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {0}\nDATA ascii\n").format(len(cloud)) + rows)


@pytest.mark.parametrize("suffix", [".npy", ".txt", ".xyz", ".ply", ".pcd"])
def test_clouds_are_read_as_they_are(tmp_path, cloud, suffix):
    path = tmp_path / f"cloud{suffix}"
    write_cloud(path, cloud)
    assert np.allclose(read_points(path, 7), cloud, rtol=0, atol=1e-9)


@pytest.mark.parametrize("suffix", [".off", ".obj", ".ply"])
def test_meshes_are_sampled_evenly_and_repeatably(tmp_path, suffix):
    path = tmp_path / f"box{suffix}"
    vertices = "".join("{} {} {}\n".format(*vertex) for vertex in CUBE)
    if suffix == ".off":
        path.write_text("OFF8 6 0\n" + vertices + "".join("4 {} {} {} {}\n".format(*quad) for quad in QUADS))
    elif suffix == ".obj":
        faces = "".join("f {} {} {} {}\n".format(*(index + 1 for index in quad)) for quad in QUADS)
        path.write_text("v " + vertices.strip().replace("\n", "\nv ") + "\n" + faces)
    else:
        head = "".join(f"property float {axis}\n" for axis in "xyz")
        head = f"ply\nformat ascii 1.0\nelement vertex 8\n{head}element face 6\n"
        faces = "".join("4 {} {} {} {}\n".format(*quad) for quad in QUADS)
        path.write_text(head + "property list uchar int vertex_indices\nend_header\n" + vertices + faces)
    points = read_points(path, 4000, seed=1)
    assert points.shape == (4000, 3)
    on_side = np.isclose(points, 0) | np.isclose(points, (2, 1, 1))
    assert on_side.any(1).all() and (points >= -1e-9).all() and (points <= (2 + 1e-9, 1 + 1e-9, 1 + 1e-9)).all()
    shares = on_side.mean(0)  # two of 1 x 1 and four of 2 x 1
    assert shares == pytest.approx([0.2, 0.4, 0.4], abs=0.03)
    assert np.array_equal(points, read_points(path, 4000, seed=1))
    assert not np.array_equal(points, read_points(path, 4000, seed=2))


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_file_becomes_what_the_reader_of_data_sets_makes_of_it(tmp_path, cloud, up_axis):
    root = tmp_path / "set"
    root.mkdir()
    (root / "shape_names.txt").write_text("a\n")
    for split in ("train", "test"):
        write_h5(root / f"{split}.h5", cloud[None].astype(np.float32), [0], up_axis=up_axis)
        (root / f"{split}_files.txt").write_text(f"{split}.h5\n")
    np.save(tmp_path / "cloud.npy", cloud.astype(np.float32))
    for num_points in (200, 64):
        expected, _ = create_dataset("modelnet40", root, "test", num_points=num_points)[0]
        found = read_cloud(tmp_path / "cloud.npy", num_points, up_axis=up_axis)
        assert torch.equal(found, expected)
    plain = read_cloud(tmp_path / "cloud.npy", 200, up_axis="z", normalize=False)
    assert torch.equal(plain, torch.from_numpy(cloud).float())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.ply", None, "no such file; name a file with points"),
        ("cloud", b"1 2 3", r"unknown kind of file \(known: .ply, .pcd, "),
        ("cloud.plyy", b"1 2 3", r"unknown kind of file; did you mean '.ply'\? \(known"),
        ("cloud.pl", b"1 2 3", r"unknown kind of file; did you mean '.ply'\? \(known"),
        ("cloud.asc", b"1 2 3", r"unknown kind of file; rename it to .xyz if each row is a point \(known"),
        ("cloud.LAZ", b"1 2 3", r"unknown kind of file; decompress it to .las \(known"),
        ("cloud.gltf", b"{}", r"unknown kind of file; export it as one .glb \(known"),
        ("cloud.ptx", b"1 2 3", r"unknown kind of file \(known"),
        ("cloud.stp", b"1 2 3", r"unknown kind of file \(known"),
        ("cloud.e57", b"1 2 3", r"unknown kind of file \(known"),
        ("empty.xyz", b"", "holds no points, or is not a .xyz file"),
        ("words.txt", b"a b c\n", "cannot be read as a table: line 1: 'a' is not a number"),
        ("two.xyz", b"1 2\n3 4\n", "line 1 holds 2 numbers, must be 3 or more: x, y, z"),
        ("ragged.xyz", b"1 2 3\n3 4\n", "as a table: line 2 holds 2 numbers, must be 3 as in the others"),
        ("nan.xyz", b"nan 2 3\n3 nan 4\n", "none of its 2 points is three finite numbers"),
        ("text.npy", b"1 2 3\n", "cannot be read as a table"),
        ("text.ply", b"1 2 3\n", "holds no points, or is not a .ply file"),
        ("text.pcd", b"1 2 3\n", "holds no points, or is not a .pcd file"),
        ("text.obj", b"1 2 3\n", "holds no points, or is not a .obj file"),
        ("text.off", b"1 2 3\n", "not an OFF file, its first word must be OFF"),
        ("far.obj", b"v 1 2 3\nf 1 2 3\n", "a face names a vertex outside the 1 of the file"),
        ("words.obj", b"v a b c\n", "not an OBJ file: line 1 is no vertex: 'v a b c'"),
        ("flat.off", b"OFF 3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "all triangles have area 0"),
        ("few.xyz", b"1 2 3\n4 5 6\n", "2 points are fewer than the 5 that the model takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path, capfd, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_cloud(tmp_path / name, 5)
    assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "Open3D is kept quiet"


def test_records_are_read_by_the_names_of_their_fields(tmp_path, cloud):
    records = np.zeros(len(cloud), dtype=[("intensity", "u2"), ("z", "f8"), ("X", "f4"), ("y", "f8")])
    records["X"], records["y"], records["z"] = cloud.T
    np.save(tmp_path / "named.npy", records)
    assert np.array_equal(
        read_points(tmp_path / "named.npy", 5), np.column_stack([records[a] for a in ("X", "y", "z")])
    )
    np.save(tmp_path / "other.npy", records[["intensity", "z"]])
    with pytest.raises(InputError, match=r"other\.npy: holds records of 'intensity', 'z'; fields x, y"):
        read_points(tmp_path / "other.npy", 5)


# Normals and colours


@pytest.fixture
def sphere() -> dict[str, np.ndarray]:
    """Make points of a sphere in order: normals equal positions, colours are whole numbers up to 255."""
    rng = np.random.default_rng(3)
    points = rng.normal(size=(60, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return {"xyz": points, "normal": points, "rgb": rng.integers(0, 256, (60, 3)).astype(np.uint8)}


def rows_of(parts: dict[str, np.ndarray], order: str) -> str:
    return "".join(" ".join(map(repr, row)) + "\n" for row in np.hstack([parts[g] for g in order.split()]).tolist())


def write_ply(path, parts, *, binary):
    kinds = {"xyz": ("double", "<f8", "xyz"), "normal": ("double", "<f8", ("nx", "ny", "nz"))}
    kinds["rgb"] = ("uchar", "u1", ("red", "green", "blue"))
    names = [(group, kinds[group]) for group in ("rgb", "xyz", "normal")]  # colours first: names tell, not places
    head = "".join(f"property {kind} {name}\n" for _, (kind, _, columns) in names for name in columns)
    form = "binary_little_endian" if binary else "ascii"
    header = f"ply\nformat {form} 1.0\nelement vertex 60\n{head}end_header\n"
    if not binary:
        rows = (" ".join(str(v) for g, _ in names for v in parts[g][i].tolist()) for i in range(60))
        return path.write_text(header + "\n".join(rows) + "\n")
    record = np.zeros(60, [(group, form, 3) for group, (_, form, _) in names])
    for group, _ in names:
        record[group] = parts[group]
    return path.write_bytes(header.encode() + record.tobytes())


def write_pcd(path, parts, *, form):
    packed = parts["rgb"].astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    record = np.zeros(60, [("xyz", "<f8", 3), ("rgb", "<f4"), ("normal", "<f4", 3)])
    record["xyz"], record["rgb"], record["normal"] = parts["xyz"], packed.astype("<u4").view("<f4"), parts["normal"]
    head = (
        "VERSION .7\nFIELDS x y z rgb normal_x normal_y normal_z\nSIZE 8 8 8 4 4 4 4\nTYPE F F F F F F F\n"
        f"COUNT 1 1 1 1 1 1 1\nWIDTH 60\nHEIGHT 1\nPOINTS 60\nDATA {form}\n"
    )
    if form == "binary":
        return path.write_bytes(head.encode() + record.tobytes())
    rows = (" ".join(repr(float(v)) for v in (*r["xyz"], r["rgb"], *r["normal"])) for r in record)
    return path.write_text(head + "\n".join(rows) + "\n")


def write_las(path, parts):
    record = np.zeros(
        60, {"names": ["p", "c"], "formats": [("<i4", 3), ("<u2", 3)], "offsets": [0, 20], "itemsize": 26}
    )
    record["p"], record["c"] = np.round(parts["xyz"] * 1e6), parts["rgb"].astype(np.uint16) * 257
    head = bytearray(227)
    head[:4], head[24:26] = b"LASF", bytes([1, 2])
    struct.pack_into("<H", head, 94, 227)
    struct.pack_into("<I4xBHI", head, 96, 227, 2, 26, 60)
    struct.pack_into("<6d", head, 131, *[1e-6] * 3, *[0.0] * 3)
    return path.write_bytes(bytes(head) + record.tobytes())


FULL = {
    "ascii.ply": lambda path, parts: write_ply(path, parts, binary=False),
    "binary.ply": lambda path, parts: write_ply(path, parts, binary=True),
    "ascii.pcd": lambda path, parts: write_pcd(path, parts, form="ascii"),
    "binary.pcd": lambda path, parts: write_pcd(path, parts, form="binary"),
    "cloudcompare.txt": lambda path, parts: path.write_text(
        "//X Y Z R G B Nx Ny Nz\n60\n" + rows_of(parts, "xyz rgb normal")
    ),
    "header.csv": lambda path, parts: path.write_text(
        "x,y,z,normal_x,normal_y,normal_z,red,green,blue\n" + rows_of(parts, "xyz normal rgb").replace(" ", ",")
    ),
    "plain.xyz": lambda path, parts: path.write_text(rows_of(parts, "xyz normal rgb")),
    "plain.npy": lambda path, parts: np.save(path, np.hstack([parts["xyz"], parts["normal"], parts["rgb"]])),
    "arrays.npz": lambda path, parts: np.savez(
        path, points=parts["xyz"], normals=parts["normal"] * 2, colors=parts["rgb"]
    ),
    "cloud.off": lambda path, parts: path.write_text("CNOFF\n60 0 0\n" + rows_of(parts, "xyz normal rgb")),
    "cloud.obj": lambda path, parts: path.write_text(
        "".join(f"v {row}\n" for row in rows_of(parts, "xyz rgb").splitlines())
        + "".join(f"vn {row}\n" for row in rows_of(parts, "normal").splitlines())
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_normals_and_colours_of_clouds(tmp_path, sphere, name):
    path = tmp_path / name
    FULL[name](path, sphere)
    found = read_points(path, 7, channels="xyz+normal+rgb")
    expected = np.hstack([sphere["xyz"], sphere["normal"], sphere["rgb"] / 255])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[:, :3], read_points(path, 7))
    if not name.startswith("plain"):  # with names one may have a part of them
        np.testing.assert_array_equal(read_points(path, 7, channels="xyz+rgb"), found[:, [0, 1, 2, 6, 7, 8]])


def test_colours_of_laser_scans(tmp_path, sphere):
    write_las(tmp_path / "a.las", sphere)
    found = read_points(tmp_path / "a.las", 7, channels="xyz+rgb")
    np.testing.assert_allclose(found[:, 3:], sphere["rgb"] / 255, atol=1e-6)
    with pytest.raises(InputError, match="holds no normals, which"):
        read_points(tmp_path / "a.las", 7, channels="xyz+normal")


def test_records_of_arrays_name_their_channels(tmp_path, sphere):
    names = ["x", "y", "z", "nx", "ny", "nz"]
    record = np.zeros(60, [(name, "f8") for name in names])
    for name, column in zip(names, np.hstack([sphere["xyz"], sphere["normal"]]).T):
        record[name] = column
    np.save(tmp_path / "a.npy", record)
    np.testing.assert_allclose(read_points(tmp_path / "a.npy", 7, channels="xyz+normal")[:, 3:], sphere["normal"])


@pytest.mark.parametrize("suffix", ["npy", "xyz"])
def test_columns_without_names_must_be_what_the_channels_state(tmp_path, sphere, suffix):
    path, points = tmp_path / f"a.{suffix}", sphere["xyz"]

    def write(*more):
        np.save(path, np.hstack([points, *more])) if suffix == "npy" else np.savetxt(path, np.hstack([points, *more]))

    write(sphere["normal"])
    assert read_points(path, 7, channels="xyz+normal").shape == (60, 6)
    with pytest.raises(InputError, match=r"colours hold -\d"):
        read_points(path, 7, channels="xyz+rgb")
    write(sphere["rgb"] / 255)
    assert np.allclose(read_points(path, 7, channels="xyz+rgb")[:, 3:], sphere["rgb"] / 255)
    with pytest.raises(InputError, match=r"its columns 4 to 6 have no names and are no unit normals, .*; name the"):
        read_points(path, 7, channels="xyz+normal")
    write(sphere["normal"], sphere["rgb"])
    with pytest.raises(InputError, match=r"holds no normals \(6 columns without names\), which"):
        read_points(path, 7, channels="xyz+normal")


def test_a_mesh_has_the_normals_of_its_faces_and_colours_between_its_corners(tmp_path):
    vertices = "".join("{} {} {} {} 0 0\n".format(*vertex, 255 * vertex[0] // 2) for vertex in CUBE)
    faces = "".join("4 {} {} {} {}\n".format(*quad) for quad in QUADS)
    head = "".join(f"property float {axis}\n" for axis in "xyz")
    head += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    header = f"ply\nformat ascii 1.0\nelement vertex 8\n{head}element face 6\n"
    (tmp_path / "a.ply").write_text(header + "property list uchar int vertex_indices\nend_header\n" + vertices + faces)
    found = read_points(tmp_path / "a.ply", 500, seed=1, channels="xyz+normal+rgb")
    np.testing.assert_array_equal(found[:, :3], read_points(tmp_path / "a.ply", 500, seed=1))
    on_side = np.isclose(found[:, :3], 0) | np.isclose(found[:, :3], (2, 1, 1))
    np.testing.assert_allclose(np.abs(found[:, 3:6]), on_side, atol=1e-9)
    np.testing.assert_allclose(found[:, 6], found[:, 0] / 2, atol=0.01)
    assert not found[:, 7:].any()
    (tmp_path / "a.off").write_text("COFF\n3 1 0\n0 0 0 1 0 0 1\n1 0 0 1 0 0 1\n0 1 0 1 0 0 1\n3 0 1 2\n")
    drawn = read_points(tmp_path / "a.off", 9, channels="xyz+normal+rgb")
    np.testing.assert_allclose(drawn[:, 2:], [[0, 0, 0, 1, 1, 0, 0]] * 9, atol=1e-9)
    (tmp_path / "a.stl").write_text(
        "solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
        "endsolid a\n"
    )
    assert (read_points(tmp_path / "a.stl", 9, channels="xyz+normal")[:, 5] == 1).all()
    with pytest.raises(
        InputError, match=r"a\.stl: holds no colours \(none of its vertices\), which .*=xyz\+rgb needs; set"
    ):
        read_points(tmp_path / "a.stl", 9, channels="xyz+rgb")


def test_missing_channels_are_one_line_or_estimated(tmp_path, sphere):
    np.savetxt(tmp_path / "a.xyz", sphere["xyz"] * 2 + 7)
    with pytest.raises(InputError, match=(
        r"a\.xyz: holds no normals, which data.channels=xyz\+normal needs; set data.channels=xyz for a training, "
        r"estimate them by data.estimate_normals=true or --estimate-normals, or use other files$"
    )):  # fmt: skip
        read_points(tmp_path / "a.xyz", 7, channels="xyz+normal")
    found = read_points(tmp_path / "a.xyz", 7, channels="xyz+normal", estimate_normals=True)
    assert (found[:, 3:] * sphere["normal"]).sum(1).min() > 0.7, "outwards, as far as 60 points show it"
    write_ply(tmp_path / "b.ply", sphere, binary=True)
    kept = read_points(tmp_path / "b.ply", 7, channels="xyz+normal", estimate_normals=True)
    np.testing.assert_array_equal(kept, read_points(tmp_path / "b.ply", 7, channels="xyz+normal"))


def test_points_without_a_finite_normal_are_left_out_or_refused(tmp_path, sphere):
    normals = sphere["normal"].copy()
    normals[5] = np.nan
    np.savez(tmp_path / "a.npz", points=sphere["xyz"], normals=normals)
    assert len(read_points(tmp_path / "a.npz", 7, channels="xyz+normal")) == 59
    with pytest.raises(InputError, match="point 5 is not"):
        read_points(tmp_path / "a.npz", 7, channels="xyz+normal", allow_missing=False)


@pytest.mark.parametrize("up_axis", ["y", "z"])
@pytest.mark.parametrize("num_points", [60, 20])
def test_a_cloud_keeps_its_rows_together(tmp_path, sphere, up_axis, num_points):
    """Of a sphere in its unit frame normals equal positions, after turning and thinning too."""
    both = np.vstack([sphere["xyz"], -sphere["xyz"]])  # so that its centre is the origin
    np.save(tmp_path / "a.npy", np.hstack([3 * both + 10, both, np.abs(both)]))
    cloud = read_cloud(tmp_path / "a.npy", num_points, up_axis=up_axis, channels="xyz+normal+rgb")
    assert cloud.shape == (num_points, 9) and cloud.dtype == torch.float32
    torch.testing.assert_close(cloud[:, 3:6], cloud[:, :3], atol=1e-5, rtol=0)
    place = [6, 7, 8] if up_axis == "z" else [6, 8, 7]
    torch.testing.assert_close(cloud[:, place], cloud[:, :3].abs(), atol=1e-5, rtol=0)
    np.save(tmp_path / "b.npy", 3 * both + 10)
    assert cloud[:, :3].equal(read_cloud(tmp_path / "b.npy", num_points, up_axis=up_axis))


# What could be taken for points and is not, or is them in other columns

PLY = (
    "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    "element face 1\nproperty list {} int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n{} 0 1 2\n"
)


def numbered(first, separator=" "):
    """Make a table whose first column is a function of the row."""
    rows = ([first(n), n * n / 7 + 0.1, (n % 5) / 3 + 0.1, 0.5] for n in range(20))
    return "".join(
        separator.join(f"{value:.6g}" if value < 1e6 else f"{value:.3f}" for value in row) + "\n" for row in rows
    )


ROWS = "".join(f"{n + 0.5} {n + 1.5} {n * n + 2.5} {n + 3.5}\n" for n in range(20))


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (
            ".xyz",
            "# number x y z and time\n" + ROWS,
            "which columns are x, y and z? A comment says 'number x y z and time'",
        ),
        (".xyz", "# points as x y z r\n" + ROWS.replace("\n", " 1 2\n"), "which columns are x, y and z?"),
        (".xyz", "# exported x y z\n" + ROWS, "which columns are x, y and z? A comment says 'exported x y z'"),
        (".xyz", "# written as z y x\n" + ROWS.replace(".5\n", "\n"), "which columns are x, y and z?"),
        (".xyz", "1 " * 40_000, "line 1 has more than 10,000 numbers; a row is one point: x, y, z"),
        (".csv", "1;" * 40_000 + "1", "line 1 has more than 10,000 numbers; a row is one point: x, y, z"),
        (".csv", "1," * 40_000 + "1", "line 1 has more than 10,000 numbers; a row is one point: x, y, z"),
        (".ply", PLY.format("float", "inf"), "line 13: a face is cut short or holds too many corners"),
        (".ply", PLY.format("float", "nan"), "line 13: a face is cut short or holds too many corners"),
        (".csv", "0,1,2\n" + ROWS.replace(" ", ","), "line 1 numbers the columns, it is no point; remove it"),
        (".csv", "0,1,2,3\n" + ROWS.replace(" ", ","), "line 1 numbers the columns, it is no point; remove it"),
        (".csv", '"1,4","2,3","4,6"\n' * 9, "holds decimal commas in quotes; write decimal points"),
        (".txt", "7,8, 6,4, 5,1\n1,2, 0,4, 5,7\n" * 9, "commas stand between its numbers and within them"),
        (".xyz", "".join(f"{n} 0.{n} 1.{n} 0.5\n" for n in range(20)), "its first column counts the rows"),
        (".txt", "".join(f"{n},0.{n},1.{n},0.5\n" for n in range(1, 30)), "its first column counts the rows"),
        (".txt", "".join(f"{10 * n} 0.{n} 1.{n} 0.5\n" for n in range(5, 30)), "its first column counts the rows"),
        (".xyz", "20 3 0\n" + "".join(f"0.5 0.{n} 1.{n}\n" for n in range(20)), "line 1 begins with 20, and as many"),
        (".xyz", numbered(lambda n: 7 * n * n % 20), "its first column holds whole numbers only, so it is not taken"),
        (".csv", numbered(lambda n: n % 3, ","), "first column holds whole numbers only, so it is not taken for x;"),
        (".csv", numbered(lambda n: 0.04 * n, ","), "its first column counts the rows"),
        (".txt", numbered(lambda n: 1.7e9 + n + n % 3 / 9), "its first column seems to hold times"),
        (".csv", "".join(f"{n},{n % 7},{3 * n},{n % 9},1,5\n" for n in range(20)), "commas stand between its numbers"),
        (".obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 \\", "its last line goes on after a backslash"),
        (".obj", "v 0 0 0\nv 1 0 0 2\nv 0 1 0\nf 1 2 3", "line 2: a fourth number other than 1 is a weight"),
        (".obj", "v 0 0 0\nv 1 0 -1.#IND\nv 0 1 0\nf 1 2 3", "line 2 is no vertex: 'v 1 0 -1.#IND'"),
        (".xyz", ROWS + "1 2 -1.#IND 3\n", "line 21: '-1.#IND' is not a number"),
        (".csv", "1,2,1.#QNAN\n" * 9, "line 1: '1.#QNAN' is not a number"),
        (".ply", PLY.format("uchar", "3").replace("0 1 0\n", "0 1 1.#INF\n"), "line 12: '1.#INF' is not a number"),
        (".off", "OFF 3 1 0\n0 0 0\n1 0 -1.#IND\n0 1 0\n3 0 1 2\n", "line 3: '-1.#IND' is not a number"),
        (".off", "nOFF\n3\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "of four or n dimensions, which is not read"),
        (".txt", "-232 139 -789\n1,038 12 13\n", "does the comma in 1,038 separate thousands or decimals?"),
        (".csv", "-232;139;-789\n1,038;12;13\n", "does the comma in 1,038 separate thousands or decimals?"),
        (".csv", "1,303.16;2.5;3.5\n1,5;2;3\n", "line 1: '1,303.16' is not a number"),
        (".txt", "0.5 0.7 0.9 chair\n" * 9, "line 1: 'chair' is not a number; remove this column"),
        (".csv", "x,y,z,name\n" + "0.5,0.7,0.9,chair\n" * 9, "line 2: 'chair' is not a number; remove this column"),
        (".txt", "\u22121.5 2 3\n1 2 3\n", "line 1: '\u22121.5' is not a number"),
        (".xyz", "1e-25 2e-25 3e-25\n2e-25 1e-25 0\n" * 5, "spans 3e-25, must be at least 1e-18; scale it up"),
    ],
)
def test_text_that_could_be_misread_is_refused(tmp_path, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    path.write_text(content, "utf-8")
    with pytest.raises(InputError) as error:
        read_points(path, 8)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, shown", [("0.9 0.5 0.1", "0.9"), ("255 -1 0", "-1"), ("0 0 300", "300")])
@pytest.mark.parametrize("suffix", ["ply", "pcd"])
def test_colours_of_text_have_the_type_that_the_header_announces(tmp_path, suffix, kind, shown):
    if suffix == "ply":
        head = PLY_HEAD + "".join(f"property uchar {name}\n" for name in ("red", "green", "blue")) + "end_header\n"
    else:
        head = (
            "VERSION .7\nFIELDS x y z r g b\nSIZE 4 4 4 1 1 1\nTYPE F F F U U U\nCOUNT 1 1 1 1 1 1\nWIDTH 3\n"
            "HEIGHT 1\nPOINTS 3\nDATA ascii\n"
        )
    path = tmp_path / f"a.{suffix}"
    path.write_text(f"{head}0 0 0 1 2 3\n1 0 0 1 2 3\n0 1 0 {kind}\n")
    assert len(read_points(path, 3)) == 3
    message = f"colours: holds {shown}, its header announces uint8; correct the type in the header"
    with pytest.raises(InputError, match=message):
        read_points(path, 3, channels="xyz+rgb")


def test_colours_of_points_that_are_left_out_do_not_matter(tmp_path):
    head = PLY_HEAD + "".join(f"property uchar {name}\n" for name in ("red", "green", "blue")) + "end_header\n"
    (tmp_path / "a.ply").write_text(f"{head}0 0 0 1 2 3\nnan nan nan nan nan nan\n0 1 0 255 0 0\n")
    assert read_points(tmp_path / "a.ply", 2, channels="xyz+rgb").tolist()[1] == [0, 1, 0, 1, 0, 0]


def test_a_packed_colour_may_be_written_without_a_sign(tmp_path):
    head = "VERSION .7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F I\nCOUNT 1 1 1 1\nWIDTH 2\nHEIGHT 1\nPOINTS 2\n"
    value = 0xFFFF0080
    (tmp_path / "a.pcd").write_text(f"{head}DATA ascii\n0 0 0 {value}\n1 0 0 {value - 2**32}\n")
    found = read_points(tmp_path / "a.pcd", 2, channels="xyz+rgb")
    np.testing.assert_allclose(found[:, 3:], np.array([[255, 0, 128]] * 2) / 255, atol=1e-6)


@pytest.mark.parametrize("separator", [";", "\t", " "])
@pytest.mark.parametrize("extra", ["2", "255 17 0"])
def test_three_decimals_behind_a_comma_may_stand_beside_whole_numbers(tmp_path, separator, extra):
    row = separator.join(["6,096", "3,158", "-1,368", *extra.split()])
    other = separator.join(["1,096", "3,250", "1,360", *extra.split()])
    (tmp_path / "a.txt").write_text(f"{row}\n{other}\n" * 3)
    assert read_points(tmp_path / "a.txt", 2)[:2].tolist() == [[6.096, 3.158, -1.368], [1.096, 3.25, 1.36]]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.xyz", "0 0 0.# a\n1. 2. 3.# last\n"),
        ("a.obj", "v 0. 0. 0.#c\nv 1. 2. 3.#c\n"),
        ("a.csv", '"sep=,"\nx,y,z\n0,0,0\n1,2,3.#d\n'),
        ("b.csv", "SEP=;\n0;0;0\n1;2;3\n"),
    ],
)
def test_a_comment_may_follow_a_decimal_point(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_points(tmp_path / name, 2).tolist() == [[0, 0, 0], [1, 2, 3]]


def test_a_spreadsheets_line_that_names_the_separator_is_passed_over(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nz;y;x\n1;2;3\n4;5;6\n")
    assert read_points(tmp_path / "a.csv", 2).tolist() == [[3, 2, 1], [6, 5, 4]]


@pytest.mark.parametrize("counts", ["3 0 1 2.5", "3 0 1 2.5 4 0 1 2 3"])
def test_corners_of_a_binary_ply_are_whole_numbers(tmp_path, counts):
    """In rows of one length, and of several."""
    values, rows = list(map(float, counts.split())), b""
    while values:
        size = int(values.pop(0))
        rows += bytes([size]) + np.array(values[:size], "<f4").tobytes()
        del values[:size]
    faces = 2 if "4" in counts else 1
    head = PLY_HEAD.replace("ascii", "binary_little_endian").replace("vertex 3", "vertex 4")
    head += f"element face {faces}\nproperty list uchar float vertex_indices\nend_header\n"
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], "<f4").tobytes()
    (tmp_path / "a.ply").write_bytes(head.encode() + corners + rows)
    with pytest.raises(InputError, match=r"a face names a vertex outside the 4 of the file \(face 0\)"):
        read_points(tmp_path / "a.ply", 8)
    (tmp_path / "a.ply").write_bytes(
        head.encode() + corners + rows.replace(np.float32(2.5).tobytes(), np.float32(2).tobytes())
    )
    assert len(read_points(tmp_path / "a.ply", 8)) == 8


def test_points_beside_a_mesh_are_not_dropped(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    scene = trimesh.Scene([trimesh.creation.box(), trimesh.PointCloud(np.random.default_rng(0).random((9, 3)) + 5)])
    (tmp_path / "a.glb").write_bytes(scene.export(file_type="glb"))
    with pytest.raises(InputError, match="holds points beside meshes; export one of them alone"):
        read_points(tmp_path / "a.glb", 8)
    edges = trimesh.load_path(np.array([[[2.0, 0, 0], [3, 0, 0]]]))
    (tmp_path / "b.glb").write_bytes(trimesh.Scene([trimesh.creation.box(), edges]).export(file_type="glb"))
    assert read_points(tmp_path / "b.glb", 400).max() <= 0.5, "edges are no surface"


@pytest.mark.parametrize("suffix", [".off", ".obj", ".ply"])
def test_vertices_that_no_face_uses_are_passed_over_unless_they_are_most(tmp_path, suffix):
    """Half of them, as in cleaned meshes, change nothing; a cloud with one face is no mesh."""
    path = tmp_path / f"a{suffix}"

    def write(unused):
        rows = ["0 0 0", "1 0 0", "0 1 0", *(f"{n} 9 9" for n in range(unused))]
        texts = {
            ".off": f"OFF {len(rows)} 1 0\n" + "\n".join(rows) + "\n3 0 1 2\n",
            ".obj": "v " + "\nv ".join(rows) + "\nf 1 2 3\n",
            ".ply": PLY.format("uchar", "3").replace("vertex 3", f"vertex {len(rows)}").replace(
                "0 0 0\n1 0 0\n0 1 0\n", "\n".join(rows) + "\n"
            ),
        }  # fmt: skip
        path.write_text(texts[suffix])

    write(0)
    expected = read_points(path, 30)
    write(3)
    assert np.array_equal(read_points(path, 30), expected)
    write(1997)
    with pytest.raises(
        InputError, match=r"1997 of its 2000 vertices are corners of no face, .*; remove these vertices,"
    ):
        read_points(path, 30)


def test_a_binary_stl_may_begin_as_a_text_does(tmp_path):
    (tmp_path / "a.stl").write_bytes(b"solid".ljust(80) + (1).to_bytes(4, "little") + bytes(52))
    with pytest.raises(InputError, match="1 facets take 134 bytes, 136 are there"):
        read_stl(tmp_path / "a.stl")


@pytest.mark.parametrize(
    "comment", ["# columns: id x y z", "# fields: frame x y z", "# Fields: id, X, Y, Z", "# id[-] X[m] Y[m] Z[m]"]
)
def test_a_comment_names_the_columns(tmp_path, comment):
    (tmp_path / "a.xyz").write_text(comment + "\n" + ROWS)
    assert read_points(tmp_path / "a.xyz", 8)[0].tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("count", ["", "20\n", "\n20\n# a\n"])
@pytest.mark.parametrize("further", ["", "# " + "much more of it " * 400 + "\n", "# made by x y z of Z\n" * 300])
@pytest.mark.parametrize("comment", ["# y x z", "// fields: y x z", "# y[m] x[m] z[m]"])
def test_a_comment_names_the_columns_wherever_it_stands_in_front_of_them(tmp_path, count, further, comment):
    rows = "".join(" ".join(row.split()[:3]) + "\n" for row in ROWS.splitlines())
    expected = [[float(row.split()[place]) for place in (1, 0, 2)] for row in ROWS.splitlines()]
    for text in (count + further + comment + "\n" + rows, further + comment + "\n" + count + rows):
        (tmp_path / "a.xyz").write_text(text)
        assert read_points(tmp_path / "a.xyz", 8).tolist() == expected


@pytest.mark.parametrize("separator", [";", "\t", " "])
@pytest.mark.parametrize("first", [0, 1])
def test_thousands_are_found_in_every_row(tmp_path, separator, first):
    parts = [row.replace(";", separator) for row in ("1,000;1,001;1,002\n" * 60, "895;120;333\n" * 9)]
    path = tmp_path / "a.txt"
    path.write_text(parts[first] + parts[1 - first])
    with pytest.raises(InputError, match="does the comma in 1,000 separate thousands or decimals"):
        read_points(path, 8)
    path.write_text(parts[first] + parts[1 - first] + "0,5;0,25;0,125\n".replace(";", separator))
    assert read_points(path, 8)[-1].tolist() == [0.5, 0.25, 0.125], "no thousands"


@pytest.mark.parametrize(
    "array", [np.zeros((48, 64, 3), np.uint8), np.random.default_rng(0).random((200, 64))], ids=["image", "features"]
)
def test_arrays_that_are_no_cloud_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match="is it an image, or features"):
        read_points(tmp_path / "a.npy", 8)


@pytest.mark.parametrize("ends", [["\r"], ["\r\n"], ["\r", "\n"], ["\n", "\r", "\r\n"]])
def test_lines_may_end_in_any_way(tmp_path, ends):
    lines = ROWS.split("\n")[:-1]
    text = "".join(line + ends[index % len(ends)] for index, line in enumerate(lines))
    (tmp_path / "a.xyz").write_bytes(text.encode())
    assert read_points(tmp_path / "a.xyz", 8).tolist() == [list(map(float, line.split()[:3])) for line in lines]


@pytest.mark.parametrize("shape", [(20, 3, 1024), (16, 6, 2048), (2, 3, 20), (1, 3, 64), (1, 9, 33)])
def test_clouds_with_channels_first_are_no_map(tmp_path, shape):
    np.savez(tmp_path / "a.npz", points=np.random.default_rng(0).normal(size=shape))
    with pytest.raises(InputError, match=r"are points its columns\? Transpose it: a row is a point"):
        read_points(tmp_path / "a.npz", 8)


def test_an_array_whose_first_column_numbers_its_rows_is_refused(tmp_path):
    points = np.random.default_rng(0).normal(size=(60, 4))
    np.save(tmp_path / "a.npy", points[points[:, 0].argsort()])
    assert len(read_points(tmp_path / "a.npy", 8)) == 60, "points in order are points"
    np.save(tmp_path / "a.npy", np.round(9 * points))
    assert len(read_points(tmp_path / "a.npy", 8)) == 60, "so are whole numbers"
    points[:, 0] = np.round(99 * points[:, 0])
    np.save(tmp_path / "a.npy", points)
    with pytest.raises(
        InputError, match=r"first column holds whole numbers only, .* or records with fields x, y and z"
    ):
        read_points(tmp_path / "a.npy", 8)


def first_columns(count: int) -> dict[str, np.ndarray]:
    """First columns that are no x, by what is said of them, in forms that files have."""
    rng = np.random.default_rng(3)
    jitter = np.cumsum(rng.integers(0, 3, count))  # with ties
    return {
        "times 1": 1.6e9 + jitter * 1e-3, "times 2": 1.6e9 + rng.permutation(count) * 1.7e-3,
        "times 3": 1.6e18 + jitter * 1e3, "times 4": 345678.9 + jitter * 1e-3, "times 5": 3.1e8 + jitter * 0.1,
        "labels 1": rng.integers(0, 5, count), "labels 2": rng.integers(-1, 2, count), "labels 3": np.full(count, 7),
        "labels 4": np.sort(rng.integers(0, 64, count))[::-1] if count > 9000 else rng.integers(0, 3, count),
        "number 1": np.sort(rng.choice(5 * count, count, replace=False)), "number 2": rng.permutation(count),
        "number 3": rng.permutation(count) + 100_000, "number 4": rng.choice(5 * count, count, replace=False),
        "counts 1": np.arange(count), "counts 2": 5.0 - 0.25 * np.arange(count),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["npy", "txt"])
@pytest.mark.parametrize("count", [200, 10_000])
def test_a_first_column_of_times_labels_or_numbers_is_not_taken_for_x(tmp_path, suffix, count):
    """Beside millimetres, which are whole numbers, as beside metres."""
    metres = np.random.default_rng(1).normal(size=(count, 3))
    for held, column in first_columns(count).items():
        for coordinates in (metres, (metres * 1000).round()):
            path, table = tmp_path / f"a.{suffix}", np.column_stack([column, coordinates])
            np.save(path, table) if suffix == "npy" else np.savetxt(
                path, table, fmt="%.9g" if held[0] == "c" else "%.4f"
            )
            with pytest.raises(
                InputError, match=r"its first column .*, so it is not taken for x; remove it, or"
            ) as error:
                read_points(path, 8)
            if coordinates is not metres:
                assert held.split()[0] in str(error.value)


def real_clouds() -> dict[str, np.ndarray]:
    """Coordinates as instruments and programs write them."""
    rng = np.random.default_rng(2)
    object_ = rng.normal(size=(3000, 3)) * (2, 1, 0.7)
    utm, swiss = np.array([3.1e5, 5.1e6, 100]), np.array([2_600_000, 1_200_000, 400])
    rows, columns = np.mgrid[0:40, 0:50]
    voxels = np.unique((object_ * (2, 10, 10)).round(), axis=0)
    clouds = {
        "UTM": object_ + utm, "Switzerland": object_ + swiss,
        "UTM, mm": (1000 * (object_ + utm)).round(), "northing first": object_ + utm[[1, 0, 2]],
        "mm": (1000 * object_).round(), "mm, 60 points": (1000 * object_[:60]).round(), "cm": (100 * object_).round(),
        "in front of a car": object_ / 3 + (25, 1, -1), "the same in mm": (object_ * 300 + (25_000, 900, -900)).round(),
        "voxels": voxels, "positive voxels": voxels - voxels.min(axis=0),
        "heights": np.stack([columns.ravel() * 10, rows.ravel() * 10, rng.random(2000) * 9], axis=1),
        "heights in mm": np.stack([columns.ravel(), rows.ravel(), rng.integers(0, 900, 2000)], axis=1),
        "turntable": np.stack([np.cos(np.arange(2000) / 9), np.sin(np.arange(2000) / 9), np.arange(2000) / 99], axis=1),
        "along a tunnel": object_ * (20, 1, 1) + (123_456, 0, 0),
    }  # fmt: skip
    clouds |= {f"{name}, in order": cloud[np.lexsort(cloud.T[::-1])] for name, cloud in clouds.items()}
    del clouds["along a tunnel, in order"]  # docs/own_data.md says so
    return clouds


@pytest.mark.parametrize("name", real_clouds())
def test_coordinates_are_not_taken_for_times_labels_or_numbers(tmp_path, name):
    cloud = real_clouds()[name]
    np.save(tmp_path / "a.npy", np.column_stack([cloud, np.arange(len(cloud)) % 255]))
    assert np.array_equal(read_points(tmp_path / "a.npy", 8), cloud)


@pytest.mark.parametrize("shape", [(33, 400, 3), (2, 16, 6)])
def test_a_batch_of_clouds_is_no_map(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=shape))
    with pytest.raises(InputError, match=rf"are they {shape[0]} clouds\? Save each in a file of its own"):
        read_points(tmp_path / "a.npy", 8)
    np.save(tmp_path / "a.npy", np.load(tmp_path / "a.npy")[:1])
    assert len(read_points(tmp_path / "a.npy", 8)) == shape[1], "a batch of one is this one"


@pytest.mark.parametrize(("height", "width"), [(48, 64), (3, 16), (200, 20), (8, 5)])
def test_a_map_of_a_depth_camera_is_one_cloud(tmp_path, height, width):
    """A plane with a step in front of a wall; a tenth of the points is missing."""
    rng = np.random.default_rng(0)
    v, u = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    depth = np.where(u > 0.5, 2.0, 3.0) + 0.01 * rng.normal(size=u.shape)
    grid = np.stack([u * depth, v * depth, depth], axis=2)
    grid[rng.random(u.shape) < 0.1] = np.nan
    np.save(tmp_path / "a.npy", grid)
    assert len(read_points(tmp_path / "a.npy", 8)) == np.isfinite(grid[:, :, 0]).sum()


def test_an_error_of_a_reader_names_the_file(tmp_path, monkeypatch):
    def fails(path, extras):
        raise OverflowError("too large\nfor this")

    monkeypatch.setitem(files._CLOUDS, ".xyz", fails)
    (tmp_path / "a.xyz").write_text(ROWS)
    message = r"^\S+a\.xyz: is damaged, or no \.xyz file \(OverflowError: too large\); save the points again$"
    with pytest.raises(InputError, match=message):
        read_points(tmp_path / "a.xyz", 8)


def test_a_binary_ply_whose_list_is_endless_is_refused(tmp_path):
    head, _, _ = PLY.format("float", "3").replace("ascii", "binary_little_endian").partition("0 0 0\n")
    path = tmp_path / "a.ply"
    for count in (np.inf, np.nan, -1, 2.5):
        path.write_bytes(head.encode() + struct.pack("<9f", *range(9)) + struct.pack("<f3i", count, 0, 1, 2))
        with pytest.raises(InputError, match=r"a\.ply: is cut short or damaged: 1 rows of 'face' are announced"):
            read_points(path, 8)


@pytest.mark.parametrize("kind", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_one_line_however_it_is_compressed(tmp_path, kind):
    stored, path = io.BytesIO(), tmp_path / "a.npz"
    np.save(stored, np.random.default_rng(0).normal(size=(200, 3)))
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("points.npy", stored.getvalue())
    whole = path.read_bytes()
    for at in range(50, len(whole) - 200, len(whole) // 12):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"^\S+a\.npz: [^\n]+$"):
            read_points(path, 8)


def write_glb(path, change) -> None:
    """Write a box whose description is changed."""
    data = pytest.importorskip("trimesh").creation.box().export(file_type="glb")
    size = int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20 : 20 + size])
    change(tree)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    rest = data[20 + size :]
    head = struct.pack("<4sIII", b"glTF", 2, 20 + len(text) + len(rest), len(text))
    path.write_bytes(head + b"JSON" + text + rest)


def compressed(tree) -> None:
    """Add a second, compressed form of the box."""
    tree["extensionsUsed"] = ["KHR_draco_mesh_compression"]
    draco = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    tree["meshes"][0]["primitives"][0]["extensions"] = draco


def compressed_alone(tree) -> None:
    compressed(tree)
    for accessor in tree["accessors"]:
        accessor.pop("bufferView")


def visibility(shown):
    return {"extensions": {"KHR_node_visibility": {"visible": shown}}}


def at_rest_in_the_node(tree):
    """Weights of a node stand in the place of those of its mesh."""
    tree["meshes"][0]["weights"] = [1]
    for node in tree["nodes"]:
        node["weights"] = [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["accessors"][0].update(sparse={"count": 1}), "holds sparse accessors"),
        (lambda tree: tree["accessors"][0].pop("bufferView"), "holds vertices or faces whose numbers are missing"),
        (compressed_alone, "holds vertices or faces whose numbers are missing, or in an extension alone"),
        (lambda tree: tree["meshes"][0]["primitives"][0].update(mode=6), "holds triangle strips or fans"),
        (lambda tree: tree["meshes"][0].update(weights=[0, 0.5]), "holds morph targets that are in use"),
        (lambda tree: tree["nodes"][-1].update(weights=[1]), "holds morph targets that are in use"),
        (lambda tree: tree["nodes"][-1].update(skin=0), "holds a skin, which moves its vertices"),
        (lambda tree: tree["nodes"][0].update(visibility(False)), "holds nodes that are not visible"),
        *(
            (lambda tree, key=key, name=name: tree.update({key: ["KHR_materials_unlit", name]}),
            f"holds the extension {name}")
            for key, name in [
                ("extensionsRequired", "EXT_meshopt_compression"), ("extensionsRequired", "KHR_draco_mesh_compression"),
                ("extensionsUsed", "EXT_mesh_gpu_instancing"), ("extensionsUsed", "KHR_mesh_quantization"),
            ]
        ),
    ],
)  # fmt: skip
def test_parts_of_a_glb_that_are_not_read_are_named(tmp_path, change, message):
    write_glb(tmp_path / "a.glb", change)
    with pytest.raises(InputError, match=f"{message}.*: this is not read; export it again without"):
        read_points(tmp_path / "a.glb", 8)


LOOKS = ["EXT_texture_webp", "EXT_texture_avif", "MSFT_texture_dds", "KHR_xmp_json_ld", "KHR_texture_basisu"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(extensionsUsed=LOOKS, extensionsRequired=LOOKS),
        lambda tree: tree["meshes"][0].update(weights=[0, 0]),
        at_rest_in_the_node,
        lambda tree: tree["nodes"][0].update(visibility(True)),
        compressed,
    ],
    ids=["looks", "morph targets at rest", "at rest in the node", "visible", "Draco beside plain numbers"],
)
def test_what_changes_no_shape_of_a_glb_is_passed_over(tmp_path, capfd, caplog, change):
    write_glb(tmp_path / "a.glb", lambda tree: None)
    write_glb(tmp_path / "b.glb", change)
    assert np.array_equal(read_points(tmp_path / "a.glb", 99), read_points(tmp_path / "b.glb", 99))
    assert capfd.readouterr() == ("", "") and caplog.messages == []


@pytest.mark.parametrize(
    "arrays", [{"x": np.arange(9.0), "y": np.arange(9.0), "z": np.arange(9.0), "rgb": np.eye(9)[:, :3]},
               {"normals": np.eye(9)[:, :3]}],
)  # fmt: skip
def test_an_archive_without_points_asks_for_them(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="which of its arrays holds the points"):
        read_points(tmp_path / "a.npz", 8)


@pytest.mark.parametrize(
    ("offset", "value", "message"), [(105, 24, "its header is damaged"), (107, 100, "announces 100 points")]
)
def test_a_laser_scan_whose_header_does_not_fit_is_refused(tmp_path, offset, value, message):
    content = bytearray(227 + 200 * 28)
    content[:4], content[24:26] = b"LASF", bytes((1, 2))
    struct.pack_into("<H", content, 94, 227)
    struct.pack_into("<I4xBHI", content, 96, 227, 1, 28, 200)
    struct.pack_into("<6d", content, 131, 0.01, 0.01, 0.01, 0, 0, 0)
    for n in range(200):
        struct.pack_into("<3i", content, 227 + 28 * n, n, 2 * n, n * n)
    path = tmp_path / "a.las"
    path.write_bytes(content)
    assert len(read_points(path, 8)) == 200
    struct.pack_into("<H" if offset == 105 else "<I", content, offset, value)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_points(path, 8)


@pytest.mark.parametrize("capitals", [False, True])
def test_an_stl_of_text_may_be_in_capitals(tmp_path, capitals):
    facet = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
    text = f"solid a\n{facet}endsolid a\n"
    (tmp_path / "a.stl").write_text(text.upper() if capitals else text)
    assert read_points(tmp_path / "a.stl", 50).max() <= 1


@pytest.mark.parametrize(
    "start", ["\ufeffsolid a\n", "\n \nsolid a\n", "solid a facet and a vertex 1 2 3\n", "solid a "]
)
def test_an_stl_of_text_may_begin_in_any_way(tmp_path, start):
    facet = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
    (tmp_path / "a.stl").write_text(f"{start}{facet}endsolid a facet\nsolid vertex\n{facet}endsolid\n", "utf-8")
    assert len(read_stl(tmp_path / "a.stl")[1]) == 2


@pytest.mark.parametrize("place", range(1, 8))
def test_blank_lines_in_a_ply_are_passed_over(tmp_path, place):
    lines = ["0 0 0", "1 0 0", "0 1 0", "0 0 1", "3 0 1 2", "3 0 1 3", "3 0 2 3"]
    head = PLY_HEAD.replace("vertex 3", "vertex 4") + "element face 3\nproperty list uchar int vertex_indices\n"
    both = []
    for text in (lines, [*lines[:place], "", " \r", *lines[place:]]):
        (tmp_path / "a.ply").write_text(head + "end_header\n" + "\n".join(text) + "\n")
        both.append(read_ply(tmp_path / "a.ply"))
    for ours, plain in zip(*both):
        np.testing.assert_array_equal(ours, plain)
    (tmp_path / "a.ply").write_text(head + "end_header\n" + "\n".join(["", *lines[:-1], "3 0 x 1"]) + "\n")
    with pytest.raises(InputError, match="line 17: 'x' is not a number"):
        read_ply(tmp_path / "a.ply")


def test_faces_of_an_obj_may_be_in_capitals(tmp_path):
    (tmp_path / "a.obj").write_text("V 0 0 0\nV 1 0 0\nv 0 1 0 1\nF 1 2 3\n")
    assert len(read_points(tmp_path / "a.obj", 50)) == 50


def test_seven_numbers_of_an_obj_do_not_tell_the_colours(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0 .1 .8 .2 1\nv 1 0 0 .1 .8 .2 1\nv 0 1 0 .1 .8 .2 1\nf 1 2 3\n")
    assert len(read_points(tmp_path / "a.obj", 50)) == 50
    with pytest.raises(InputError, match=r"line 1: which of seven numbers are red, green and blue\? Write six"):
        read_points(tmp_path / "a.obj", 50, channels="xyz+rgb")


PLY_HEAD = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.ply", f"{PLY_HEAD}element face 1\nproperty list uchar int corners\nend_header\n"
         "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n",
         "its face cannot be read (no vertex_indices); save triangles"),
        ("a.ply", f"{PLY_HEAD}element tristrips 1\nproperty list int int vertex_indices\nend_header\n"
         "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "its tristrips cannot be read (no vertex_indices); save triangles"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\ncstype bspline\nsurf 0 1 0 1 1 2 3\n",
         "line 4: free-form curves and surfaces are not read; convert it to a mesh"),
    ],
)  # fmt: skip
def test_a_surface_that_is_not_read_is_no_cloud_of_its_corners(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_points(tmp_path / name, 3)
