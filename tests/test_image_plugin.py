"""A task without point clouds is a plugin: examples/images trains, resumes, merges and is studied like any other."""

import csv
import json
import types

import numpy as np
import pytest
import torch
import yaml

from s2d3d import Trainer, create_dataset, create_model, load_config, load_model, register_dataset
from s2d3d.datasets import _DATASETS, LabelledDataset, PointCloudDataset
from s2d3d.errors import InputError
from s2d3d.plugins import load_plugins
from s2d3d.studies.cell import cell_from_dict, cell_to_dict
from s2d3d.studies.page import report_text
from s2d3d.studies.plan import load_study
from s2d3d.studies.run import run_study
from s2d3d.studies.store import read_records
from s2d3d.studies.summary import summarize

CLASSES = ["dark", "bright", "striped"]


@pytest.fixture(scope="module")
def plugin(repository):
    """What examples/images/cifar_vit.py defines."""
    pytest.importorskip("h5py")
    load_plugins([repository / "examples/images/cifar_vit.py"])
    reader = _DATASETS["images"].read
    return types.SimpleNamespace(**reader.__globals__)


@pytest.fixture(scope="module")
def images(plugin, tmp_path_factory):
    """A file of 16 training and 8 test images of each of three classes, 8 x 8."""
    import h5py

    path, rng = tmp_path_factory.mktemp("images") / "small.h5", np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["class_names"] = CLASSES
        for split, count in (("train", 16), ("test", 8)):
            labels = np.repeat(np.arange(3, dtype=np.uint8), count)
            pixels = rng.integers(0, 90, (len(labels), 8, 8, 3))
            pixels[labels == 1] += 150
            pixels[labels == 2, ::2] += 150
            file[f"{split}/image"], file[f"{split}/label"] = pixels.astype(np.uint8), labels
    return path


@pytest.fixture
def config(images, tmp_path, repository):
    """Make a config of a second: 3 updates an epoch, 3 epochs, experts in 1 of 2 blocks."""

    def make(*overrides):
        small = ["model.img_size=8", "model.embed_dim=16", "model.depth=2", "data.crop=1", "train.batch_size=16"]
        short = ["train.epochs=3", "optim.warmup_epochs=1", f"data.root={images}", f"output_dir={tmp_path / 'run'}"]
        return load_config(repository / "examples/images/cifar_vit.yaml", [*small, *short, *overrides])

    return make


def test_crops_and_flips_are_those_of_a_plain_loop(plugin):
    images = torch.rand(6, 3, 5, 7)
    augmented = plugin.CropAndFlip(crop=2)(images, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    shifts = torch.randint(5, (2, 6, 1), generator=generator)[..., 0].tolist()
    mirrored = (torch.rand(6, 1, generator=generator) < 0.5).flatten().tolist()
    assert 0 < sum(mirrored) < 6 and len({*zip(*shifts)}) > 3
    for image, result, top, left, mirror in zip(images, augmented, *shifts, mirrored):
        canvas = torch.zeros(3, 9, 11)
        canvas[:, 2:7, 2:9] = image
        crop = canvas[:, top : top + 5, left : left + 7]
        assert torch.equal(result, crop.flip(-1) if mirror else crop)
    plain = plugin.CropAndFlip(crop=0, flip=False)
    assert torch.equal(plain(images, generator), images)


def test_the_reader_chooses_rescales_and_augments_the_training_split_alone(plugin, images):
    import h5py

    with h5py.File(images) as file:
        stored = {split: file[f"{split}/image"][()] for split in ("train", "test")}
    test = create_dataset("images", images, "test", fraction=0.25)
    assert isinstance(test, plugin.ImageDataset) and len(test) == 24, "a fraction is for training"
    expected = torch.from_numpy(stored["test"][[3, 20]]).permute(0, 3, 1, 2) / 127.5 - 1
    pixels, labels = test.batch(torch.tensor([3, 20]))
    torch.testing.assert_close(pixels, expected)
    assert labels.tolist() == [0, 2] and pixels.is_contiguous()
    train = create_dataset("images", images, "train", fraction=0.25, seed=1, classes=["striped", "dark"], crop=1)
    assert train.labels.bincount().tolist() == [4, 4] and train.class_names == ["striped", "dark"]
    rows = [int(name.split("_")[1]) for name in train.names]
    plain = train.sample(torch.tensor([5]))[0][0]
    torch.testing.assert_close(plain, torch.from_numpy(stored["train"][rows[5]]).permute(2, 0, 1) / 127.5 - 1)
    assert torch.equal(train.batch(torch.arange(8), augment=False)[0][5], plain)
    assert not torch.equal(train.batch(torch.arange(8))[0][5], plain), "augmented"
    other = create_dataset("images", images, "train", fraction=0.25, seed=2, classes=["striped", "dark"])
    assert other.names != train.names and other.fingerprint() != train.fingerprint()


def test_a_run_resumes_exactly_and_merges_into_the_stock_model(config):
    whole = config("s2d.every=1")
    merged = load_model(Trainer(whole).fit())
    metrics = json.loads((Trainer(whole).folder.metrics).read_text())
    assert metrics["sparse"]["correct"] == metrics["merged"]["correct"] and metrics["merged"]["num_samples"] == 24
    assert metrics["merged"]["class_names"] == CLASSES
    stock = create_model("small_vit", num_classes=3, img_size=8, embed_dim=16, depth=2)
    stock.load_state_dict(merged.state_dict(), strict=True)

    folder = f"output_dir={whole.output_dir}_resumed"
    stopped = Trainer(config("s2d.every=1", folder, "train.max_steps=4")).fit()
    resumed = load_model(Trainer(config("s2d.every=1", folder)).fit(resume=stopped))
    assert merged.state_dict().keys() == resumed.state_dict().keys()
    for key, weight in merged.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[key]), key


def test_a_study_records_its_runs_and_its_page_speaks_of_images(config, tmp_path, repository):
    base, path, results = tmp_path / "base.yaml", tmp_path / "pictures.yaml", tmp_path / "results"
    plugins = {"plugins": [str(repository / "examples/images/cifar_vit.py")]}
    base.write_text(yaml.safe_dump(config().to_dict() | plugins))
    arms = {"dense": {"s2d.kind": "none"}, "topk": {"s2d.kind": "topk", "s2d.share_rate": 0}}
    path.write_text(yaml.safe_dump({
        "name": "pictures", "question": "Is it the same?", "base": "base.yaml", "evaluate": "test", "seeds": [7],
        "reference": "dense", "arms": arms, "common": {"train.epochs": 2, "data.fraction": 0.5, "train.batch_size": 8},
        "output_dir": str(tmp_path / "runs"),
    }))  # fmt: skip
    study = load_study(path)
    assert run_study(study, results=results).exit_code == 0
    records = read_records(results, study.cells)
    dense, topk = records["dense", 7], records["topk", 7]
    assert (dense["updates"], dense["kept"], topk["updates"], topk["kept"]) == (6, "merged", 6, "routed")
    summary = summarize(study, records)
    difference = dense["results"]["merged"]["oa"] - topk["results"]["routed"]["oa"]
    assert summary["comparisons"][0]["mean"] == pytest.approx(-difference)
    page = report_text(summary, "python tools/study.py")
    assert "(24 images)" in page and "the same images" in page and "shapes" not in page
    with (tmp_path / "runs/topk/seed7/log.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["balance_loss"]) > 0


def test_a_worker_finds_a_plugin_beside_its_config(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (repository / "examples/images/cifar_vit.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("plugins")]
    load_plugins([repository / "examples/images/cifar_vit.py"])
    base = tmp_path / "deep" / "base.yaml"
    base.parent.mkdir()
    (base.parent / "mine.py").write_text("import s2d3d\n")
    base.write_text("\n".join(["plugins: [mine.py]", *lines]))
    study = {"name": "a", "question": "?", "base": "base.yaml", "evaluate": "test", "seeds": [1], "reference": "b",
             "arms": {"a": {}, "b": {"s2d.kind": "none"}}}  # fmt: skip
    (base.parent / "a.yaml").write_text(yaml.safe_dump(study))
    cell = load_study("deep/a.yaml").cells[0]
    plain = json.loads(json.dumps(cell_to_dict(cell)))
    assert str(base.parent / "mine.py") in plain["plugins"]
    assert cell_from_dict(plain).config.model == cell.config.model


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.num_points=64", "data.num_points: is for point clouds, 'images' holds images; remove it"),
        ("data.up_axis=y", "data.up_axis: is for point clouds, 'images' holds images; remove it"),
        ("data.normalize=false", "data.normalize: is for point clouds, 'images' holds images; remove it"),
        ("data.augment.jitter=0.1", "data.augment: is for point clouds, 'images' holds images; remove it"),
        ("eval.votes=3", "eval.votes: is for point clouds, 'images' holds images; set it to 1"),
        ("data.crop=17", "data.crop: must be in [0, 16], got 17"),
    ],
)
def test_keys_of_clouds_are_refused(config, plugin, override, message):
    with pytest.raises(InputError) as refused:
        config(override)
    assert str(refused.value).endswith(message)


def test_a_resolved_config_says_that_clouds_are_not_augmented(config):
    resolved = config().to_dict()["data"]
    assert resolved["augment"] == {"scale": None, "shift": 0, "rotate": False, "jitter": 0, "dropout": 0}
    assert (resolved["crop"], resolved["flip"]) == (1, True)


def test_commands_for_clouds_refuse_the_model_and_evaluate_scores_it(config, tmp_path, tool, capsys):
    merged = str(Trainer(config("train.epochs=1", "optim.warmup_epochs=0")).fit())
    assert tool("evaluate").main(["--checkpoint", merged]) == 0
    assert "(24 samples)" in capsys.readouterr().out
    cloud = tmp_path / "a.xyz"
    cloud.write_text("0 0 0\n1 1 1\n")
    for name, *arguments in (
        ("predict", str(cloud)),
        ("export", "--output", str(tmp_path / "a.pt")),
        ("export", "--format", "hub", "--output", str(tmp_path / "hub")),
        ("visualize", "--output", str(tmp_path / "a.png")),
        ("evaluate", "--files", str(cloud)),
        ("evaluate", "--corruption", "jitter:1"),
    ):
        assert tool(name).main(["--checkpoint", merged, *arguments]) == 1, name
        (line,) = capsys.readouterr().err.splitlines()
        assert "was trained on 'images', images; " in line and line.endswith("needs point clouds"), line
    assert {path.name for path in tmp_path.iterdir()} == {"a.xyz", "run"}, "nothing else is written"
    assert tool("evaluate").main(["--checkpoint", merged, "--votes", "2"]) == 1
    assert "eval.votes: is for point clouds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.img_size=12"], "a batch of 16 images of shape [3, 8, 8] does not pass through small_vit: "),
        (["data.root=nowhere.h5"], "nowhere.h5: no such file; name the HDF5 file by data.root=FILE"),
    ],
)
def test_what_does_not_fit_is_one_line(config, overrides, message):
    with pytest.raises(InputError) as refused:
        Trainer(config(*overrides)).fit()
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("damage", ["no test", "float", "label", "text"])
def test_a_wrong_file_is_named(plugin, tmp_path, damage):
    import h5py

    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        file.attrs["class_names"] = ["a", "b"]
        for split in ("train", "test"):
            file[f"{split}/image"] = np.zeros((2, 8, 8, 3), np.float32 if damage == "float" else np.uint8)
            file[f"{split}/label"] = np.array([0, 2 if damage == "label" else 1])
        if damage == "no test":
            del file["test"]
    if damage == "text":
        path.write_text("no HDF5")
    with pytest.raises(InputError, match=r"bad\.h5: ") as refused:
        create_dataset("images", path, "test")
    assert len(str(refused.value).splitlines()) == 1


def test_a_reader_must_return_the_kind_that_it_declares(plugin, images):
    register_dataset("undeclared", plugin.read_images)
    with pytest.raises(InputError, match="returns a ImageDataset, not a PointCloudDataset; name the class by"):
        create_dataset("undeclared", images, "train")
    assert issubclass(plugin.ImageDataset, LabelledDataset) and not issubclass(plugin.ImageDataset, PointCloudDataset)


def test_what_a_reader_drops_is_refused(tmp_path):
    def read(root, split, *, num_points, transform=None, **_):
        points, labels = torch.rand(8, 16, 3), torch.tensor([0, 1] * 4)
        return PointCloudDataset(points, labels, ["a", "b"], split=split, num_points=num_points, transform=transform)

    register_dataset("dropping", read)
    try:
        assert len(create_dataset("dropping", tmp_path, "train", num_points=8)) == 8
        for key, value in (("classes", ["b"]), ("fraction", 0.5), ("up_axis", "y")):
            with pytest.raises(InputError, match=f"data.{key}: the reader of data set 'dropping' ignores it"):
                create_dataset("dropping", tmp_path, "train", num_points=8, **{key: value})
    finally:
        del _DATASETS["dropping"]
