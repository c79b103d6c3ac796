"""Fine-tuning: a run that starts from a checkpoint, with and without experts."""

import logging

import numpy as np
import pytest
import torch
from reference import draw_weights_
from weights import assert_same_weights

from s2d3d import Trainer, create_model, load_checkpoint, load_model
from s2d3d.config.load import dump_config, parse_config
from s2d3d.errors import InputError
from s2d3d.evaluation import batchnorm


def start_of(trainer):
    """Return the weights that a run started from; it has saved twice, before the first update and at its end."""
    return load_checkpoint(trainer.folder.previous)["state_dict"]


@pytest.fixture
def published(tiny_config, tmp_path):
    """Write a checkpoint in the published layout that fits the tiny model; return its path and its weights."""

    def write(num_classes=12, config=None):
        config = config or tiny_config()
        model = draw_weights_(create_model(config.model.name, num_classes=num_classes, **config.model.kwargs), seed=3)
        path = tmp_path / "published.pth"
        weights = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"base_model": weights, "epoch": 299, "metrics": {"acc": np.float64(93.2)}}, path)
        return path, model.state_dict()

    return write


def test_dense_training_starts_from_the_file(tiny_config, published, caplog):
    path, weights = published()
    trainer = Trainer(tiny_config("s2d.kind=none", f"model.pretrained={path}", "train.max_steps=1"))
    with caplog.at_level(logging.INFO):
        trainer.fit()
    assert_same_weights(start_of(trainer), weights)
    lines = [record.message for record in caplog.records if "tensors loaded" in record.message]
    (line,) = lines
    total = len(weights)
    assert line.startswith(f"{path}: {total} of the model's {total} tensors loaded; taken as trained z up")


def test_experts_start_as_copies_of_the_pretrained_ffn(tiny_config, published):
    path, weights = published()
    trainer = Trainer(tiny_config(f"model.pretrained={path}", "train.max_steps=1"))
    trainer.fit()
    assert trainer.parts.converted == ["blocks.blocks.1.mlp"]
    for key, value in start_of(trainer).items():
        if key.startswith("blocks.blocks.1.mlp."):
            assert len(value) == 4
            for expert in value:
                assert torch.equal(expert.t() if expert.dim() == 2 else expert, weights[key]), key
        else:
            assert torch.equal(value, weights[key]), key


def test_a_head_for_other_classes_starts_as_without_the_file(tiny_config, published, tmp_path):
    fresh = Trainer(tiny_config("train.max_steps=1", f"output_dir={tmp_path / 'fresh'}"))
    fresh.fit()
    path, weights = published(num_classes=5)
    tuned = Trainer(tiny_config(f"model.pretrained={path}", "train.max_steps=1"))
    tuned.fit()
    for key in ("cls_head_finetune.3.weight", "cls_head_finetune.3.bias"):
        assert torch.equal(start_of(tuned)[key], start_of(fresh)[key]), key
    assert torch.equal(start_of(tuned)["cls_head_finetune.0.weight"], weights["cls_head_finetune.0.weight"])
    assert not torch.equal(start_of(fresh)["cls_head_finetune.0.weight"], weights["cls_head_finetune.0.weight"])


def test_resume_and_merged_model_do_not_need_the_file(tiny_config, published, tmp_path):
    path, _ = published()
    pretrained = f"model.pretrained={path}"
    whole = Trainer(tiny_config(pretrained, f"output_dir={tmp_path / 'whole'}"))
    whole.fit()
    stopped = Trainer(tiny_config(pretrained, "train.max_steps=8"))
    stopped.fit()
    path.unlink()
    resumed = Trainer(tiny_config(pretrained))
    merged = resumed.fit(resume=stopped.folder.root)
    assert_same_weights(load_checkpoint(merged)["state_dict"], load_checkpoint(whole.folder.merged)["state_dict"])
    payload = load_checkpoint(merged)
    assert "pretrained" not in payload["model"]["kwargs"]
    assert payload["config"]["model"]["pretrained"] == str(path), "a run knows what it started from"
    assert load_model(merged)(torch.rand(2, 128, 3)).shape == (2, 12)
    assert parse_config(payload["config"], where="merged.pt").model.kwargs == payload["model"]["kwargs"]


def test_our_merged_model_is_a_start_too(tiny_config, tmp_path):
    first = Trainer(tiny_config("train.epochs=1", "optim.warmup_epochs=0", f"output_dir={tmp_path / 'first'}"))
    merged = first.fit()
    second = Trainer(tiny_config("s2d.kind=none", f"model.pretrained={merged}", "train.max_steps=1"))
    second.fit()
    assert_same_weights(start_of(second), load_checkpoint(merged)["state_dict"])


def test_weights_of_clouds_y_up_are_turned(tiny_config, published):
    path, weights = published()
    trainer = Trainer(tiny_config(f"model.pretrained={path}", "model.pretrained_up_axis=y", "train.max_steps=1"))
    trainer.fit()
    x, y, z = weights["pos_embed.0.weight"].unbind(1)
    assert torch.equal(start_of(trainer)["pos_embed.0.weight"], torch.stack([x, -z, y], dim=1))


def test_point_mae_is_fine_tuned_merged_and_recalibrated(tiny_config, published, monkeypatch):
    """Its head has BatchNorm behind the experts."""
    monkeypatch.setattr(batchnorm, "FORGOTTEN", 1.0)  # few updates are no reason
    overrides = ["model.name=point_mae", "model.encoder_dims=24"]
    path, weights = published(config=tiny_config(*overrides))
    trainer = Trainer(tiny_config(*overrides, f"model.pretrained={path}", "train.epochs=1", "optim.warmup_epochs=0"))
    merged = trainer.fit()
    assert torch.equal(start_of(trainer)["cls_head_finetune.5.running_var"], weights["cls_head_finetune.5.running_var"])
    assert set(trainer.reports) == {"sparse", "merged", "recalibrated"}
    assert load_checkpoint(merged)["state_dict"].keys() == weights.keys()
    last = load_checkpoint(trainer.folder.last)["state_dict"]
    for key, same in (("cls_head_finetune.1.running_mean", False), ("encoder.first_conv.1.running_mean", True)):
        assert torch.equal(load_checkpoint(merged)["state_dict"][key], last[key]) == same, key


@pytest.mark.parametrize(
    "content", [None, b"no checkpoint", {"foreign.weight": torch.ones(2)}], ids=["none", "text", "foreign"]
)
def test_a_file_that_cannot_be_loaded_is_one_line_and_no_run(tiny_config, tmp_path, tool, capsys, content):
    path = tmp_path / "published.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    config = tiny_config(f"model.pretrained={path}")
    with pytest.raises(InputError, match=r"published\.pth"):
        Trainer(config).fit()
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert tool("train").main([str(file)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and str(path) in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_named_before_data_is_read(tiny_config, tmp_path):
    config = tiny_config(f"model.pretrained={tmp_path / 'none.pth'}", f"data.root={tmp_path / 'no_data'}")
    with pytest.raises(InputError, match=r"^model\.pretrained: no such file .*none\.pth$"):
        Trainer(config).fit()


def test_experts_drawn_anew_are_refused_with_pretrained_weights(tiny_config):
    with pytest.raises(InputError, match=r"s2d\.init: must be 'copy' with model\.pretrained"):
        tiny_config("model.pretrained=a.pth", "s2d.init=independent")
    tiny_config("model.pretrained=a.pth", "s2d.init=independent", "s2d.kind=none")


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("pretraining") / "run"}


@pytest.fixture
def pretrained_run(tiny_pretraining, pretraining):
    """The folder of a finished pre-training with experts; it is trained once."""
    root = pretraining["root"]
    if not root.exists():
        Trainer(tiny_pretraining(f"output_dir={root}")).fit()
    return root


MAE = "model={name: point_mae}", "model.trans_dim=24", "model.encoder_dims=24", "model.depth=2", "model.num_heads=2"
MAE = *MAE, "model.num_group=12", "model.group_size=8", "model.encoder_width=8"


def test_a_run_folder_of_our_pre_training_is_taken_by_the_key_of_published_files(tiny_config, pretrained_run, caplog):
    trainer = Trainer(tiny_config(*MAE, f"model.pretrained={pretrained_run}", "train.max_steps=1"))
    with caplog.at_level(logging.INFO):
        trainer.fit()
    (line,) = [record.message for record in caplog.records if "tensors loaded" in record.message]
    encoder = load_checkpoint(pretrained_run / "merged.pt")["state_dict"]
    encoder = {key.removeprefix("MAE_encoder."): value for key, value in encoder.items() if "MAE_encoder" in key}
    start = start_of(trainer)
    assert line.startswith(
        f"{pretrained_run / 'merged.pt'}: {len(encoder)} of the model's {len(start)} tensors loaded; "
    )
    assert "left fresh, not in the file: cls_token, cls_pos, cls_head_finetune (16)" in line and "y up" not in line
    for key, value in encoder.items():
        ours = start[key]
        if ours.dim() == value.dim() + 1:  # experts are copies, stored transposed
            assert all(torch.equal(expert.t() if value.dim() == 2 else expert, value) for expert in ours), key
        else:
            assert torch.equal(ours, value), key


def test_an_unfinished_pre_training_or_a_classifier_is_refused(tiny_config, tiny_pretraining, published, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"model\.pretrained: .*empty holds no merged\.pt; finish its run"):
        Trainer(tiny_config(f"model.pretrained={tmp_path / 'empty'}")).fit()
    path, _ = published()
    with pytest.raises(InputError, match=r"published\.pth: holds a classifier, and a pre-training can only start"):
        Trainer(tiny_pretraining(f"model.pretrained={path}")).fit()


def test_a_frozen_backbone_keeps_its_weights_and_statistics(tiny_config, pretrained_run):
    frozen = "train.freeze=backbone", "s2d.kind=none", "optim.layer_decay=0.8", "train.ema_decay=0.5"
    trainer = Trainer(tiny_config(*MAE, *frozen, f"model.pretrained={pretrained_run}"))
    trainer.fit()
    start, end = start_of(trainer), load_checkpoint(trainer.folder.merged)["state_dict"]
    start = load_checkpoint(pretrained_run / "merged.pt")["state_dict"]
    kept = {key for key in end if f"MAE_encoder.{key}" in start}
    assert kept == {key for key in end if not key.startswith("cls")}
    assert all(torch.equal(end[key], start[f"MAE_encoder.{key}"]) for key in kept), "also after the re-estimation"
    fresh = load_model(trainer.folder.merged)
    assert float(fresh.cls_head_finetune[1].running_mean.abs().sum()) > 0, "the head's statistics are its own"
    with pytest.raises(InputError, match=r"train\.freeze: freezes blocks\.blocks\.1\.mlp, whose experts would stay"):
        Trainer(tiny_config(*MAE, "train.freeze=backbone"), force=True).fit()
    for inside in ("blocks.blocks.1.mlp.*", "blocks.*.fc1"):
        with pytest.raises(InputError, match=r"train\.freeze: freezes blocks\.blocks\.1\.mlp, whose experts would"):
            Trainer(tiny_config(*MAE, f"train.freeze={inside}"), force=True).fit()


def test_what_is_frozen_is_said(tiny_config, caplog):
    with caplog.at_level("INFO"):
        Trainer(tiny_config(*MAE, "train.freeze=encoder", "s2d.kind=none", "train.max_steps=1")).fit()
    assert "frozen: encoder; " in caplog.text and "parameters are trained" in caplog.text


def test_a_finished_pre_training_with_a_router_is_named(tiny_config, tmp_path):
    (tmp_path / "final.pt").touch()
    with pytest.raises(InputError, match=r"has a router, so it is not merged; pre-train with s2d\.kind: rup or none"):
        Trainer(tiny_config(f"model.pretrained={tmp_path}")).fit()


def test_a_file_of_this_package_is_not_turned(tiny_config, pretrained_run):
    with pytest.raises(InputError, match=r"merged\.pt: was trained on clouds z up; model\.pretrained_up_axis=y is for"):
        Trainer(tiny_config(*MAE, f"model.pretrained={pretrained_run}", "model.pretrained_up_axis=y")).fit()


def test_sizes_that_no_tensor_tells_are_compared(tiny_config, pretrained_run, caplog):
    stored = load_checkpoint(pretrained_run / "merged.pt")["model"]["kwargs"]
    other = f"model.group_size={2 * stored['group_size']}"
    with caplog.at_level("INFO"):
        Trainer(tiny_config(*MAE, other, f"model.pretrained={pretrained_run}", "train.max_steps=1")).fit()
    sizes = f"group_size is {2 * stored['group_size']}, not {stored['group_size']}"
    assert f"other sizes than the file's: {sizes};" in caplog.text
