"""Files and folders of files: which are found, and which class each has."""

import numpy as np
import pytest

from s2d3d.datasets.file_set import find_files, folder_labels
from s2d3d.errors import InputError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.eye(3))
    return path


def test_labels_come_from_the_path_as_given(tmp_path):
    """A relabelled tree of links: the store has other folders, which say nothing."""
    stored = [touch(tmp_path / "store" / "chair" / f"{number}.npy") for number in range(3)]
    tree = tmp_path / "tree"
    for name, target in zip(("table", "table", "lamp"), stored):
        (tree / name).mkdir(parents=True, exist_ok=True)
        (tree / name / target.name).symlink_to(target)
    (tree / "sofa").symlink_to(tmp_path / "store" / "chair", target_is_directory=True)
    files = find_files([tree])
    assert [str(file.relative_to(tree)) for file in files] == [
        "lamp/2.npy", "sofa/0.npy", "sofa/1.npy", "sofa/2.npy", "table/0.npy", "table/1.npy"
    ]  # fmt: skip
    assert folder_labels(files, ["chair", "lamp", "sofa", "table"]) == [1, 2, 2, 2, 3, 3]


def test_a_relative_path_has_the_folder_it_is_called_from(tmp_path, monkeypatch):
    touch(tmp_path / "mug" / "1.npy")
    monkeypatch.chdir(tmp_path / "mug")
    assert folder_labels(find_files(["1.npy"]), ["box", "mug"]) == [1]


def test_folders_below_a_class_belong_to_it_as_in_a_training(tmp_path, monkeypatch):
    names, folder = ["box", "mug"], tmp_path / "mug"
    touch(folder / "part1" / "1.npy")
    touch(folder / "box" / "2.npy")
    assert folder_labels(find_files([tmp_path]), names, [tmp_path]) == [1, 1], "the folder of the class stands first"
    assert folder_labels(find_files([folder / "part1"]), names, [folder / "part1"]) is None, (
        "what lies above says nothing"
    )
    assert folder_labels(find_files([folder]), names, [folder]) == [1, 1], "a folder that is named as a class is one"
    (tmp_path / "scans").symlink_to(tmp_path / "elsewhere")
    touch(tmp_path / "elsewhere" / "train" / "box" / "old" / "3.npy")
    monkeypatch.chdir(tmp_path)
    for place in ("scans", "./scans/", "scans/train", str(tmp_path / "scans")):
        assert folder_labels(find_files([place]), names, [place]) == [0], place
    files = ["mug/part1/1.npy", "mug/box/2.npy"]
    assert folder_labels(find_files(files), names, files) is None, "of a file, the folder that it lies in"
    assert folder_labels(find_files(files[1:]), names, files[1:]) == [0]


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path / "a" / "1.npy")
    (tmp_path / "a" / "b").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "itself").symlink_to("itself")
    assert [file.name for file in find_files([tmp_path])] == ["1.npy"]


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    touch(tmp_path / "a.npy")
    (tmp_path / "b.npy").symlink_to(tmp_path / "gone.npy")
    assert [file.name for file in find_files([tmp_path])] == ["a.npy", "b.npy"]


def test_hidden_names_are_left_out_as_in_a_training_and_other_kinds_are_counted(tmp_path, caplog):
    for name in ("mug/1.npy", "mug/._1.npy", ".fps_cache/files_1/train0.npy", "__MACOSX/2.npy"):
        touch(tmp_path / name)
    for name in ("a.laz", "b.LAZ", ".DS_Store"):
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == [tmp_path / "mug" / "1.npy"]
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: ignored, of other kinds: 2 .laz"]
    assert find_files([tmp_path / "mug" / "._1.npy"]) == [tmp_path / "mug" / "._1.npy"], "what is named is taken"


def test_a_folder_without_files_is_named(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(InputError, match=r"holds no file of \.ply, "):
        find_files([tmp_path])
