"""Pre-training on the trainer: its run folder, its evaluation, resuming bit for bit after a stop and after kill -9."""

import csv
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from children import train_and_kill
from weights import assert_same_weights, log_rows, weights

from s2d3d import Trainer, create_model, load_checkpoint, load_config, load_model
from s2d3d.datasets import PointCloudDataset
from s2d3d.errors import InputError
from s2d3d.evaluation.probe import probe_model, random_encoder
from s2d3d.evaluation.reconstruction import evaluate_reconstruction, pinned_masks
from s2d3d.runs.log import COLUMNS
from s2d3d.runs.record import read_runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("finished")}


@pytest.fixture
def whole(tiny_pretraining, finished):
    """A trainer after 3 epochs that nothing happened to, on a validation part too; it is trained once."""
    if "trainer" not in finished:
        overrides = [*LONG, f"output_dir={finished['root'] / 'run'}"]
        finished["trainer"] = Trainer(tiny_pretraining(*overrides))
        finished["trainer"].fit()
    return finished["trainer"]


LONG = "train.epochs=3", "data.val_fraction=0.17", "eval.every=2", "eval.probe=true"
"""84 shapes to train on, 5 updates an epoch."""


def test_the_run_folder_holds_losses_and_a_dense_model(whole):
    folder, rows = whole.folder, log_rows(whole.folder)
    with open(folder.log) as file:
        assert tuple(next(csv.reader(file))) == COLUMNS["pretrain"]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[2] < losses[0] and all(row["val_loss"] for row in rows)
    assert [bool(row["test_loss"]) for row in rows] == [False, True, False]
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["task"] == "pretrain" and metrics["sparse"] == metrics["merged"], "merging changes nothing"
    assert metrics["merged"] == {"loss": metrics["merged"]["loss"], "norm": "l2", "num_samples": 36}
    assert metrics["parameters"]["training"] > metrics["parameters"]["merged"]
    (record,) = read_runs([folder.root])
    assert record.final == metrics[metrics["kept"]]
    payload = load_checkpoint(folder.merged)
    assert payload["class_names"] == [] and payload["s2d"] is None
    stacked = [key for key, value in weights(folder.last).items() if ".mlp.fc1.weight" in key and value.dim() == 3]
    assert [key.split(".")[0] for key in stacked] == ["MAE_encoder", "MAE_decoder"]
    dense = create_model(payload["model"]["name"], **payload["model"]["kwargs"])
    dense.load_state_dict(payload["state_dict"], strict=True)
    assert "reconstruction loss" in whole.summary()


def test_evaluation_equals_a_loop_over_clouds_under_the_same_masks(whole):
    model, data = load_model(whole.folder.merged), whole.data.test
    kept = whole.reports["merged" if "recalibrated" not in whole.reports else "recalibrated"]
    masks = pinned_masks(model, len(data.dataset))
    assert (masks.sum(1) == model.num_masked).all() and len({tuple(row) for row in masks.tolist()}) > 30
    with torch.no_grad():
        losses = [
            float(model(data.dataset.batch(torch.tensor([i]), augment=False)[0], masks[i : i + 1]))
            for i in range(len(data.dataset))
        ]
    assert kept.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    before = torch.get_rng_state()
    again = evaluate_reconstruction(model, data, device="cpu", progress=False)
    assert again.loss == kept.loss and torch.equal(before, torch.get_rng_state()), "training draws go on as without it"


def test_the_probe_is_that_of_the_final_model_and_of_the_random_encoder_of_the_start(whole, tiny_pretraining, tmp_path):
    kept, data = whole.reports["recalibrated"], whole.data
    train, test = data.plain_train.dataset, data.test.dataset
    final = load_model(whole.folder.merged)
    assert probe_model(final, train, test, device="cpu", progress=False) == kept.probe
    assert kept.probe.num_train == 84 and len(kept.probe.correct) == 36
    stopped = Trainer(tiny_pretraining(*LONG, "s2d.kind=none", "train.max_steps=1"))
    stopped.fit()
    start = load_checkpoint(stopped.folder.previous)["state_dict"]
    config = whole.config
    state = torch.get_rng_state()
    fresh = random_encoder(config.model.name, config.model.kwargs, train, seed=config.seed, device=torch.device("cpu"))
    assert torch.equal(state, torch.get_rng_state())
    own = fresh.state_dict()
    assert all(torch.equal(own[key], start[key]) for key in own if "running" not in key and "tracked" not in key)
    assert probe_model(fresh, train, test, device="cpu", progress=False) == whole.reports["initial"].probe
    record = json.loads(whole.folder.metrics.read_text())["recalibrated"]
    assert record["oa"] == kept.probe.oa == record["correct"].count("1") / 36 and record["probe"]["c"] == kept.probe.c


def test_a_probe_needs_labels_before_anything_is_made(tiny_pretraining, tmp_path):
    config = tiny_pretraining("eval.probe=true")
    one = PointCloudDataset(torch.rand(40, 128, 3), torch.zeros(40), ["unlabelled"], num_points=128)
    with pytest.raises(InputError, match=r"holds no labels, which eval\.probe needs"):
        Trainer(config, datasets=(one, one)).fit()
    box = PointCloudDataset(torch.rand(40, 128, 3), torch.zeros(40), ["box"], num_points=128)
    with pytest.raises(InputError, match=r"has one class, box, and eval\.probe needs two"):
        Trainer(config, datasets=(box, box)).fit()
    few = PointCloudDataset(torch.rand(12, 128, 3), torch.arange(12) % 6, list("abcdef"), num_points=128)
    with pytest.raises(InputError, match=r"12 training clouds of 6 classes are too few"):
        Trainer(tiny_pretraining("eval.probe=true", "train.batch_size=4"), datasets=(few, few)).fit()
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"eval\.probe: is for task: pretrain"):
        load_config("configs/demo.yaml", ["eval.probe=true"])


def test_resume_after_a_stop_in_mid_epoch_is_bit_exact(tiny_pretraining, whole):
    stopped = Trainer(tiny_pretraining(*LONG, "train.max_steps=7"))
    assert stopped.fit() == stopped.folder.last
    resumed = Trainer(tiny_pretraining(*LONG))
    resumed.fit(resume=stopped.folder.root)
    assert_same_weights(weights(resumed.folder.last), weights(whole.folder.last))
    assert_same_weights(weights(resumed.folder.merged), weights(whole.folder.merged))
    assert log_rows(resumed.folder) == log_rows(whole.folder)


@pytest.mark.slow  # the same trainer is killed in test_trainer.py by default
def test_kill_9_in_mid_epoch_resumes_bit_exact(tiny_pretraining, whole, tmp_path):
    config = tiny_pretraining(*LONG, "train.checkpoint_every=3")
    train_and_kill(config, tmp_path / "config.yaml", 8)
    resumed = Trainer(config)
    assert load_checkpoint(resumed.folder.last)["progress"]["updates"] == 6
    resumed.fit(resume=resumed.folder.root)
    assert_same_weights(weights(resumed.folder.last), weights(whole.folder.last))
    assert log_rows(resumed.folder) == log_rows(whole.folder)


def test_options_of_training(tiny_pretraining):
    options = "train.amp=bf16", "train.accum_steps=2", "train.ema_decay=0.9", "model.loss=l1"
    trainer = Trainer(tiny_pretraining(*options))
    trainer.fit()
    assert set(trainer.reports) == {"sparse", "merged", "ema", "recalibrated"}, "after 12 updates"
    assert {report.norm for report in trainer.reports.values()} == {"l1"}


def test_a_router_and_independent_experts_train_too(tiny_pretraining):
    trainer = Trainer(tiny_pretraining("s2d.kind=topk", "s2d.init=independent", "train.max_steps=2"))
    trainer.fit()
    assert len(trainer.parts.routed) == 2


def test_too_few_points_are_refused_before_the_folder_is_made(tiny_pretraining, tmp_path):
    trainer = Trainer(tiny_pretraining("model.num_group=140"))
    with pytest.raises(InputError, match=r"128 points per cloud are too few for num_group=140"):
        trainer.fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask_ratio=0", r"model: mask_ratio is 0\.0, must be in \(0, 1\)"),
        ("model.mask_ratio=1", r"model: mask_ratio is 1\.0, must be in \(0, 1\)"),
        ("model.num_group=1", "model: mask_ratio 0.6 of num_group 1 masks 0 groups"),
        ("task=classify", "model.name: is for task: pretrain, the config says task: classify"),
        ("model={name: point_mae}", "model.name: is for task: classify, the config says task: pretrain"),
        ("eval.votes=2", "eval.votes: has no meaning for task: pretrain"),
        ("train.label_smoothing=0.1", "train.label_smoothing: has no meaning for task: pretrain"),
    ],
)
def test_refused_configs(tiny_pretraining, override, message):
    with pytest.raises(InputError, match=message) as refusal:
        tiny_pretraining(override)
    assert str(refusal.value).count("\n") == 0


def test_clouds_without_labels_are_enough_and_are_not_for_a_classifier(tiny_pretraining, tiny_config, tmp_path):
    """Files in no class folder, and HDF5 files without labels and names of classes."""
    rng, root, folder = np.random.default_rng(0), tmp_path / "scans", tmp_path / "h5"
    root.mkdir()
    folder.mkdir()
    for number in range(40):
        np.save(root / f"{number}.npy", rng.normal(size=(140, 3)).astype(np.float32))
    for split, count in (("train", 32), ("test", 4)):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["data"] = rng.normal(size=(count, 130, 3)).astype(np.float32)
        (folder / f"{split}_files.txt").write_text(f"{split}.h5\n")
    for name, place, count in (("files", root, 32), ("modelnet40", folder, 32)):
        data = f"data.name={name}", f"data.root={place}"
        trainer = Trainer(tiny_pretraining(*data, f"output_dir={tmp_path / name}", "train.max_steps=1"))
        trainer.fit()
        assert len(trainer.data.train.dataset) == count and trainer.data.class_names == ["unlabelled"]
    with pytest.raises(InputError, match="lies in no class folder, so its class is unknown"):
        Trainer(tiny_config("data.name=files", f"data.root={root}")).fit()
    with pytest.raises(InputError, match=r"shape_names\.txt: no such file"):
        Trainer(tiny_config("data.name=modelnet40", f"data.root={folder}")).fit()
    with pytest.raises(InputError, match=r"holds no labels, which eval\.probe needs"):
        Trainer(tiny_pretraining("data.name=files", f"data.root={root}", "eval.probe=true")).fit()


def test_the_tool_and_the_end_of_a_run_fit_the_same_probe(tiny_pretraining, repository, tmp_path):
    """Of a seed other than 0: the held-out part does not depend on the seed of the run."""
    trainer = Trainer(tiny_pretraining("eval.probe=true", "seed=3"))
    trainer.fit()
    metrics = json.loads(trainer.folder.metrics.read_text())
    files = "--checkpoint", str(trainer.folder.merged), "--output", str(tmp_path / "probe.json")
    subprocess.run([sys.executable, str(repository / "tools/linear_probe.py"), *files], check=True)
    found = json.loads((tmp_path / "probe.json").read_text())
    for form, row in (("recalibrated", "model"), ("initial", "random")):
        ours = metrics[form]["probe"]
        assert (ours["c"], metrics[form]["correct"]) == (found[row]["c"], found[row]["correct"])
        assert ours["choice"] == found[row]["choice"]
