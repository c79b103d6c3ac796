"""Files of all kinds give the same cloud, and one that is none says so in one line."""

import numpy as np
import pytest
import torch

from s2d3d import create_dataset
from s2d3d.datasets.files import read_cloud, read_points
from s2d3d.datasets.h5 import write_h5
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
