"""ModelNet's own files to HDF5: every shape where it belongs, whatever the number of processes and interruptions."""

import shutil

import h5py
import numpy as np
import pytest
import torch

from s2d3d import create_dataset
from s2d3d.datasets.h5 import read_h5
from s2d3d.errors import InputError
from s2d3d.prepare import convert
from s2d3d.prepare.convert import convert_modelnet, read_resampled


def write_box(path, size, head="OFF\n8 12 0\n"):
    """A box of that size with its lower corner in the origin, 12 triangles."""
    corners = [(x, y, z) for x in (0, size[0]) for y in (0, size[1]) for z in (0, size[2])]
    quads = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    faces = [(q[0], q[i], q[i + 1]) for q in quads for i in (1, 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        head + "".join("{} {} {}\n".format(*c) for c in corners) + "".join("3 {} {} {}\n".format(*f) for f in faces)
    )


@pytest.fixture
def meshes(tmp_path):
    """Towers and slabs; one file with the counts on the line of the keyword, as in ModelNet40."""
    root = tmp_path / "ModelNet2"
    for split, count in (("train", 5), ("test", 2)):
        for index in range(1, count + 1):
            write_box(root / "tower" / split / f"tower_{index}.off", (1, 1, 4 + index))
            head = "OFF8 12 0\n" if index == 1 else "OFF\n8 12 0\n"
            write_box(root / "night_slab" / split / f"night_slab_{index}.off", (4, 4 + index, 1), head)
    (root / "README.txt").write_text("ModelNet")
    return root


@pytest.fixture
def texts(tmp_path):
    """As modelnet40_normal_resampled, y up: towers along y."""
    root, rng = tmp_path / "modelnet40_normal_resampled", np.random.default_rng(0)
    stored = {}
    for kind, size in (("tower", (1, 5, 1)), ("night_slab", (4, 1, 4))):
        (root / kind).mkdir(parents=True)
        for index in range(1, 4 if kind == "tower" else 3):
            rows = np.hstack([rng.uniform(-1, 1, (40, 3)) * size, rng.normal(size=(40, 3))]).astype(np.float32)
            name = f"{kind}_{index:04d}"
            stored[name] = rows
            np.savetxt(root / kind / f"{name}.txt", rows, delimiter=",", fmt="%.6f")
    (root / "modelnet40_shape_names.txt").write_text("tower\nnight_slab\n")
    (root / "modelnet40_train.txt").write_text("night_slab_0001\ntower_0001\ntower_0002\n")
    (root / "modelnet40_test.txt").write_text("tower_0003\nnight_slab_0002\n")
    return root, stored


def content(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix == ".txt"} | {
        path.name: (read_h5(path).points.tobytes(), read_h5(path).label.tobytes()) for path in root.glob("*.h5")
    }


def test_meshes_become_a_set_that_can_be_read(meshes, tmp_path):
    root = tmp_path / "set"
    assert convert_modelnet(meshes, root, num_points=64, workers=1) == {"train": 10, "test": 4}
    train = create_dataset("modelnet40", root, "train", num_points=64)
    assert train.class_names == ["night_slab", "tower"] and train.labels.tolist() == [0] * 5 + [1] * 5
    assert train.names[:2] == ["night_slab_1", "night_slab_2"]
    file = read_h5(root / "ply_data_train0.h5")
    assert file.up_axis == "z" and file.points.dtype == np.float32
    assert np.linalg.norm(file.points, axis=-1).max(1) == pytest.approx(1, abs=1e-6)
    tall = np.ptp(train.points[..., 2].numpy(), axis=1) / np.ptp(train.points[..., 0].numpy(), axis=1)
    assert (tall[:5] < 0.5).all() and (tall[5:] > 2).all()
    assert [path.name for path in tmp_path.iterdir()] == ["ModelNet2", "set"] or not list(tmp_path.glob(".*"))


def test_texts_keep_their_points_normals_and_axis(texts, tmp_path):
    source, stored = texts
    convert_modelnet(source, tmp_path / "set", num_points=30, workers=1)
    for split, names in (
        ("train", ["night_slab_0001", "tower_0001", "tower_0002"]),
        ("test", ["tower_0003", "night_slab_0002"]),
    ):
        file = read_h5(tmp_path / "set" / f"ply_data_{split}0.h5")
        assert file.up_axis == "y" and file.names == names
        assert file.label.tolist() == [["tower", "night_slab"].index(name.rpartition("_")[0]) for name in names]
        for points, normal, name in zip(file.points, file.normal, names):
            rows = np.hstack([points, normal])
            same = np.isclose(rows[:, None], stored[name][None], atol=1e-6).all(-1)
            assert same.sum() == 30 and (np.diff(same.argmax(1)) > 0).all(), "a part, in the order of the file"
    turned = create_dataset("modelnet40", tmp_path / "set", "test", num_points=30).points
    assert np.ptp(turned[0, :, 2].numpy()) > 2 * np.ptp(turned[0, :, 0].numpy()), "the tower stands"


def interrupt_once(monkeypatch):
    """Let the eighth mesh that this process reads from now on end the conversion; return the list of those read."""
    read, seen = convert.read_off, []

    def failing(path):
        seen.append(path)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(convert, "read_off", failing)
    return seen


def test_neither_processes_nor_interruptions_change_a_set(meshes, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "PART", 3)
    convert_modelnet(meshes, tmp_path / "whole", num_points=32, workers=2, seed=5)
    seen = interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert_modelnet(meshes, tmp_path / "cut", num_points=32, workers=1, seed=5)
    assert not (tmp_path / "cut").exists()
    assert convert_modelnet(meshes, tmp_path / "cut", num_points=32, workers=1, seed=5)["train"] == 10
    assert len(seen) == 8 + 14 - 6, "two files of three shapes were done already"
    listed = {
        name: body.replace(b"/cut/", b"/whole/")
        for name, body in content(tmp_path / "cut").items()
        if name.endswith("files.txt")
    }
    assert content(tmp_path / "cut") | listed == content(tmp_path / "whole")
    convert_modelnet(meshes, tmp_path / "cut", num_points=32, workers=1, seed=6, force=True)
    assert content(tmp_path / "cut")["ply_data_test0.h5"] != content(tmp_path / "whole")["ply_data_test0.h5"]
    with h5py.File(tmp_path / "whole" / "ply_data_test0.h5") as file:
        assert file["data"].shape == (3, 32, 3)


def test_unfinished_work_of_another_conversion_is_not_used(meshes, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "PART", 3)
    monkeypatch.setattr(convert.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_modelnet(meshes, tmp_path / "set", num_points=16, workers=1)
    monkeypatch.undo()
    convert_modelnet(meshes, tmp_path / "set", num_points=32, workers=1)
    assert read_h5(tmp_path / "set" / "ply_data_train0.h5").points.shape == (10, 32, 3)


@pytest.mark.parametrize("change", ["axis", "source"])
def test_parts_of_another_axis_or_source_are_not_mixed_in(meshes, tmp_path, monkeypatch, change):
    """A copy of a set has the same file names; its meshes may be turned."""
    monkeypatch.setattr(convert, "PART", 3)
    other = shutil.copytree(meshes, tmp_path / "other")
    seen = interrupt_once(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert_modelnet(meshes, tmp_path / "set", num_points=16, workers=1)
    source, up_axis = (other, None) if change == "source" else (meshes, "y")
    counts = convert_modelnet(source, tmp_path / "set", num_points=16, up_axis=up_axis, workers=1)
    assert len(seen) == 8 + sum(counts.values()), "nothing of the first conversion is used"
    axes = {read_h5(path).up_axis for path in (tmp_path / "set").glob("*.h5")}
    assert axes == {up_axis or "z"}


def test_what_cannot_be_converted(meshes, texts, tmp_path):
    source, _ = texts
    output = tmp_path / "set"
    broken = meshes / "tower" / "train" / "tower_2.off"
    broken.write_text(broken.read_text()[:60])
    with pytest.raises(InputError, match=r"tower_2\.off: is cut short"):
        convert_modelnet(meshes, output, num_points=8, workers=1)
    with pytest.raises(InputError, match="40 points are fewer than --num-points 64"):
        convert_modelnet(source, output, num_points=64, workers=1)
    for bad, message in (
        (dict(num_points=0), "num_points is 0"),
        (dict(workers=0), "workers is 0"),
        (dict(up_axis="x"), "up_axis"),
    ):
        with pytest.raises(InputError, match=message):
            convert_modelnet(source, output, **bad)
    (source / "tower" / "tower_0002.txt").write_text("1,2,3\n")
    with pytest.raises(InputError, match=r"tower_0002\.txt: holds 3 columns"):
        convert_modelnet(source, output, num_points=8, workers=1)
    (source / "tower" / "tower_0002.txt").unlink()
    with pytest.raises(InputError, match=r"tower_0002\.txt: no such file, and 0 more; unpack"):
        convert_modelnet(source, output, num_points=8, workers=1)
    (source / "modelnet40_test.txt").write_text("sofa_0001\n")
    with pytest.raises(InputError, match=r"modelnet40_test\.txt: 'sofa_0001' is of no class"):
        convert_modelnet(source, output)
    with pytest.raises(InputError, match="is no public copy of ModelNet"):
        convert_modelnet(tmp_path / "nowhere", output)
    assert not output.exists()


def test_text_far_from_the_origin_keeps_its_shape(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 6)).round(6)
    for name, offset in (("near", 0.0), ("far", 5_334_000.25)):
        moved = rows + np.array([offset, offset, offset, 0, 0, 0])
        np.savetxt(tmp_path / f"{name}.txt", moved, fmt="%.6f", delimiter=",")
    near, far = (
        read_resampled(tmp_path / f"{name}.txt", 40, np.random.default_rng(1)).astype(np.float64)
        for name in ("near", "far")
    )
    assert far.dtype == near.dtype and np.array_equal(near[:, 3:], far[:, 3:])
    shift = far[:, :3] - near[:, :3]
    assert np.abs(shift - shift.mean(axis=0)).max() < 1e-6


def test_links_out_of_the_source_need_permission(meshes, tmp_path):
    """As in trees of git-annex: a mesh is a link to a store elsewhere."""
    path = meshes / "tower" / "train" / "tower_2.off"
    shutil.move(path, tmp_path / "store.off")
    path.symlink_to(tmp_path / "store.off")
    with pytest.raises(InputError, match=r"tower_2\.off: is a link out of the folder; .* --allow-links"):
        convert_modelnet(meshes, tmp_path / "out", num_points=16, workers=1)
    assert convert_modelnet(meshes, tmp_path / "out", num_points=16, workers=1, allow_links=True)["train"] == 10


def test_without_semaphores_one_process_does_it_all(meshes, tmp_path, monkeypatch, caplog):
    """/dev/shm may be missing or read-only."""

    def refused(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("s2d3d.workers.ProcessPoolExecutor", refused)
    assert convert_modelnet(meshes, tmp_path / "out", num_points=16, workers=2)["train"] == 10
    assert "no worker processes (Read-only file system): converting in this one" in caplog.text


def test_points_of_meshes_have_the_normals_of_their_faces(meshes, tmp_path):
    """Of a box each normal is along an axis, and its point lies on a side across that axis."""
    convert_modelnet(meshes, tmp_path / "set", num_points=64, workers=1)
    points, normals = create_dataset(
        "modelnet40", tmp_path / "set", "train", num_points=64, channels="xyz+normal", normalize=False
    ).points.split(3, -1)
    axes = normals.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(normals.abs().gather(2, axes), torch.ones(10, 64, 1))
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    to_side = torch.minimum((points - low).abs(), (points - high).abs()).gather(2, axes)
    assert to_side.max() < 1e-5 and all((axes == axis).any() for axis in range(3))


def test_normals_of_text_files_are_used(texts, tmp_path):
    source, stored = texts
    convert_modelnet(source, tmp_path / "set", num_points=30, workers=1)
    options = dict(num_points=30, channels="xyz+normal", normalize=False)
    dataset = create_dataset("modelnet40", tmp_path / "set", "test", **options)
    rows = torch.from_numpy(stored["tower_0003"])
    x, y, z, nx, ny, nz = rows.unbind(1)
    expected = torch.stack([x, -z, y, *torch.nn.functional.normalize(torch.stack([nx, -nz, ny]), dim=0)], 1)
    distance = torch.cdist(dataset.points[0], expected, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert distance.max() < 1e-5
