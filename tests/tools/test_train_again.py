"""tools/train.py --resume without a config, --extend, and short trials of a long recipe."""

import shutil

import pytest
import torch
import yaml
from weights import weights

from s2d3d import Trainer, load_config
from s2d3d.config.load import dump_config


def test_resume_needs_nothing_but_the_folder(tiny_config, tool, tmp_path, monkeypatch):
    config = tiny_config("train.max_steps=7")
    Trainer(config).fit()
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(config.output_dir, moved)
    monkeypatch.chdir(moved.parent)
    assert tool("train").main(["--resume", "moved", "~train.max_steps"]) == 0
    Trainer(tiny_config(f"output_dir={tmp_path / 'whole'}")).fit()
    ours, whole = weights(moved / "merged.pt"), weights(tmp_path / "whole" / "merged.pt")
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_constant_schedules_can_be_extended_to_the_run_of_that_length(tiny_config, tool, tmp_path):
    constant = ("optim.schedule=constant", "s2d.schedule=constant")
    short = tiny_config(*constant, f"output_dir={tmp_path / 'short'}")
    Trainer(short).fit()
    assert tool("train").main(["--resume", short.output_dir, "--extend", "3"]) == 0
    Trainer(tiny_config(*constant, "train.epochs=3", f"output_dir={tmp_path / 'long'}")).fit()
    ours, whole = (weights(tmp_path / name / "merged.pt") for name in ("short", "long"))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_a_routed_run_whose_averaging_rises_has_no_constant_schedule(tiny_config, tool, capsys):
    """Its experts are averaged as well, by a rate that depends on the number of epochs."""
    config = tiny_config("optim.schedule=constant", "s2d.kind=topk", "s2d.schedule=linear", "train.epochs=2")
    Trainer(config).fit()
    assert tool("train").main(["--resume", config.output_dir, "--extend", "3"]) == 1
    assert "its schedule ends with epoch 2" in capsys.readouterr().err


def test_other_schedules_name_the_way(tiny_config, tool, capsys):
    config = tiny_config()
    Trainer(config).fit()
    assert tool("train").main(["--resume", config.output_dir, "--extend", "5"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its schedule ends with epoch 2, so it cannot go on to 5" in line
    assert f"model.pretrained={config.output_dir}/merged.pt" in line and "train.epochs=3" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["seed=3"], "error: CONFIG: is missing; name a YAML file, see configs/, or a run by --resume RUN"),
        (["--extend", "3", "configs/demo.yaml"], "error: --extend: is for a run that is continued"),
        (["--resume", "nowhere"], "error: nowhere: no such checkpoint to resume from"),
    ],
)
def test_what_is_missing_is_named(tool, capsys, arguments, message):
    assert tool("train").main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_a_short_trial_needs_one_override(repository, caplog):
    path = repository / "configs" / "modelnet_s2d.yaml"
    assert load_config(path, ["train.epochs=1"]).optim.warmup_epochs == 0.5
    assert "optim.warmup_epochs: 10 leaves nothing of 1 epochs; cut to 0.5" in caplog.text
    assert load_config(path, ["train.epochs=20"]).optim.warmup_epochs == 10
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs"):
        load_config(path, ["train.epochs=1", "optim.warmup_epochs=10"])


def test_keys_of_another_model_are_removed_by_name(tiny_config, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(tiny_config()))
    keys = [key for key in yaml.safe_load(path.read_text())["model"] if not key.startswith(("name", "pretrained"))]
    with pytest.raises(ValueError, match=r"unknown key.*; remove it by ~model\.depth"):
        load_config(path, ["model.name=point_transformer_tiny", "s2d.kind=none"])
    config = load_config(
        path, ["model.name=point_transformer_tiny", "s2d.kind=none", *(f"~model.{key}" for key in keys)]
    )
    assert config.model.name == "point_transformer_tiny"
    with pytest.raises(ValueError, match=r"^override '~model\.width': the config has no such key to remove"):
        load_config(path, ["~model.width"])
