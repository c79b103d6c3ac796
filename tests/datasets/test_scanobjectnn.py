"""ScanObjectNN's layout: small files as the public ones, and how they arrive."""

import h5py
import numpy as np
import pytest
import torch
import yaml

from s2d3d.config.data import build_dataset
from s2d3d.config.load import load_config, parse_config
from s2d3d.datasets import PointCloudDataset, create_dataset
from s2d3d.datasets.scanobjectnn import BACKGROUND, CLASS_NAMES, VARIANTS
from s2d3d.errors import InputError
from s2d3d.ops.points import farthest_point_sample
from s2d3d.random_state import derived_generator

SUFFIXES = ("", "_augmented25_norot", "_augmented25rot", "_augmentedrot", "_augmentedrot_scale75")


def write_public(path, points, label, mask=None):
    """Write a file as the public ones are: float32, label (n,), mask (n, P), no attribute, no name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"] = np.asarray(points, np.float32)
        file["label"] = np.asarray(label)
        if mask is not None:
            file["mask"] = np.asarray(mask, np.int64)


def coded_mask(points):
    """Return a mask that can be told from each point: the object is where x > 0."""
    return np.where(np.asarray(points)[..., 0] > 0, 7, BACKGROUND)


@pytest.fixture
def public_root(tmp_path, clouds):
    """Write all 20 files of the public layout, each with other points: 6 training and 3 test shapes of 24 points."""
    root = tmp_path / "h5_files"
    for number, (folder, suffix) in enumerate((f, s) for f in ("main_split", "main_split_nobg") for s in SUFFIXES):
        for split, count in (("training", 6), ("test", 3)):
            points = clouds(count, 24, seed=2 * number + (split == "test"))
            label = (np.arange(count) * 4 + number) % 15
            write_public(root / folder / f"{split}_objectdataset{suffix}.h5", points, label, coded_mask(points))
    return root


def load(root, split="test", **kwargs):
    return create_dataset("scanobjectnn", root, split, **{"num_points": 24, **kwargs})


def stored(root, name):
    with h5py.File(root / f"{name}.h5") as file:
        return torch.from_numpy(file["data"][:]), file["label"][:].tolist(), torch.from_numpy(file["mask"][:])


def turned(points):
    """Turn y up to z up by the definition of a quarter turn about x."""
    quarter = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    return points @ quarter.T


PUBLIC = [
    ("OBJ_BG", None, "main_split", ""),
    ("OBJ_BG", False, "main_split_nobg", ""),
    ("OBJ_ONLY", None, "main_split_nobg", ""),
    ("OBJ_ONLY", False, "main_split_nobg", ""),
    *[
        (variant, background, "main_split_nobg" if background is False else "main_split", suffix)
        for variant, suffix in zip(("PB_T25", "PB_T25_R", "PB_T50_R", "PB_T50_RS"), SUFFIXES[1:])
        for background in (None, True, False)
    ],
]


@pytest.mark.parametrize(("variant", "background", "folder", "suffix"), PUBLIC)
def test_each_variant_is_its_file(public_root, variant, background, folder, suffix):
    for split, name in (("train", "training"), ("test", "test")):
        dataset = load(public_root, split, variant=variant, background=background)
        points, label, mask = stored(public_root, f"{folder}/{name}_objectdataset{suffix}")
        assert dataset.points.equal(turned(points))
        assert dataset.labels.tolist() == label
        assert dataset.mask.equal(mask) and dataset.mask.dtype == torch.int64
    assert {case[0] for case in PUBLIC} == set(VARIANTS)


def test_the_default_is_the_hardest_variant_with_background(public_root):
    assert load(public_root).points.equal(load(public_root, variant="PB_T50_RS", background=True).points)


def test_the_published_classes_and_a_name_for_each_shape(public_root):
    dataset = load(public_root, "train")
    names = "bag bin box cabinet chair desk display door shelf table bed pillow sink sofa toilet"
    assert dataset.class_names == names.split() == list(CLASS_NAMES)
    assert len(set(dataset.names)) == 6 and dataset.names[0].startswith("training_objectdataset_augmentedrot_scale75")


def test_classes_beside_the_files_replace_the_published(public_root):
    (public_root / "shape_names.txt").write_text("".join(f"thing{index}\n" for index in range(40)))
    assert load(public_root).class_names == [f"thing{index}" for index in range(40)]
    (public_root / "shape_names.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match=r"dataset 'label' holds .*, must be in \[0, 2\)"):
        load(public_root)


PILLAR = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0, 0.2], [0, 5, 0]], np.float32)  # asymmetric; y is its long axis


@pytest.mark.parametrize(
    ("attribute", "argument", "up"),
    [(None, None, "y"), ("y", None, "y"), ("z", None, "z"), (None, "z", "z"), ("z", "y", "y")],
)
def test_points_are_turned_z_up(tmp_path, attribute, argument, up):
    path = tmp_path / "main_split" / "test_objectdataset_augmentedrot_scale75.h5"
    write_public(path, PILLAR[None], [3])
    if attribute:
        with h5py.File(path, "a") as file:
            file.attrs["up_axis"] = attribute
    got = load(tmp_path, num_points=4, up_axis=argument)[0][0]
    assert got[3].tolist() == ([0, 0, 5] if up == "y" else [0, 5, 0])
    assert got[1].tolist() == pytest.approx([0.1, 0, 0])
    assert got[2].tolist() == pytest.approx([0, -0.2, 0] if up == "y" else [0, 0, 0.2])


def test_clouds_are_not_normalised_unless_asked(public_root):
    points = load(public_root).points
    assert points.mean(1).abs().max() > 0.1
    points = load(public_root, normalize=True).points
    torch.testing.assert_close(points.mean(1), torch.zeros(3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(points.norm(dim=-1).amax(1), torch.ones(3))


@pytest.mark.parametrize("num_points", [24, 20, 10])
def test_the_mask_stays_with_its_points(public_root, num_points):
    train, test = (load(public_root, split, num_points=num_points) for split in ("train", "test"))
    original = turned(stored(public_root, "main_split/test_objectdataset_augmentedrot_scale75")[0])
    order = farthest_point_sample(original, num_points) if num_points < 24 else torch.arange(24).expand(3, 24)
    for index, cloud in enumerate(original):
        assert test[index][0].equal(cloud[order[index]])
    for dataset in (train, test):
        assert dataset.mask.numpy().tolist() == coded_mask(dataset.points).tolist()
        assert set(dataset.mask.unique().tolist()) == {BACKGROUND, 7}
    shuffled = train.subset([4, 0, 5, 2])
    assert shuffled.points[0].equal(train.points[4])
    assert shuffled.mask.numpy().tolist() == coded_mask(shuffled.points).tolist()
    indices = torch.tensor([3, 0, 1])
    for split, seed in ((train, 5), (train, 6), (shuffled, 5)):
        points, _ = split.sample(indices, derived_generator(seed))
        drawn = split.sample_mask(indices, derived_generator(seed))
        assert drawn.shape == (3, num_points) and drawn.numpy().tolist() == coded_mask(points).tolist()
    assert test.sample_mask(torch.tensor([2, 1])).equal(test.mask[[2, 1], :num_points])
    other_order = train.sample_mask(indices, derived_generator(6))
    assert not other_order.equal(train.sample_mask(indices, derived_generator(5)))


def test_a_file_without_mask(public_root):
    points, label, _ = stored(public_root, "main_split/test_objectdataset")
    write_public(public_root / "main_split" / "test_objectdataset.h5", points, label)
    dataset = load(public_root, variant="OBJ_BG")
    assert dataset.mask is None and len(dataset) == 3
    with pytest.raises(InputError, match=r"test_objectdataset\.h5: its files hold no mask"):
        dataset.sample_mask(torch.tensor([0]))


def test_a_mask_must_fit_its_points():
    with pytest.raises(AssertionError, match="mask"):
        PointCloudDataset(torch.rand(2, 8, 3), torch.zeros(2), ["a"], mask=torch.zeros(2, 7), num_points=8)


def test_classes_and_fraction(public_root):
    whole = load(public_root, "train")
    some = load(public_root, "train", classes=["bed", "bin"])
    assert some.class_names == ["bed", "bin"] and len(some) > 0
    for index, name in enumerate(some.names):
        original = whole.names.index(name)
        assert some.class_names[some.labels[index]] == whole.class_names[whole.labels[original]]
        assert some.points[index].equal(whole.points[original]) and some.mask[index].equal(whole.mask[original])
    path = public_root / "main_split" / "training_objectdataset.h5"
    write_public(path, np.random.default_rng(0).normal(size=(8, 24, 3)), [0, 1] * 4)
    half = load(public_root, "train", variant="OBJ_BG", fraction=0.5)
    assert half.labels.tolist().count(0) == half.labels.tolist().count(1) == 2


def _one_line(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_named_and_where_to_get_it(public_root, tmp_path):
    absent = tmp_path / "nowhere"
    line = _one_line(lambda: load(absent))
    assert line.startswith(f"{absent}: no such folder; get ScanObjectNN from https://") and "data/README.md" in line
    assert line.endswith(f"python tools/prepare_data.py scan --from DIR --output {absent}")
    path = public_root / "main_split" / "test_objectdataset_augmented25rot.h5"
    path.unlink()
    line = _one_line(lambda: load(public_root, variant="PB_T25_R"))
    assert (
        line.startswith(f"{path}: no such file, variant PB_T25_R needs it; get it from https://") and "README" in line
    )
    line = _one_line(lambda: load(public_root / "main_split"))
    assert line.startswith(f"{public_root / 'main_split'}: holds the files themselves; name the folder above")
    (absent / "main_split").mkdir(parents=True)
    line = _one_line(lambda: load(absent, background=False))
    assert line.startswith(f"{absent}: no folder main_split_nobg in it; get it from https://")


def test_arguments_out_of_range(public_root):
    assert "unknown variant 'PB_T50'; did you mean 'PB_T50_R'" in _one_line(lambda: load(public_root, variant="PB_T50"))
    assert "did you mean 'test'" in _one_line(lambda: load(public_root, "tset"))
    assert "up_axis is 'x'" in _one_line(lambda: load(public_root, up_axis="x"))
    assert "OBJ_BG" in _one_line(lambda: load(public_root, variant="OBJ_ONLY", background=True))
    assert "24 points stored" in _one_line(lambda: load(public_root, num_points=25))


def test_other_data_sets_refuse_the_keys(tmp_path):
    for key, value in (("variant", "OBJ_BG"), ("background", False)):
        line = _one_line(lambda: create_dataset("shapes", tmp_path, "test", **{key: value}))  # noqa: B023
        assert line == f"data set 'shapes' has no {key}; only scanobjectnn has"


# Configs


def _config(name="scanobjectnn", **data):
    mapping = {
        "output_dir": "runs/x",
        "data": {"name": name, "root": "r", **data},
        "model": {"name": "point_bert_tiny"},
    }
    return parse_config(mapping, where="a.yaml")


def test_the_config_chooses_the_file(public_root):
    data = _config(root=str(public_root), num_points=24, normalize=False, variant="OBJ_BG", background=False).data
    points, _, mask = stored(public_root, "main_split_nobg/training_objectdataset")
    dataset = build_dataset(data, "train", seed=0)
    assert dataset.points.equal(turned(points)) and dataset.mask.equal(mask)
    data = _config(root=str(public_root), num_points=24).data
    assert data.variant is None and data.background is None
    assert "scale75" in build_dataset(data, "test", seed=0).source


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            {"name": "modelnet40", "variant": "OBJ_BG"},
            "data.variant: only scanobjectnn has one, 'modelnet40' has not; ",
        ),
        ({"name": "shapes", "background": False}, "data.background: only scanobjectnn has one, 'shapes' has not; "),
        ({"variant": "PB_T50_SR"}, "data.variant: must be "),
        ({"variant": "OBJ_ONLY", "background": True}, "data.background: OBJ_ONLY is without background"),
        ({"background": 1}, "data.background: must be true or false (or null), got 1"),
    ],
)
def test_the_config_refuses(data, line):
    assert _one_line(lambda: _config(**data)).startswith(f"a.yaml: {line}")


@pytest.mark.parametrize("pair", ["scanobjectnn_{}", "scan_{}_small", "scanobjectnn_mae_{}", "scanobjectnn_pt_{}"])
def test_twins_differ_only_in_s2d_and_output_dir(repository, pair):
    paths = [repository / "configs" / f"{pair.format(kind)}.yaml" for kind in ("s2d", "dense")]
    sparse, dense = (yaml.safe_load(path.read_text()) for path in paths)
    assert sparse.pop("s2d")["kind"] == "rup" and dense.pop("s2d") == {"kind": "none"}
    assert (sparse.pop("output_dir"), dense.pop("output_dir")) == tuple(f"runs/{path.stem}" for path in paths)
    assert sparse == dense
    config = load_config(paths[0])
    assert config.data.name == "scanobjectnn" and config.data.normalize is False and config.data.augment.rotate is True


def test_links_out_of_the_folder_follow_the_rule_of_every_reader(public_root, tmp_path):
    expected = load(public_root, num_points=24)
    path = public_root / "main_split" / "test_objectdataset_augmentedrot_scale75.h5"
    path.rename(tmp_path / "9c1b")
    path.symlink_to(tmp_path / "9c1b")
    with pytest.raises(InputError, match="is a link out of the folder"):
        load(public_root, num_points=24)
    assert torch.equal(load(public_root, num_points=24, allow_links=True).points, expected.points)
