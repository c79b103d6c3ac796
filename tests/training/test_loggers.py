"""TensorBoard and Weights & Biases: what is read back is what log.csv says, also when a run was killed and resumed."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from s2d3d import Trainer
from s2d3d.errors import InputError
from s2d3d.training.loggers import CLOUDS, tag

pytestmark = pytest.mark.usefixtures("enough_updates")


def log_csv(folder):
    """Return {(column, epoch): value} of log.csv, without empty cells."""
    with open(folder.log) as file:
        rows = list(csv.DictReader(file))
    return {
        (column, int(row["epoch"])): float(value)
        for row in rows for column, value in row.items() if value and column != "epoch"
    }  # fmt: skip


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder.root / "tensorboard"), size_guidance=sizes).Reload()


def scalars(events, group=None):
    """Return [(tag, step, value)] of all scalars."""
    tags = events.Tags()["scalars"]
    return [(name, event.step, event.value) for name in tags for event in events.Scalars(name)]


def assert_log_is_in(events, folder):
    expected = {(tag(column), epoch): value for (column, epoch), value in log_csv(folder).items()}
    written = [(name, step, value) for name, step, value in scalars(events) if not name.startswith("final/")]
    assert len(written) == len(expected), "each epoch once"
    for name, step, value in written:
        assert value == pytest.approx(expected[name, step], rel=1e-5), (name, step)


def mesh(events, name):
    """Return the points and colours of a mesh tag, both (n, N, 3)."""
    from tensorboard.plugins.mesh.plugin_data_pb2 import MeshPluginData
    from tensorboard.util.tensor_util import make_ndarray

    kinds = {MeshPluginData.VERTEX: "VERTEX", MeshPluginData.COLOR: "COLOR"}
    return tuple(make_ndarray(events.Tensors(f"{name}_{kind}")[-1].tensor_proto) for kind in kinds.values())


def test_tensorboard_holds_the_log_the_confusions_and_clouds(tiny_config):
    trainer = Trainer(tiny_config("log.tensorboard=true", "eval.every=1", "data.val_fraction=0.2", "train.epochs=3"))
    trainer.fit()
    events = read_events(trainer.folder)
    assert ("test/oa", 2) in {(name, step) for name, step, _ in scalars(events)}
    assert_log_is_in(events, trainer.folder)
    metrics = json.loads(trainer.folder.metrics.read_text())
    final = {name: value for name, step, value in scalars(events) if name.startswith("final/") and step == 3}
    assert final == {
        f"final/{form}_{key}": pytest.approx(metrics[form][key])
        for form in ("sparse", "merged")
        for key in ("oa", "macc")
    }
    steps = {name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]}
    assert steps == {"confusion/test": [1, 2], "confusion/sparse": [3], "confusion/merged": [3]}
    assert events.Images("confusion/merged")[0].encoded_image_string.startswith(b"\x89PNG")

    correct = metrics["merged"]["correct"]
    assert {"0", "1"} == set(correct)
    dataset = trainer.data.test.dataset
    for kind, digit in (("wrong", "0"), ("right", "1")):
        chosen = [index for index, hit in enumerate(correct) if hit == digit][:CLOUDS]
        points, _ = dataset.batch(torch.tensor(chosen), augment=False)
        vertices, colors = mesh(events, f"clouds/{kind}")
        x, y, z = np.moveaxis(vertices, -1, 0)  # y up
        assert np.array_equal(np.stack([x, -z, y], -1), points.numpy())
        assert vertices.shape == colors.shape and len(np.unique(colors.reshape(-1, 3), axis=0)) == 1


def test_a_killed_and_resumed_run_has_each_epoch_once(tiny_config, tmp_path):
    config = tiny_config("log.tensorboard=true", "train.epochs=3", "train.max_steps=6")
    trainer = Trainer(config)
    trainer.fit()
    early = shutil.copy(trainer.folder.last, tmp_path / "early.pt")
    # The process goes on, logs epoch 2, and is killed before a checkpoint of them is there.
    Trainer(tiny_config("log.tensorboard=true", "train.epochs=3", "train.max_steps=13")).fit(resume=trainer.folder.last)
    assert ("train/loss", 2) in {(name, step) for name, step, _ in scalars(read_events(trainer.folder))}
    shutil.copy(early, trainer.folder.last)
    Trainer(tiny_config("log.tensorboard=true", "train.epochs=3")).fit(resume=trainer.folder.root)
    assert len(list((trainer.folder.root / "tensorboard").iterdir())) == 3
    assert_log_is_in(read_events(trainer.folder), trainer.folder)

    # Another folder gets the whole history; a new run in the old one nothing of it.
    elsewhere = tiny_config("log.tensorboard=true", "train.epochs=3", f"output_dir={tmp_path / 'elsewhere'}")
    second = Trainer(elsewhere)
    second.fit(resume=early)
    assert_log_is_in(read_events(second.folder), second.folder)
    Trainer(tiny_config("train.epochs=1", "optim.warmup_epochs=0"), force=True).fit()
    assert list((trainer.folder.root / "tensorboard").iterdir()) == []


FAKE_WANDB = """
import json
from pathlib import Path

CALLS = []


class Image:
    def __init__(self, figure):
        self.title = figure.axes[0].get_title()


class Object3D:
    def __init__(self, array):
        self.shape = array.shape


class Run:
    def __init__(self, id):
        self.id, self.summary = id, {}

    def log(self, values, step):
        CALLS.append((self.id, step, values))

    def finish(self):
        CALLS.append((self.id, None, self.summary))


def init(id=None, **arguments):
    CALLS.append(("init", id, arguments))
    return Run(id or "generated")
"""


def test_wandb_gets_rows_results_and_the_same_run_on_resume(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    folder = Trainer(tiny_config("log.wandb=clouds", "train.max_steps=7")).fit().parent.parent
    trainer = Trainer(tiny_config("log.wandb=clouds"))
    trainer.fit(resume=folder)

    calls = sys.modules.pop("wandb").CALLS  # popped: monkeypatch would put the fake back for the tests that follow
    (_, first, arguments), (_, second, _) = (call for call in calls if call[0] == "init")
    assert (first, second) == (None, "generated")
    assert arguments["project"] == "clouds" and arguments["config"]["model"]["name"] == "point_bert_tiny"
    assert {call[0] for call in calls} == {"init", "generated"}
    rows = [(step, values) for name, step, values in calls if name == "generated" and "train_loss" in values]
    sent = {(key, step): value for step, values in rows for key, value in values.items() if key != "epoch"}
    assert sent == {key: pytest.approx(value, rel=1e-5) for key, value in log_csv(trainer.folder).items()}
    metrics = json.loads(trainer.folder.metrics.read_text())
    assert calls[-1][1] is None and calls[-1][2]["merged_oa"] == metrics["merged"]["oa"]
    media = {key: value for _, step, values in calls if step == 2 for key, value in values.items()}
    assert "OA" in media["confusion/merged"].title
    assert {item.shape for item in media["clouds/wrong"]} == {(128, 6)}


def wandb_records(path):
    """Return the records of an offline run: its file is a log in LevelDB's format behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, records = path.read_bytes(), 7, [], []
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # no place for the head of a part
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    assert not parts and records, "the file is complete"
    return records


def test_an_offline_run_of_the_real_wandb_holds_the_log(tiny_config, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONSOLE", "off"), ("DISABLE_GIT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = Trainer(tiny_config("log.wandb=clouds", "eval.every=1"))
    trainer.fit()
    wandb.teardown()
    (path,) = trainer.folder.root.glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(path)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert run.project == "clouds" and run.run_id == json.loads((trainer.folder.root / "wandb.json").read_text())["id"]
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in run.config.update}
    assert config["model"]["name"] == "point_bert_tiny"

    values = {}
    for record in records:
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        values |= {(key, row["_step"]): value for key, value in row.items()}
    sent = {at: value for at, value in values.items() if not at[0].startswith("_") and "/" not in at[0]}
    expected = log_csv(trainer.folder) | {("epoch", epoch): epoch for epoch in (1, 2)}
    assert sent == {at: pytest.approx(value, rel=1e-5) for at, value in expected.items()}
    assert ("test_oa", 1) in sent and ("train_loss", 2) in sent
    confusion = path.parent / "files" / values["confusion/merged/path", 2]
    assert values["confusion/merged/_type", 2] == "image-file" and confusion.read_bytes().startswith(b"\x89PNG")
    clouds = [path.parent / "files" / "media" / "object3D" / name for name in values["clouds/wrong/filenames", 2]]
    assert len(clouds) == CLOUDS and all(len(json.loads(cloud.read_text())) == 128 for cloud in clouds)
    summary = {}
    for record in records:
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    metrics = json.loads(trainer.folder.metrics.read_text())
    assert summary["merged_oa"] == pytest.approx(metrics["merged"]["oa"])


@pytest.mark.parametrize(
    "override, module, command",
    [
        ("log.tensorboard=true", "torch.utils.tensorboard", 'pip install "s2d3d[tensorboard]"'),
        ("log.wandb=clouds", "wandb", 'pip install "s2d3d[wandb]"'),
    ],
)
def test_a_missing_package_is_named_before_anything_is_done(tiny_config, monkeypatch, override, module, command):
    monkeypatch.setitem(sys.modules, module, None)  # what Python itself does to forbid an import
    config = tiny_config(override, "data.root=nowhere")
    with pytest.raises(InputError) as error:
        Trainer(config).fit()
    key = override.partition("=")[0]
    package = key.removeprefix("log.")
    assert str(error.value).startswith(f"{key} needs {package} (") and str(error.value).endswith(f"): {command}")
    assert "\n" not in str(error.value)
    assert not Trainer(config).folder.root.exists()


def test_a_folder_named_wandb_is_not_the_package(tiny_config, tmp_path, monkeypatch):
    """W&B itself leaves such a folder in the working directory, and Python imports it as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match=r"^log\.wandb needs wandb \(only a folder named wandb is here\): pip install"):
        Trainer(tiny_config("log.wandb=clouds")).fit()
    sys.modules.pop("wandb", None)
