"""Class folders: every layout gives the same files and classes, nothing is dropped without a word."""

import re

import pytest

from s2d3d.datasets.class_folders import SPLITS, find_class_folders, refuse_inside
from s2d3d.errors import InputError

NAMES = [f"{name}/{index}.{suffix}" for name in ("box", "mug") for index, suffix in enumerate(("ply", "off", "xyz"))]


@pytest.fixture
def tree(tmp_path):
    """Make empty files below a folder; return the folder."""

    def make(*names: str):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def placed(found) -> dict[str, list[tuple[str, str]]]:
    return {
        split: [(path.relative_to(found.root).as_posix(), found.class_names[label]) for path, label in files]
        for split, files in found.files.items()
    }


@pytest.mark.parametrize("pattern", ["{split}/{name}/{file}", "{name}/{split}/{file}", "{name}/{split}/deep/{file}"])
def test_named_splits_are_taken_from_the_folders(tree, pattern):
    wanted = {
        split: [
            (pattern.format(split=split, name=name, file=f"{split}{index}.ply"), name)
            for name in ("box", "mug")
            for index in range(2)
        ]
        for split in ("train", "test")
    }
    root = tree(*(path for files in wanted.values() for path, _ in files))
    found = find_class_folders(root)
    assert found.class_names == ["box", "mug"] and placed(found) == wanted


def test_without_split_folders_a_share_of_each_class_is_tested(tree):
    root = tree(*(f"{name}/{index}.npy" for name in "abc" for index in range(10)))
    found = find_class_folders(root, test_fraction=0.2)
    parts = placed(found)
    assert [[name for _, name in parts[split]].count("b") for split in ("train", "test")] == [8, 2]
    assert not set(parts["train"]) & set(parts["test"]) and sum(map(len, parts.values())) == 30
    assert placed(find_class_folders(root, test_fraction=0.2)) == parts, "the same each time"
    assert placed(find_class_folders(root, test_fraction=0.2, split_seed=1)) != parts
    (root / "c" / "new.npy").touch()
    again = placed(find_class_folders(root, test_fraction=0.2))
    assert [file for file in again["test"] if file[1] != "c"] == [file for file in parts["test"] if file[1] != "c"]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_each_split_has_a_file_of_each_class(tree, fraction):
    parts = placed(find_class_folders(tree(*NAMES), test_fraction=fraction))
    assert all({name for _, name in files} == {"box", "mug"} for files in parts.values())


def test_what_is_no_cloud_is_counted(tree):
    root = tree(*NAMES, "box/skin.png", "box/LICENSE", "notes.md", ".cache/x/a.ply", "__MACOSX/box/1.ply")
    found = find_class_folders(root)
    assert dict(found.ignored) == {".png": 1, "": 1, ".md": 1}
    assert found.summary() == (
        f"{root}: 6 files (2 .off, 2 .ply, 2 .xyz) in 2 classes (box, mug), 4 to train, 2 to test; "
        "ignored, of other kinds: 1 without suffix, 1 .md, 1 .png"
    )


@pytest.mark.parametrize(
    "names, message",
    [
        ((), "ROOT: holds no file of .ply"),
        (("box/1.ply", "box/2.ply"), "ROOT: holds one class, 'box'; the files of at least two classes"),
        (
            (*NAMES, "loose.ply"),
            "ROOT/loose.ply: lies in no class folder, so its class is unknown; move it: ROOT/CLASS",
        ),
        ((*NAMES, "train/loose.ply"), "ROOT/train/loose.ply: lies in no class folder"),
        ((*NAMES, "pot/1.ply"), "ROOT: class 'pot' has one file, ROOT/pot/1.ply; one to train and one to test"),
        ((*NAMES, "box/train/9.ply"), "ROOT/box/0.ply: lies neither in a train nor in a test folder"),
        (
            [f"{name}/scans/{split}/{index}.ply" for name in ("box", "mug") for split in SPLITS for index in "12"],
            "ROOT/mug/scans/train and ROOT/mug/scans/test lie too deep to split the files; move or",
        ),
        (("train/a/1.ply", "train/b/1.ply"), "ROOT: holds a folder train but no test"),
        (("train/a/1.ply", "test/a/1.ply", "test/b/1.ply"), "ROOT: class 'b' has files to test but none to train on"),
    ],
)
def test_trees_that_are_no_data_set(tree, names, message):
    root = tree(*names)
    with pytest.raises(InputError, match=re.escape(message.replace("ROOT/CLASS", "@").replace("ROOT", str(root))[:60])):
        find_class_folders(root)


def test_links_out_of_the_folder_need_permission(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "far.ply").touch()
    root = tree(*NAMES)
    (root / "box" / "near.ply").symlink_to(root / "box" / "0.ply")
    assert sum(map(len, find_class_folders(root).files.values())) == 7
    (root / "mug" / "far.ply").symlink_to(other / "far.ply")
    with pytest.raises(InputError, match=r"mug/far\.ply: is a link out of the folder"):
        find_class_folders(root)
    found = find_class_folders(root, allow_links=True)
    assert (root / "mug" / "far.ply") in [path for files in found.files.values() for path, _ in files]


def test_a_link_to_a_folder_above_is_not_entered(tree):
    root = tree(*NAMES)
    (root / "box" / "again").symlink_to(root)
    assert sum(map(len, find_class_folders(root).files.values())) == 6


def test_a_class_folder_without_a_cloud_is_named(tmp_path):
    for name in ("box/1.ply", "box/2.ply", "mug/1.ply", "mug/2.ply", "mug/photo.jpg", "lamp/notes/1.doc", "list.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pot" / "empty").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    found = find_class_folders(tmp_path)
    assert found.empty == ["lamp", "pot"] and found.class_names == ["box", "mug"]
    assert found.summary().endswith("; ignored, of other kinds: 1 .doc, 1 .jpg, 1 .md")
    assert found.doubts() == ["no cloud in lamp, pot, so it is no class"]


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("TRAIN", "test")])
@pytest.mark.parametrize("pattern", ["{split}/{name}/{file}", "{name}/{split}/{file}"])
def test_capitals_do_not_hide_a_split(tree, pattern, train, test):
    names = [
        pattern.format(split=split, name=name, file=file)
        for split in (train, test) for name in ("box", "mug") for file in ("1.ply", "2.ply")
    ]  # fmt: skip
    found = find_class_folders(tree(*names))
    assert found.class_names == ["box", "mug"] and {split: len(files) for split, files in found.files.items()} == {
        "train": 4, "test": 4,
    }  # fmt: skip


@pytest.mark.parametrize("split", ["training", "Testing", "val", "VALIDATION", "valid"])
@pytest.mark.parametrize("pattern", ["{split}/{name}/1.ply", "{name}/{split}/1.ply"])
def test_a_folder_that_is_meant_for_a_split_is_no_class(tree, pattern, split):
    names = [pattern.format(split=kind, name=name) for kind in ("train", "test", split) for name in ("box", "mug")]
    with pytest.raises(InputError, match=rf"its folder '{split}' is named like a split; call it train or test"):
        find_class_folders(tree(*names))


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\x0bb", " a", "a ", "a\udcff"])
def test_a_folder_whose_name_a_list_of_classes_would_change_is_refused(tree, name):
    with pytest.raises(InputError, match=r"cannot name a class: it has line breaks, spaces around it, or is not UTF-8"):
        find_class_folders(tree(*NAMES, f"{name}/1.ply", f"{name}/2.ply"))


def test_what_may_be_meant_otherwise_is_said(tree):
    names = [f"{day}/{name}/{index}.ply" for day in ("monday", "tuesday") for name in ("box", "mug") for index in "123"]
    assert find_class_folders(tree(*names)).doubts() == [
        "all classes hold the folders box, mug; if these are the classes, move them up by one folder"
    ]


@pytest.mark.parametrize("other", ["Stuhl", "stühle", "St\u0075\u0308hle"])
def test_classes_that_look_alike_are_said(tree, other):
    root = tree(*(f"{name}/{index}.ply" for name in ("Stühle", other) for index in "123"))
    doubts = find_class_folders(root).doubts()
    assert len(doubts) == (other != "Stuhl") and all("are they one class?" in text for text in doubts)


def test_a_class_that_is_spelt_otherwise_in_the_other_split_is_named(tree):
    root = tree(*(f"train/{name}/1.ply" for name in ("box", "mug")), "test/box/1.ply", "test/Mug/1.ply")
    with pytest.raises(InputError, match=r"class 'Mug' has files to test but none .*; is it 'mug', as 'Mug'\?"):
        find_class_folders(root)


def test_a_folder_inside_the_data_is_no_place_for_a_run(tree, monkeypatch):
    root = tree(*NAMES)
    monkeypatch.chdir(root.parent)
    for inside in (root, root / "runs", root.name, f"{root.name}/../{root.name}/box/run"):
        with pytest.raises(InputError, match=r"^output_dir: .* lies inside data\.root, where it would be a class;"):
            refuse_inside(root, inside)
    for outside in (root.parent / "runs", f"{root}_runs", root / ".runs" / "a"):
        refuse_inside(root, outside)


def test_a_class_that_is_never_tested_is_said(tree):
    names = [f"{split}/{name}/1.ply" for split in ("train", "test") for name in ("box", "mug")]
    assert find_class_folders(tree(*names, "train/lamp/1.ply")).doubts() == ["no file of lamp is tested"]
    assert not find_class_folders(tree(*names, "test/lamp/1.ply")).doubts()
