import os

import numpy as np
import pytest
import torch

from s2d3d.atomic import MARK, NEW, workspace
from s2d3d.datasets import prefix
from s2d3d.datasets.prefix import cache_folders, farthest_prefix
from s2d3d.errors import InputError
from s2d3d.ops.points import farthest_point_sample


@pytest.fixture
def points():
    return torch.randn(70, 20, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def computed(monkeypatch):
    """Count the chunks that are computed and not read."""
    calls = []

    def counted(part, length):
        calls.append(length)
        return farthest_point_sample(part, length)

    monkeypatch.setattr(prefix, "farthest_point_sample", counted)
    return calls


def test_equal_to_plain_sampling_and_computed_once(points, tmp_path, computed):
    expected = farthest_point_sample(points, 12)
    for _ in range(3):
        assert farthest_prefix(points, 12, [tmp_path]).equal(expected)
    assert len(computed) == 2, "70 clouds are two chunks, once"
    assert len(os.listdir(tmp_path)) == 1, "one cache file and no temporary one"


def test_without_a_folder_nothing_is_kept(points, computed):
    farthest_prefix(points, 5)
    farthest_prefix(points, 5)
    assert len(computed) == 4


def test_other_content_length_or_type_has_its_own_file(points, tmp_path):
    changed = points.clone()
    changed[69, 19, 2] += 1e-3
    for cloud, length in ((points, 12), (changed, 12), (points, 11), (points.half(), 12)):
        assert farthest_prefix(cloud, length, [tmp_path]).equal(farthest_point_sample(cloud, length))
    assert len(os.listdir(tmp_path)) == 4


def _archive(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:1500] + b"\x05" + path.read_bytes()[1501:]),
        lambda path: _archive(path, selected=np.zeros((70, 11), np.int32)),
        lambda path: _archive(path, selected=np.full((70, 12), 20)),
        lambda path: _archive(path, selected=np.full((70, 12), -1)),
        lambda path: _archive(path, selected=np.zeros((70, 12))),
        lambda path: _archive(path, other=np.zeros((70, 12), np.int32)),
        lambda path: _archive(path, selected=np.full((70, 12), None)),
    ],
    ids=["empty", "garbage", "cut", "flipped byte", "shape", "too large", "negative", "float", "key", "pickle"],
)
def test_a_corrupt_cache_is_computed_again_and_replaced(points, tmp_path, computed, spoil):
    expected = farthest_prefix(points, 12, [tmp_path])
    (path,) = tmp_path.iterdir()
    spoil(path)
    computed.clear()
    assert farthest_prefix(points, 12, [tmp_path]).equal(expected)
    assert len(computed) == 2
    assert farthest_prefix(points, 12, [tmp_path]).equal(expected)
    assert len(computed) == 2, "the repaired file is read"


def test_beside_the_set_or_in_the_users_cache_when_that_is_read_only(points, tmp_path, monkeypatch, computed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    root = tmp_path / "set"
    root.mkdir()
    folders = cache_folders(root)
    assert [folder.parent for folder in folders] == [root, tmp_path / "user"]
    root.chmod(0o555)
    try:
        expected = farthest_prefix(points, 12, folders)
        assert os.listdir(root) == [] and len(os.listdir(tmp_path / "user" / "s2d3d")) == 1
        assert farthest_prefix(points, 12, folders).equal(expected) and len(computed) == 2
    finally:
        root.chmod(0o755)
    farthest_prefix(points, 11, folders)
    assert len(list(folders[0].iterdir())) == 1


def test_no_place_to_write_is_no_error(points, tmp_path):
    (tmp_path / "file").write_text("")
    assert farthest_prefix(points, 12, [tmp_path / "file" / "below"]).equal(farthest_point_sample(points, 12))


def test_a_given_folder_is_the_only_one_and_must_be_usable(tmp_path):
    assert cache_folders(tmp_path, tmp_path / "own") == [tmp_path / "own"] and (tmp_path / "own").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be a cache folder"):
        cache_folders(tmp_path, tmp_path / "file")


def test_what_killed_processes_left_in_the_cache_does_not_stay_for_ever(points, tmp_path):
    left = tmp_path / ".fps_a_5.npz.123.tmp"
    left.mkdir()
    (left / MARK).write_text("fps_a_5.npz")
    (left / NEW).write_bytes(b"half")
    with workspace(tmp_path / "fps_b_5.npz") as running:
        farthest_prefix(points, 5, [tmp_path])
        assert not left.exists() and running.exists(), "another process may be writing the second one"
