"""tools/prepare_data.py: what it makes is read back, and a mistake leaves nothing behind."""

import shutil

import numpy as np
import pytest

from s2d3d import create_dataset
from s2d3d.datasets.h5 import read_h5, write_h5


def test_process_makes_the_set_that_the_seed_tells(fork, shapes_root, tmp_path):
    root = tmp_path / "set"
    sizes = ["--num-train", 96, "--num-test", 36, "--num-points", 128]
    process = fork("prepare_data", "shapes", "--output", root, *sizes)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == f"{root}: 96 training and 36 test shapes\n"
    for split in ("train", "test"):
        ours, theirs = (create_dataset("shapes", folder, split, num_points=128) for folder in (root, shapes_root))
        assert ours.points.equal(theirs.points) and ours.labels.equal(theirs.labels), "the default seed is 0"
        assert ours.class_names == theirs.class_names
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_process_refuses_a_folder_that_is_no_set(fork, tmp_path):
    (tmp_path / "photos").mkdir()
    process = fork("prepare_data", "modelnet40", "--from", tmp_path / "photos", "--output", tmp_path / "set")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(
        f"error: {tmp_path}/photos: is no public copy of ModelNet: neither shape_names.txt ("
    )
    assert process.stderr.endswith("; see data/README.md\n") and process.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_another_seed_makes_another_set_of_the_asked_size(call, shapes_root, tmp_path):
    sizes = ["--num-train", 24, "--num-test", 12, "--num-points", 64]
    assert call("prepare_data", "shapes", "--output", tmp_path / "a", "--seed", 1, *sizes).code == 0
    train = create_dataset("shapes", tmp_path / "a", "train", num_points=64)
    assert len(train) == 24 and train.points.shape[1] == 64 and train.labels.bincount().tolist() == [2] * 12
    other = create_dataset("shapes", shapes_root, "train", num_points=128).points[:24, :64]
    assert not train.points.equal(other)


@pytest.mark.parametrize(("given", "stored"), [([], "y"), (["--up-axis", "z"], "z")])
def test_a_public_folder_is_copied_with_its_axis(call, tmp_path, given, stored):
    """float32 without an attribute is the public layout, y up, unless the user knows better."""
    source, target = tmp_path / "public", tmp_path / "set"
    source.mkdir()
    rng = np.random.default_rng(0)
    (source / "shape_names.txt").write_text("cup\nbowl\n")
    points = {split: rng.normal(size=(3, 16, 3)).astype(np.float32) for split in ("train", "test")}
    for split, cloud in points.items():
        write_h5(source / f"ply_data_{split}0.h5", cloud, [0, 1, 0])
        (source / f"{split}_files.txt").write_text(f"data/modelnet40_ply_hdf5_2048/ply_data_{split}0.h5\n")
    result = call("prepare_data", "modelnet40", "--from", source, "--output", target, *given)
    assert (result.code, result.out) == (0, f"{target}: 3 training and 3 test shapes\n")
    for split, cloud in points.items():
        copy = read_h5(target / f"ply_data_{split}0.h5")
        assert np.array_equal(copy.points, cloud) and copy.points.dtype == np.float32
        assert copy.label.tolist() == [0, 1, 0] and copy.up_axis == stored
    ours, theirs = (
        create_dataset("modelnet40", root, "test", num_points=16, up_axis=axis)
        for root, axis in ((target, None), (source, stored))
    )
    assert ours.points.equal(theirs.points)


@pytest.mark.parametrize("option", ["--seed", "--workers"])
def test_options_without_effect_on_a_copy_are_refused(refuses, data_copy, tmp_path, option):
    line = refuses("prepare_data", "modelnet40", "--from", data_copy, "--output", tmp_path / "set", option, 1)
    assert line == f"{option}: has no effect here, {data_copy} is in HDF5 layout and is copied as it is"


def test_force_replaces_a_set_and_no_other_folder(call, refuses, data_copy, tmp_path):
    sizes = ["--num-train", 12, "--num-test", 12, "--num-points", 32]
    line = refuses("prepare_data", "shapes", "--output", data_copy, *sizes)
    assert line == f"{data_copy}: exists; choose another --output, or --force to replace it"
    assert call("prepare_data", "shapes", "--output", data_copy, "--force", *sizes).code == 0
    assert len(create_dataset("shapes", data_copy, "train", num_points=32)) == 12
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_text("mine")
    line = refuses("prepare_data", "shapes", "--output", tmp_path / "photos", "--force", *sizes)
    assert line.startswith(f"{tmp_path}/photos: is not a data set (no shape_names.txt), so --force does not replace it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-train", "11"], "num_train is 11, must be at least 12, one for each class"),
        (["--num-test", "-1"], "num_test is -1, must be at least 12, one for each class"),
        (["--num-points", "0"], "num_points is 0, must be at least 1"),
        (["--seed", "-1"], "seed is -1, must be at least 0"),
    ],
)
def test_numbers_out_of_range(refuses, tmp_path, arguments, message):
    assert refuses("prepare_data", "shapes", "--output", tmp_path / "set", *arguments) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command; see prepare_data.py --help"),
        (["shapes"], "the following arguments are required: --output; see prepare_data.py shapes --help"),
        (
            ["shapes", "--output", "x", "--seed", "a"],
            "argument --seed: invalid int value: 'a'; see prepare_data.py shapes",
        ),
        (
            ["modelnet40", "--output", "x"],
            "one of the arguments --from --download is required; see prepare_data.py modelnet40",
        ),
        (["modelnet40", "--from", "x", "--output", "y", "--up-axis", "x"], "argument --up-axis: invalid choice: 'x'"),
        (["imagenet", "--output", "x"], "argument command: invalid choice: 'imagenet'"),
    ],
)
def test_wrong_arguments_exit_with_2(refuses, arguments, message):
    assert refuses("prepare_data", *arguments, code=2).startswith(message)


def test_outputs_that_cannot_be(refuses, unwritable, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, message in {
        tmp_path / "file": f"{tmp_path}/file: exists and is not a folder; choose another --output",
        tmp_path / "file" / "set": f"{tmp_path}/file/set: cannot be made there (",
        unwritable / "set": f"{unwritable}/set: cannot be written to (",
    }.items():
        assert refuses("prepare_data", "shapes", "--output", output).startswith(message)


def test_broken_sources(refuses, broken_data, tmp_path):
    root, message, advice = broken_data
    line = refuses("prepare_data", "modelnet40", "--from", root, "--output", tmp_path / "set")
    assert line.startswith(message) and advice in line


def test_sources_that_are_none(refuses, data_copy, tmp_path):
    line = refuses("prepare_data", "modelnet40", "--from", tmp_path / "no", "--output", tmp_path / "set")
    assert line == f"{tmp_path}/no: no such folder; --from names the one that holds the public files"
    line = refuses("prepare_data", "modelnet40", "--from", data_copy, "--output", data_copy, "--force")
    assert line == f"{data_copy}: is the folder to read from; choose another --output"
    shutil.rmtree(data_copy)


# Files that a layout has no place for


@pytest.fixture
def mixed(tmp_path):
    """Five classes of 40 clouds in four formats; of one class ten files have the folders of ModelNet."""
    root, rng = tmp_path / "mixed", np.random.default_rng(0)
    for name in ("airplane", "bottle", "chair", "lamp", "sofa"):
        for index in range(40):
            suffix = (".ply", ".npy", ".off", ".xyz")[index % 4]
            inside = {2: "train", 6: "test"}.get(index % 20 if name == "chair" else 0, "")
            path, cloud = root / name / inside / f"{index}{suffix}", rng.normal(size=(12, 3))
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = "".join("{} {} {}\n".format(*row) for row in cloud)
            if suffix == ".npy":
                np.save(path, cloud)
            elif suffix == ".off":
                path.write_text(f"OFF\n12 2 0\n{rows}3 0 1 2\n3 3 4 5\n")
            elif suffix == ".ply":
                names = "".join(f"property float {axis}\n" for axis in "xyz")
                path.write_text(f"ply\nformat ascii 1.0\nelement vertex 12\n{names}end_header\n{rows}")
            else:
                path.write_text(rows)
    (root / "lamp" / "photo.jpg").touch()
    return root


@pytest.mark.parametrize("command", ["modelnet40", "scan"])
def test_mixed_files_are_counted_and_not_dropped(refuses, mixed, tmp_path, command):
    line = refuses("prepare_data", command, "--from", mixed, "--output", tmp_path / "set")
    assert line == (
        f"{mixed}: 196 of 200 files have no place in the layout and are left out (50 .npy, 46 .off, 50 .ply, 50 .xyz; "
        "airplane 40, bottle 40, chair 36, lamp 40, sofa 40); nothing is left of airplane, bottle, lamp, sofa; convert "
        "without them by --skip-others, or train on the folder as it is: "
        f"s2d3d train configs/files.yaml data.root={mixed}"
    )


def test_mixed_files_are_left_out_on_demand_and_counted_all_the_same(call, mixed, tmp_path):
    arguments = ["--from", mixed, "--output", tmp_path / "set", "--num-points", 16, "--workers", 1, "--skip-others"]
    result = call("prepare_data", "modelnet40", *arguments)
    assert (result.code, result.out) == (0, f"{tmp_path}/set: 2 training and 2 test shapes\n")
    said, read = result.err.splitlines()[:2]
    assert said.startswith(f"{mixed}: 196 of 200 files have no place in the layout and are left out (50 .npy, 46 .off")
    assert read == f"{mixed}: 4 files (4 .off); ignored, of other kinds: 1 .jpg"
    assert create_dataset("modelnet40", tmp_path / "set", "train", num_points=16).class_names == ["chair"]


def test_class_folders_of_another_layout_name_the_way_to_train(refuses, mixed, tmp_path):
    shutil.rmtree(mixed / "chair")
    line = refuses("prepare_data", "modelnet40", "--from", mixed, "--output", tmp_path / "set")
    assert line.startswith(f"{mixed}: is no public copy of ModelNet: ")
    assert line.endswith(f"; class folders need no conversion: s2d3d train configs/files.yaml data.root={mixed}")


@pytest.mark.parametrize("name", ["ply_data_train7.h5", "chair.off"])
def test_a_copy_counts_files_that_no_list_names(refuses, call, data_copy, tmp_path, name):
    shutil.copyfile(data_copy / "ply_data_train0.h5", data_copy / name)
    line = refuses("prepare_data", "modelnet40", "--from", data_copy, "--output", tmp_path / "set")
    count = len(list(data_copy.glob("ply_data_*0.h5"))) + 1
    assert line.startswith(f"{data_copy}: 1 of {count} files have no place in the layout and are left out (1 .")
    assert "in no class 1); convert without them by --skip-others" in line
    result = call("prepare_data", "modelnet40", "--from", data_copy, "--output", tmp_path / "set", "--skip-others")
    assert result.code == 0 and "96 training and 36 test shapes" in result.out


def test_texts_that_no_list_names_are_counted(refuses, tmp_path):
    root, rng = tmp_path / "resampled", np.random.default_rng(0)
    (root / "cup").mkdir(parents=True)
    for index in range(3):
        np.savetxt(root / "cup" / f"cup_{index}.txt", rng.normal(size=(8, 6)), delimiter=",")
    (root / "modelnet40_shape_names.txt").write_text("cup\n")
    (root / "modelnet40_train.txt").write_text("cup_0\n")
    (root / "modelnet40_test.txt").write_text("cup_1\n")
    line = refuses("prepare_data", "modelnet40", "--from", root, "--output", tmp_path / "set", "--num-points", 8)
    assert line.startswith(
        f"{root}: 1 of 3 files have no place in the layout and are left out (1 .txt; cup 1); convert"
    )
