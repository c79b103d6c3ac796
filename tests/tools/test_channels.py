"""A run on clouds with normals, through every command: each uses them, or refuses in one line."""

import json

import numpy as np
import pytest
import torch

from s2d3d import Trainer, create_dataset, evaluate, load_config, load_model
from s2d3d.config.data import build_test_loader
from s2d3d.datasets.corruptions import CorruptedDataset
from s2d3d.datasets.h5 import read_h5
from s2d3d.errors import InputError
from s2d3d.evaluation.robustness import SEED
from s2d3d.export.check import compare_exported
from s2d3d.export.write import load_exported
from s2d3d.prepare.folder import copy_modelnet40
from s2d3d.runs.analysis import analyze_run
from s2d3d.runs.checkpoint import load_checkpoint
from s2d3d.runs.trained import open_trained
from s2d3d.viz import kinds

SMALL = (
    "data.name=modelnet40", "data.num_points=128", "data.channels=xyz+normal", "data.augment.rotate=true",
    "model.depth=2", "model.trans_dim=24", "model.num_heads=2", "model.num_group=12", "model.group_size=8",
    "model.encoder_dims=16", "model.encoder_width=8", "s2d.num_experts=2", "s2d.share_rate=0.3", "optim.lr=3e-3",
    "optim.warmup_epochs=0", "train.epochs=2", "train.batch_size=16", "train.keep_every=1", "eval.every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def with_normals(shapes_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("normals") / "set"
    copy_modelnet40(shapes_root, root, estimate_normals=True)
    return root


@pytest.fixture(scope="module")
def run(with_normals, repository, tmp_path_factory):
    overrides = [f"data.root={with_normals}", f"output_dir={tmp_path_factory.mktemp('run') / 'run'}", *SMALL]
    trainer = Trainer(load_config(repository / "configs" / "demo.yaml", overrides))
    trainer.fit()
    return trainer.folder


@pytest.fixture(scope="module")
def tested(with_normals):
    return create_dataset("modelnet40", with_normals, "test", num_points=128, channels="xyz+normal")


@pytest.fixture
def files(tested, tmp_path):
    """Five test clouds in folders named after their classes, and the clouds as the model takes them."""
    points, labels = tested.batch(torch.arange(5), augment=False)
    for index, label in enumerate(labels.tolist()):
        folder = tmp_path / "mine" / tested.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{index}.npy", points[index].double().numpy() * ([3.0] * 3 + [1.0] * 3))
    return tmp_path / "mine", points, labels


def test_normals_are_estimated_and_everything_else_is_copied(shapes_root, with_normals):
    for name in ("ply_data_train0.h5", "ply_data_test0.h5"):
        before, after = read_h5(shapes_root / name), read_h5(with_normals / name)
        np.testing.assert_array_equal(before.points, after.points)
        assert before.normal is None and before.names == after.names and before.up_axis == after.up_axis
        np.testing.assert_allclose(np.linalg.norm(after.normal.astype(float), axis=2), 1, atol=1e-3)
        outwards = (after.normal * (after.points - after.points.mean(1, keepdims=True))).sum(2)
        assert outwards.min() > -1e-3


def test_nothing_to_estimate_is_refused(refuses, with_normals, tmp_path):
    line = refuses(
        "prepare_data", "modelnet40", "--from", with_normals, "--output", tmp_path / "set", "--estimate-normals"
    )
    assert line == f"{with_normals}: all its files have normals; leave out --estimate-normals"


def test_the_model_and_its_checkpoint_have_six_channels(run):
    payload = load_checkpoint(run.merged)
    assert payload["model"]["in_channels"] == 6 and payload["model"]["channels"] == "xyz+normal"
    assert load_model(run.merged).encoder.first_conv[0].weight.shape == (8, 6, 1)
    assert open_trained(run.merged).channels == "xyz+normal"


def test_the_hub_layout_tells_the_channels(run):
    pytest.importorskip("huggingface_hub")
    from s2d3d import PointCloudClassifier

    classifier = PointCloudClassifier.from_checkpoint(run.merged)
    assert classifier.channels == "xyz+normal" and "6 (xyz+normal)" in classifier.card


def test_evaluation_of_the_set_of_files_and_of_corrupted_clouds(call, run, tested, files, tmp_path):
    trained = open_trained(run.merged)
    loader = build_test_loader(tested, trained.config.data, batch_size=64, seed=0)
    folder, points, labels = files
    turned = CorruptedDataset(tested, "rotate", 5, seed=SEED)
    corrupted = build_test_loader(turned, trained.config.data, batch_size=64, seed=0)
    for name, arguments, own in (
        ("set", ["--votes", 2], dict(loader=loader, votes=2)),
        ("files", ["--files", folder], dict(loader=[(points, labels)], class_names=trained.class_names)),
        ("corrupted", ["--corruption", "rotate:5"], dict(loader=corrupted)),
    ):
        output = tmp_path / f"{name}.json"
        result = call("evaluate", "--checkpoint", run.merged, *arguments, "--output", output)
        assert result.code == 0, result.err
        expected = evaluate(trained.model, device="cpu", progress=False, **own)
        assert json.loads(output.read_text())["confusion"] == expected.confusion, name
        assert json.loads(output.read_text())["loss"] == pytest.approx(expected.loss, rel=1e-4)


def test_predictions_of_files(call, run, files, tmp_path):
    folder, points, _ = files
    result = call("predict", "--checkpoint", run.merged, folder, "--output", tmp_path / "p.json")
    assert result.code == 0, result.err
    entries = json.loads((tmp_path / "p.json").read_text())["predictions"]
    found = {entry["file"]: entry["probabilities"] for entry in entries}
    model, names = load_model(run.merged), load_checkpoint(run.merged)["class_names"]
    for index in range(5):
        (path,) = folder.rglob(f"{index}.npy")
        with torch.no_grad():
            shares = model(points[index : index + 1]).softmax(1)[0]
        assert found[str(path)] == pytest.approx(dict(zip(names, shares.tolist())), abs=1e-4)


def test_files_without_normals_are_one_line_or_estimated(call, run, files, tmp_path):
    bare = tmp_path / "bare.xyz"
    np.savetxt(bare, files[1][0, :, :3].numpy())
    result = call("predict", "--checkpoint", run.merged, bare)
    assert result.code == 1 and result.err.count("\n") == 1
    assert "bare.xyz: holds no normals, which data.channels=xyz+normal needs; set" in result.err
    assert "--estimate-normals" in result.err
    assert call("predict", "--checkpoint", run.merged, bare, "--estimate-normals").code == 0


@pytest.mark.parametrize("name", ["evaluate", "export", "predict"])
def test_other_channels_are_refused(refuses, run, name, tmp_path):
    if name == "predict":  # it has no overrides
        line = refuses("evaluate", "--checkpoint", run.merged, "--estimate-normals")
        return line.startswith("--estimate-normals: is for --files only")
    output = ["--output", tmp_path / "m.pt"] if name == "export" else []
    line = refuses(name, "--checkpoint", run.merged, "data.channels=xyz", *output)
    assert line == f"{run.merged}: takes xyz+normal, data.channels asks for xyz; remove the override"


def test_data_sets_of_other_channels_than_the_config_are_refused(tiny_config, tested):
    with pytest.raises(
        InputError, match=r"clouds have xyz\+normal, data\.channels is xyz; set data\.channels=xyz\+normal$"
    ):
        Trainer(tiny_config(), datasets=(tested, tested)).fit()


def test_a_run_does_not_go_on_with_other_channels(refuses, run, trained, shapes_root, with_normals):
    line = refuses("train", run.config, "--resume", run.last, "data.channels=xyz")
    assert "was trained with data.channels='xyz+normal', the config says 'xyz'" in line
    line = refuses("train", trained.config, "data.channels=xyz+normal", f"output_dir={run.root.parent / 'other'}")
    assert "holds no normals (no dataset 'normal'), which data.channels=xyz+normal needs; set data.channels=xyz" in line
    line = refuses("evaluate", "--checkpoint", run.merged, f"data.root={shapes_root}")
    assert "test0.h5: holds no normals (no dataset 'normal')" in line


@pytest.mark.parametrize("suffix", [".pt", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_an_exported_file_takes_normals(call, run, tested, tmp_path, suffix):
    output = tmp_path / f"m{suffix}"
    result = call("export", "--checkpoint", run.merged, "--output", output, "--clouds", 6)
    assert result.code == 0, result.err
    exported = load_exported(output)
    assert exported.metadata["channels"] == "xyz+normal" and exported.metadata["in_channels"] == 6
    points = tested.batch(torch.arange(6), augment=False)[0]
    assert compare_exported(load_model(run.merged), exported, points).wrong == 0
    still = points.clone()
    still[..., 3:] = 0
    assert (exported(points) - exported(still)).abs().max() > 1e-3, "the file reads the normals"


def test_pictures_draw_coordinates_of_what_the_model_saw(run, tested, files):
    folder, points, _ = files
    for kind in ("gallery", "predictions", "patches", "experts", "saliency", "corruptions"):
        source = kinds.read_source(kind, checkpoint=run.last, num_clouds=2, device="cpu")
        if kind == "corruptions":
            sheet = kinds.corruptions(source, 2)
        else:
            sheet = getattr(kinds, kind)(source)
            sheet = sheet[0] if kind == "predictions" else sheet
        assert source.clouds.shape[2] == 6 and all(np.asarray(cloud).shape[1] == 3 for cloud in sheet.clouds), kind
    source = kinds.read_source("predictions", checkpoint=run.merged, files=[str(folder)], device="cpu")
    order = [int(name.partition(".")[0]) for name in source.dataset.names]
    torch.testing.assert_close(source.clouds, points[order], atol=1e-3, rtol=0)  # of the set in float16


@pytest.mark.slow
def test_a_report_and_an_analysis(call, run, tested, tmp_path):
    output = tmp_path / "report.html"
    result = call("report", run.root, "--output", output, "--num-mistakes", 2, "--clouds-per-class", 1)
    assert result.code == 0 and output.stat().st_size > 10_000, result.err
    analysis = analyze_run(run.root, num_shapes=36, num_positions=3, progress=False)
    trained = open_trained(run.last, merge=True)
    loader = build_test_loader(tested, trained.config.data, batch_size=64, seed=0)
    own = evaluate(trained.model, loader, device="cpu", progress=False)
    assert analysis["checkpoints"][-1]["merged"]["oa"] == own.oa


def test_few_shot_folds(call, run, tmp_path):
    overrides = ["train.epochs=1", "train.keep_every=null", f"output_dir={tmp_path / 'folds'}", "train.batch_size=4"]
    arguments = ["--ways", 2, "--shots", 2, "--queries", 2, "--folds", 1, "--output", tmp_path / "folds.json"]
    result = call("few_shot", run.config, *overrides, *arguments)
    assert result.code == 0, result.err
    (checkpoint,) = tmp_path.rglob("merged.pt")
    assert load_checkpoint(checkpoint)["model"]["channels"] == "xyz+normal"


def test_a_pretrained_file_of_coordinates_gives_its_columns(run, trained, shapes_root, repository, tmp_path, caplog):
    """The merged model of a run on x, y, z starts a run with normals, and does what it did."""
    from s2d3d.machine import Runtime
    from s2d3d.training.parts import build_model

    start = load_config(trained.folder.config, [f"model.pretrained={trained.merged}", "data.channels=xyz+normal"])
    names = load_checkpoint(trained.merged)["class_names"]
    with caplog.at_level("INFO"):
        parts = build_model(start, Runtime(torch.device("cpu")), names)
    assert "first layers: columns of xyz loaded, those of normal start at zero" in caplog.text
    points = create_dataset("shapes", shapes_root, "test", num_points=128).batch(torch.arange(4), augment=False)[0]
    both = torch.cat([points, torch.randn(points.shape)], -1)
    with torch.no_grad():
        torch.testing.assert_close(parts.model.eval()(both), load_model(trained.merged)(points), atol=1e-5, rtol=1e-4)
