import os

import h5py
import numpy as np
import pytest
import torch

from s2d3d.datasets import create_dataset, list_datasets
from s2d3d.datasets.h5 import read_h5, write_h5
from s2d3d.datasets.modelnet40 import load_modelnet40
from s2d3d.errors import InputError


def load(root, split="train", **kwargs):
    kwargs = {"num_points": 16, "normalize": False, **kwargs}
    return create_dataset("modelnet40", root, split, **kwargs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("with_normals", [False, True])
def test_both_splits_in_the_order_of_the_list(modelnet_folder, clouds, dtype, with_normals):
    extras = {"normal": clouds(6, 16, dtype)} if with_normals else {}
    root = modelnet_folder(dtype=dtype, up_axis="z", **extras)
    train, test = load(root), load(root, "test")
    files = [read_h5(root / f"ply_data_train{number}.h5").points for number in range(2)]
    np.testing.assert_array_equal(train.points.numpy(), np.concatenate(files))
    assert (len(train), len(test)) == (12, 6) and train.class_names == ["apple", "boat", "chair"]
    assert train.labels.tolist() == [0, 1, 2] * 4
    assert (train.split, test.split, train.num_classes) == ("train", "test", 3)
    assert train.names[:2] == ["ply_data_train0_0000", "ply_data_train0_0001"] and len(set(train.names)) == 12


def test_names_come_from_the_files(modelnet_folder):
    root = modelnet_folder(names=[f"apple_{i}" for i in range(6)])
    assert load(root, "test").names == [f"apple_{i}" for i in range(6)]


PILLAR = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0, 0.2], [0, 5, 0]], np.float32)  # asymmetric; y is its long axis


@pytest.mark.parametrize(
    ("dtype", "attribute", "argument", "stored"),
    [
        (np.float32, None, None, "y"),
        (np.float16, None, None, "z"),
        (np.float32, "z", None, "z"),
        (np.float16, "y", None, "y"),
        (np.float32, "z", "y", "y"),
        (np.float32, "y", "z", "z"),
        (np.float32, None, "z", "z"),
        (np.float16, None, "y", "y"),
    ],
)
@pytest.mark.parametrize("name", list_datasets())
def test_points_are_turned_z_up(modelnet_folder, name, dtype, attribute, argument, stored):
    if name not in ("modelnet40", "shapes"):
        pytest.skip("another layout")
    root = modelnet_folder()
    cloud = np.stack([PILLAR.astype(dtype)])
    write_h5(root / "ply_data_test0.h5", cloud, [0], up_axis=attribute)
    got = create_dataset(name, root, "test", num_points=4, normalize=False, up_axis=argument)[0][0]
    x, y, z = torch.from_numpy(cloud[0]).float().unbind(1)
    expected = torch.stack([x, -z, y], 1) if stored == "y" else torch.stack([x, y, z], 1)
    assert got.equal(expected)
    assert got[3].abs().argmax() == (2 if stored == "y" else 1)


def test_every_file_is_turned_by_its_own_attribute(modelnet_folder):
    root = modelnet_folder()
    for number, axis in enumerate("yz"):
        write_h5(root / f"ply_data_train{number}.h5", PILLAR[None], [0], up_axis=axis)
    first, second = load(root, num_points=4, split="train").points
    assert first[3].tolist() == [0, 0, 5] and second[3].tolist() == [0, 5, 0]


def test_normalize_is_the_default(modelnet_folder):
    points = create_dataset("modelnet40", modelnet_folder(), "test", num_points=16).points
    torch.testing.assert_close(points.mean(1), torch.zeros(6, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(points.norm(dim=-1).amax(1), torch.ones(6))


@pytest.mark.parametrize(
    "entry", ["{file}", "data/{name}/{file}", "data/elsewhere/{file}", "data\\set\\{file}", "./{file}"]
)
def test_listed_paths_are_found_by_their_base_name(modelnet_folder, entry):
    assert len(load(modelnet_folder(entry=entry))) == 12


def test_a_path_below_the_root_is_the_second_choice(modelnet_folder, clouds):
    root = modelnet_folder()
    (root / "deep").mkdir()
    os.rename(root / "ply_data_test0.h5", root / "deep" / "only.h5")
    (root / "test_files.txt").write_text("deep/only.h5\n\n")
    assert len(load(root, "test")) == 6
    write_h5(root / "only.h5", clouds(2, 16), [0, 1])
    assert len(load(root, "test")) == 2, "a file of that name in the folder itself comes first"


def test_a_linked_root_is_fine(modelnet_folder, tmp_path):
    (tmp_path / "link").symlink_to(modelnet_folder(), target_is_directory=True)
    assert len(load(tmp_path / "link")) == 12


@pytest.mark.parametrize(
    "entry",
    [
        "../other/ply_data_test0.h5",
        "/etc/ply_data_test0.h5",
        "C:\\x\\ply_data_test0.h5",
        "a/../ply_data_test0.h5",
        "..",
    ],
)
def test_paths_out_of_the_folder_are_refused(modelnet_folder, entry):
    root = modelnet_folder()
    (root / "test_files.txt").write_text(entry + "\n")
    with pytest.raises(InputError) as caught:
        load(root, "test")
    assert str(caught.value).startswith(f"{root / 'test_files.txt'}: '{entry}' leads out of the folder")


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(modelnet_folder, tmp_path):
    root, other = modelnet_folder(), modelnet_folder("other")
    (root / "ply_data_test0.h5").unlink()
    (root / "ply_data_test0.h5").symlink_to(other / "ply_data_test0.h5")
    with pytest.raises(InputError, match="is a link out of the folder"):
        load(root, "test")
    (root / "ply_data_test0.h5").unlink()
    (root / "ply_data_test0.h5").symlink_to(root / "ply_data_train0.h5")
    assert len(load(root, "test")) == 6
    (other / "sub").symlink_to(root, target_is_directory=True)
    (other / "test_files.txt").write_text("sub/ply_data_test7.h5\n")
    os.rename(root / "ply_data_train1.h5", root / "ply_data_test7.h5")
    with pytest.raises(InputError, match="is a link out of the folder"):
        load(other, "test")
    assert len(load(other, "test", allow_links=True)) == 6


@pytest.mark.parametrize("allow_links", [False, True])
@pytest.mark.parametrize("name", ["shape_names.txt", "train_files.txt", "ply_data_train0.h5"])
def test_a_link_to_itself_is_one_line(modelnet_folder, name, allow_links):
    root = modelnet_folder()
    (root / name).unlink()
    (root / name).symlink_to(name)
    with pytest.raises(InputError) as caught:
        load(root, allow_links=allow_links)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shape_names.txt", "train_files.txt", "ply_data_train0.h5"])
def test_a_tree_of_links_is_read_where_the_user_says_so(modelnet_folder, tmp_path, name):
    root, store = modelnet_folder(), tmp_path / "store"
    expected = load(root)
    store.mkdir()
    os.rename(root / name, store / "8f3a")
    (root / name).symlink_to(store / "8f3a")
    with pytest.raises(InputError, match=rf"{name}: is a link out of the folder; copy .* or set data.allow_links=true"):
        load(root)
    found = load(root, allow_links=True)
    assert torch.equal(found.points, expected.points) and found.class_names == expected.class_names


def test_lists_may_begin_with_a_byte_order_mark(modelnet_folder):
    root = modelnet_folder()
    expected = load(root)
    for name in ("shape_names.txt", "train_files.txt"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    found = load(root)
    assert torch.equal(found.points, expected.points) and found.class_names == expected.class_names


def test_a_file_that_is_listed_to_train_and_to_test_is_said(modelnet_folder, caplog):
    root = modelnet_folder()
    assert load_modelnet40(root, "train", num_points=16) and not caplog.messages
    lists = [root / f"{split}_files.txt" for split in ("train", "test")]
    lists[1].write_text(lists[0].read_text().splitlines()[0] + "\n")
    for split in ("train", "test"):
        load_modelnet40(root, split, num_points=16)
    lists[1].write_text("no_such_file.h5\n")
    load_modelnet40(root, "train", num_points=16)
    (said,) = caplog.messages
    assert said.startswith(f"{root}: 1 files are listed to train and to test, such as ")


def test_coordinates_far_from_the_origin_keep_their_shape(modelnet_folder):
    """UTM coordinates in float64: the set is the same as without the offset; float32 cannot hold it."""
    root = modelnet_folder()
    expected = load(root, normalize=True)
    offset = np.array([691_000.25, 5_334_000.5, 520.125])
    far = {}
    for path in sorted(root.glob("*.h5")):
        with h5py.File(path, "r+") as file:
            far[path] = file["data"][()].astype(np.float64) + offset
            del file["data"]
            file["data"] = far[path]
    found = load(root, normalize=True)
    assert found.points.dtype == torch.float32
    assert (found.points - expected.points.float()).abs().max() < 2e-6
    streamed = load(root, normalize=True, memory_budget_gb=1e-6)
    assert torch.equal(streamed.points, found.points)
    for path, points in far.items():
        with h5py.File(path, "r+") as file:
            del file["data"]
            file["data"] = points.astype(np.float32)
    with pytest.raises(InputError, match=r"sample 0 of dataset 'data' spans .* its shape is lost"):
        load(root, normalize=True)
    with pytest.raises(InputError, match=r"sample 0 of dataset 'data' spans .* its shape is lost"):
        load(root, normalize=True, memory_budget_gb=1e-6).batch(torch.arange(2))


def test_a_cloud_without_extent_is_refused(modelnet_folder):
    root = modelnet_folder()
    with h5py.File(root / "ply_data_train1.h5", "r+") as file:
        file["data"][2] = 0.5
    with pytest.raises(InputError, match=r"train1\.h5: sample 2 of dataset 'data': all its points are equal"):
        load(root)
    with h5py.File(root / "ply_data_train1.h5", "r+") as file:
        file["data"][2] = np.arange(file["data"][2].size).reshape(file["data"][2].shape) * np.float32(1e-25)
    with pytest.raises(InputError, match=r"sample 2 of dataset 'data' spans .*, must be at least 1e-18; scale it up"):
        load(root)


def test_a_missing_root_names_the_folder_and_the_command(tmp_path):
    root = tmp_path / "modelnet40"
    with pytest.raises(InputError) as caught:
        create_dataset("modelnet40", root, "train")
    message = str(caught.value)
    assert message.startswith(f"{root}: no such folder; put ModelNet40 there (see data/README.md)")
    assert (
        message.endswith(f"python tools/prepare_data.py modelnet40 --from DIR --output {root}") and "\n" not in message
    )
    with pytest.raises(
        InputError, match=r"no such folder; .*python tools/prepare_data\.py shapes --output .*modelnet40$"
    ):
        create_dataset("shapes", root, "train")
    root.write_text("")
    with pytest.raises(InputError, match="not a folder"):
        create_dataset("modelnet40", root, "train")


def _remove(name):
    return lambda root: (root / name).unlink()


def _write(name, content):
    return lambda root: (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_remove("shape_names.txt"), ["shape_names.txt: no such file"]),
        (_remove("train_files.txt"), ["train_files.txt: no such file"]),
        (_remove("ply_data_train1.h5"), ["train_files.txt: 'ply_data_train1.h5' is not in"]),
        (_write("train_files.txt", b" \n\n"), ["train_files.txt: the file is empty"]),
        (_write("train_files.txt", b"\xff\xfe"), ["train_files.txt: not a text file"]),
        (_write("train_files.txt", b"ply_data_train0.h5\nx/ply_data_train0.h5"), ["listed twice"]),
        (_write("shape_names.txt", b"apple\nboat\napple"), ["shape_names.txt: class 'apple' is listed twice"]),
        (_write("shape_names.txt", b"apple\nboat"), ["train0.h5: dataset 'label' holds 2 in sample 2", "[0, 2)"]),
        (_write("ply_data_train1.h5", b"x"), ["ply_data_train1.h5: not an HDF5 file"]),
        (
            lambda root: write_h5(root / "ply_data_train1.h5", np.ones((1, 17, 3), np.float32), [0]),
            ["ply_data_train1.h5: 17 points a shape, the files before it 16"],
        ),
    ],
)
def test_what_is_wrong_is_named(modelnet_folder, spoil, words):
    root = modelnet_folder()
    spoil(root)
    with pytest.raises(InputError) as caught:
        load(root)
    assert str(caught.value).startswith(str(root)) and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_arguments_out_of_range(modelnet_folder):
    root = modelnet_folder()
    with pytest.raises(InputError, match="unknown split 'tset'; did you mean 'test'"):
        load(root, "tset")
    with pytest.raises(InputError, match="up_axis is 'x'"):
        load(root, up_axis="x")
    with pytest.raises(InputError, match=r"set: 16 points stored .* 1024"):
        load(root, num_points=1024)
    with pytest.raises(InputError, match=r"unknown data set 'modelnet'; did you mean 'modelnet40'.*shapes"):
        create_dataset("modelnet", root, "train")


def test_classes_and_fraction(modelnet_folder):
    root = modelnet_folder(per_file=12)
    some = load(root, classes=["chair", "apple"])
    assert some.class_names == ["chair", "apple"] and some.labels.bincount().tolist() == [8, 8]
    whole = load(root)
    for index, name in enumerate(some.names):
        original = whole.names.index(name)
        assert some.class_names[some.labels[index]] == whole.class_names[whole.labels[original]]
        assert some.points[index].equal(whole.points[original])
    quarter = load(root, classes=["chair", "apple"], fraction=0.25, seed=1)
    assert quarter.labels.bincount().tolist() == [2, 2] and set(quarter.names) < set(some.names)
    assert len(load(root, "test", fraction=0.25)) == 12, "the test split is kept whole"
    with pytest.raises(InputError, match="unknown class 'chairs'; did you mean 'chair'"):
        load(root, classes=["chairs"])
    with pytest.raises(InputError, match="fraction is 0"):
        load(root, fraction=0)


def test_the_prefix_is_cached_beside_the_set_or_where_asked(modelnet_folder, tmp_path):
    root = modelnet_folder(num_points=40)
    first = load(root)
    assert len(list((root / ".fps_cache").iterdir())) == 1
    assert load(root).points.equal(first.points)
    load(root, "test", cache_dir=tmp_path / "own")
    assert len(list((root / ".fps_cache").iterdir())) == len(list((tmp_path / "own").iterdir())) == 1
    assert first.points.shape == (12, 19, 3) and first.stored_points == 40


def test_load_modelnet40_is_the_reader_behind_the_name(modelnet_folder):
    root = modelnet_folder()
    assert load_modelnet40(root, "test", num_points=16).points.equal(
        create_dataset("modelnet40", root, "test", num_points=16).points
    )


@pytest.mark.real_data
def test_real_modelnet40(modelnet40_root):
    test = create_dataset("modelnet40", modelnet40_root, "test")
    train = create_dataset("modelnet40", modelnet40_root, "train")
    assert test.num_classes == 40 and len(test) > 2000 and len(train) > 9000
    assert train.labels.unique().numel() == test.labels.unique().numel() == 40
    for part in (train, test):
        points = part.points.float()
        assert points.isfinite().all()
        assert points.mean(1).abs().max() < 2e-3 and (points.norm(dim=-1).amax(1) - 1).abs().max() < 2e-3
    if test.stored_points == 1024:
        assert test[0][0].shape == (1024, 3)


@pytest.mark.real_data
def test_real_bottles_stand_upright(modelnet40_root):
    test = create_dataset("modelnet40", modelnet40_root, "test", classes=["bottle"])
    extent = test.points.float().amax(1) - test.points.float().amin(1)
    assert (extent.argmax(1) == 2).float().mean() > 0.95
    # The neck is thinner than the body and on top, so z points up and not down.
    radius = test.points.float()[..., :2].norm(dim=-1)
    height = test.points.float()[..., 2]
    top, bottom = height > 0.6 * height.amax(1, keepdim=True), height < 0.6 * height.amin(1, keepdim=True)
    upright = (radius * top).sum(1) / top.sum(1) < (radius * bottom).sum(1) / bottom.sum(1)
    assert upright.float().mean() > 0.9
