"""Files that a model was trained on are not scored: in no format, and in no model that began with it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from s2d3d import PointCloudClassifier, create_model, load_checkpoint, load_pretrained_, save_checkpoint
from s2d3d.console import main
from s2d3d.errors import InputError
from s2d3d.unpickle import file_numbers

TINY = (
    "data.root=scans", "data.num_points=64", "model.name=point_bert_tiny", "model.depth=2", "model.trans_dim=24",
    "model.num_heads=2", "model.num_group=8", "model.group_size=8", "model.encoder_dims=24", "model.encoder_width=16",
    "train.epochs=1", "train.batch_size=4", "optim.warmup_epochs=0", "log.report=false",
)  # fmt: skip
REFUSAL = r"error: scans: 4 of its 4 test files were trained on by {}[,;] "
OTHER = "data.split_seed=1"
"""All its 4 test files are training files of the default split."""


def write_scans(root, count=10, first=0):
    for name, size in (("ball", (1, 1, 1)), ("rod", (0.1, 0.1, 2))):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, count):
            rng = np.random.default_rng([index, len(name)])
            np.savetxt(root / name / f"{index}.xyz", rng.normal(size=(80, 3)) * size)


@pytest.fixture(scope="module")
def home(tmp_path_factory, repository):
    """A folder with scans and the run `runs/a` on them."""
    root = tmp_path_factory.mktemp("trained_files")
    write_scans(root / "scans")
    (root / "configs").symlink_to(repository / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert train("output_dir=runs/a") == 0
    return root


@pytest.fixture(autouse=True)
def inside(home, monkeypatch):
    monkeypatch.chdir(home)


def train(*overrides, config="files.yaml", command="train"):
    return main([command, f"configs/{config}", *TINY, *overrides])


def evaluate(path, *rest):
    return main(["evaluate", "--checkpoint", str(path), *rest])


@pytest.mark.parametrize("kind", ["onnx", "hub", "safetensors", "copy"])
def test_every_format_that_is_scored_refuses_them(kind, home, tmp_path, capsys):
    path = {"onnx": "m.onnx", "hub": "hub", "safetensors": "m.safetensors", "copy": "m.pt"}[kind]
    path = tmp_path / path
    if kind in ("onnx", "hub"):
        more = ["--format", "hub"] if kind == "hub" else ["--clouds", "2"]
        assert main(["export", "--checkpoint", "runs/a/merged.pt", "--output", str(path), *more]) == 0
    elif kind == "safetensors":
        assert main(["merge", "--checkpoint", "runs/a/checkpoints/last.pt", "--output", str(path)]) == 0
    else:
        save_checkpoint(path, load_checkpoint("runs/a/merged.pt"))
    capsys.readouterr()
    assert evaluate(path, "data.root=scans") == 0
    said = capsys.readouterr()
    assert "(4 samples)" in said.out and said.err == ""
    for more in ([], ["--corruption", "all"]):
        assert evaluate(path, "data.root=scans", OTHER, *more) == 1
        assert re.match(REFUSAL.format(re.escape(str(path))), capsys.readouterr().err)


def test_a_page_for_browsers_does_not_list_them(home, tmp_path, tool, monkeypatch):
    """Its model does, so that it is not scored on them."""
    from s2d3d.export.web import FACTS, MODEL

    monkeypatch.setattr("s2d3d.export.web.find_runtime", lambda given: {})
    command = ["export", "--checkpoint", "runs/a/merged.pt", "--format", "web", "--clouds", "2"]
    assert main([*command, "--output", str(tmp_path / "site")]) == 0
    assert "trained_files" not in json.loads((tmp_path / "site" / FACTS).read_text())
    assert evaluate(tmp_path / "site" / MODEL, "data.root=scans", OTHER) == 1


def test_what_is_no_list_of_files_is_refused(home, tmp_path, capsys):
    for bad in ([0.5], [2**63], "files", {"a": 1}, [[1]], [True], torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64)):
        assert file_numbers(bad) is None
    classifier = PointCloudClassifier.from_checkpoint("runs/a/merged.pt")
    classifier.description["trained_files"] = [2**63]
    classifier.save_pretrained(tmp_path / "hub")
    assert evaluate(tmp_path / "hub", "data.root=scans") == 1
    assert "its trained_files cannot be what s2d3d wrote" in capsys.readouterr().err
    payload = load_checkpoint("runs/a/merged.pt") | {"trained_files": torch.zeros(3)}
    save_checkpoint(tmp_path / "bad.pt", payload)
    model = create_model("point_bert_tiny", num_classes=2, **payload["model"]["kwargs"])
    with pytest.raises(InputError, match=r"bad\.pt: its trained_files cannot be what s2d3d wrote$"):
        load_pretrained_(model, tmp_path / "bad.pt")


def test_an_older_checkpoint_says_that_it_does_not_know(home, tmp_path, capsys):
    payload = load_checkpoint("runs/a/merged.pt")
    del payload["trained_files"]
    save_checkpoint(tmp_path / "old.pt", payload)
    said = f"{tmp_path}/old.pt: does not say on which files it was trained, as older ones; some may be among these\n"
    for rest in ([OTHER], ["--files", "scans"]):
        assert evaluate(tmp_path / "old.pt", *rest) == 0
        assert capsys.readouterr().err.endswith(said)
    assert train("output_dir=runs/from_old", f"model.pretrained={tmp_path}/old.pt") == 0
    assert said in capsys.readouterr().err


def test_a_model_that_begins_with_another_inherits_its_files(home, tmp_path, capsys):
    for start in ("runs/a", "runs/a/merged.pt"):
        assert train("output_dir=runs/b", f"model.pretrained={start}", OTHER) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.match(REFUSAL.format(f"{start}, the file of model.pretrained"), error)
        assert error.endswith("; or remove model.pretrained")
    assert main(["export", "--checkpoint", "runs/a/merged.pt", "--format", "hub", "--output", "hub"]) == 0
    for start in ("hub", "hub/model.safetensors"):
        assert train("output_dir=runs/b", f"model.pretrained={start}", OTHER) == 1
        assert "4 of its 4 test files were trained on by hub" in capsys.readouterr().err
    assert train("output_dir=runs/b", "model.pretrained=hub", OTHER, "data.val_fraction=0.25", "eval.split=test") == 1
    # Another folder, then one that begins with that: the first run's files are still known.
    write_scans(tmp_path / "more", count=20, first=10)
    assert train("output_dir=runs/c", "model.pretrained=runs/a", f"data.root={tmp_path}/more", "train.max_steps=1") == 0
    assert main(["train", "--resume", "runs/c", "~train.max_steps"]) == 0, "the file is not read again"
    assert train("output_dir=runs/d", "model.pretrained=runs/c", f"data.root={tmp_path}/more") == 0
    first = load_checkpoint("runs/a/merged.pt")["trained_files"]
    for name in ("c", "d"):
        for file in ("merged.pt", "checkpoints/last.pt"):
            known = load_checkpoint(f"runs/{name}/{file}")["trained_files"]
            assert len(known) == 32 and torch.isin(first, known).all(), (name, file)
    capsys.readouterr()
    assert evaluate("runs/d/merged.pt", "data.root=scans", OTHER) == 1
    assert re.match(REFUSAL.format("runs/d/merged.pt"), capsys.readouterr().err)


def test_a_grown_folder_is_trained_on_where_its_test_files_are_new(home, tmp_path, capsys):
    write_scans(tmp_path / "scans" / "train")
    write_scans(tmp_path / "scans" / "test", count=14, first=10)
    assert train("output_dir=runs/grown", "model.pretrained=runs/a", f"data.root={tmp_path}/scans") == 0
    assert "trained on by" not in capsys.readouterr().err
    assert len(load_checkpoint("runs/grown/merged.pt")["trained_files"]) == 20


def test_files_held_out_to_validate_are_not_trained_on(home, capsys):
    held = ("data.val_fraction=0.25", "eval.split=validation")
    assert train("output_dir=runs/v", *held) == 0
    assert len(load_checkpoint("runs/v/merged.pt")["trained_files"]) == 12
    assert train("output_dir=runs/w", "model.pretrained=runs/v", *held) == 0, "the same files"
    assert main(["report", "runs/w", "--output", "w.html"]) == 0
    capsys.readouterr()
    assert train("output_dir=runs/x", "model.pretrained=runs/v", *held, "seed=1") == 0
    assert re.search(r"scans: \d of its 4 validation files were trained on by runs/v\n", capsys.readouterr().err)


def test_a_pre_training_has_seen_no_labels(home, capsys):
    setting = ("model.name=point_mae_pretrain", "data.name=files", "model.decoder_depth=1", "model.decoder_num_heads=2")
    assert train("output_dir=runs/p", *setting, config="pretrain_mae_small.yaml", command="pretrain") == 0
    capsys.readouterr()
    assert train("output_dir=runs/q", "model.name=point_mae", "model.pretrained=runs/p", OTHER) == 0
    assert "4 of its 4 test files were trained on by runs/p, without their labels" in capsys.readouterr().err
    assert len(load_checkpoint("runs/q/merged.pt")["trained_files"]) == 16
    assert evaluate("runs/q/merged.pt") == 0
    capsys.readouterr()
    assert main(["linear-probe", "--checkpoint", "runs/p/merged.pt", OTHER]) == 0
    assert "4 of its 4 test files were trained on by runs/p/merged.pt, without" in capsys.readouterr().err


def test_an_export_needs_no_files_that_are_new(home, tmp_path, capsys):
    output = ["--output", str(tmp_path / "m.onnx"), "--clouds", "2"]
    assert main(["export", "--checkpoint", "runs/a/merged.pt", *output, OTHER]) == 0, "nothing is scored"


@pytest.mark.parametrize("kind", ["pt", "onnx"])
def test_scored_files_that_were_trained_on_are_counted(kind, home, tmp_path, capsys):
    path = "runs/a/merged.pt"
    if kind == "onnx":
        path = str(tmp_path / "m.onnx")
        assert main(["export", "--checkpoint", "runs/a/merged.pt", "--output", path, "--clouds", "2"]) == 0
    new = tmp_path / "new"
    write_scans(new, count=12, first=10)
    capsys.readouterr()
    assert evaluate(path, "--files", str(new)) == 0
    assert capsys.readouterr().err == ""
    (new / "ball" / "part1").mkdir()
    for file in (home / "scans" / "ball").iterdir():
        shutil.copyfile(file, new / "ball" / "part1" / f"renamed_{file.name}")
    assert evaluate(path, "--files", str(new)) == 0
    said = capsys.readouterr()
    assert "(14 samples)" in said.out
    assert said.err.endswith(f"8 of these 14 files were trained on by {path}; this is not its accuracy on new files\n")


@pytest.mark.parametrize("folder", ["Ball", "BALL/part1", "bal"])
def test_a_folder_that_is_nearly_a_class_gets_a_hint(folder, home, tmp_path, capsys):
    write_scans(tmp_path, count=1)
    (tmp_path / "mine" / folder).mkdir(parents=True)
    (tmp_path / "ball" / "0.xyz").rename(tmp_path / "mine" / folder / "0.xyz")
    assert evaluate("runs/a/merged.pt", "--files", str(tmp_path / "mine")) == 1
    assert capsys.readouterr().err.endswith("is none of the 2 classes of runs/a/merged.pt; did you mean 'ball'?\n")
