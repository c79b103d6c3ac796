"""The callback of the Hugging Face Trainer, against the real one: real updates, resuming, merged models."""

import doctest
import importlib
import json
import shutil
import sys

import pytest
import torch
from cases import quick
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from s2d3d import MoFConfig, convert_to_mof_, is_sparse, merge_experts
from s2d3d.errors import InputError
from tests.integrations.recorder import Recorder


@pytest.fixture(scope="module")
def hf():
    """Return the models, data and trainers; they load transformers."""
    return importlib.import_module("tests.integrations.small_transformers")


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    """An uninterrupted training in bfloat16, its schedule, and the folder of its checkpoints."""
    folder, recorder = tmp_path_factory.mktemp("whole"), hf.Recorder()
    trainer = hf.trainer_of(
        folder, callbacks=[hf.S2DCallback(share_rate=0.5, schedule=recorder)], bf16=True, save_steps=3
    )
    trainer.train()
    return trainer, recorder, folder


def test_each_update_is_followed_once(hf, whole):
    trainer, recorder, _ = whole
    assert trainer.state.global_step == hf.UPDATES and recorder.ts == list(range(hf.UPDATES))


def test_the_default_schedule_spans_the_training(hf, tmp_path):
    callback = hf.S2DCallback(share_rate=0.5, merge_at_end=False)
    trainer = hf.trainer_of(tmp_path, callbacks=[callback], save_strategy="no")
    trainer.train()
    ewa = callback._averaging.ewa
    assert ewa.total_steps == ewa.num_steps == hf.UPDATES and ewa.last_share_rate() == 0.5
    assert is_sparse(trainer.model)
    trainer.train()
    assert callback.num_steps == hf.UPDATES, "a second training begins at 0 again"


def test_resumed_equals_uninterrupted(hf, whole, tmp_path):
    """From the middle of an epoch."""
    callbacks = [hf.S2DCallback(share_rate=0.5, schedule=hf.Recorder()), hf.Stop(2)]
    stopped = hf.trainer_of(tmp_path, callbacks=callbacks, bf16=True, save_steps=2)
    stopped.train()
    recorder = hf.Recorder()
    callbacks = [hf.S2DCallback(share_rate=0.5, schedule=recorder)]
    resumed = hf.trainer_of(tmp_path, callbacks=callbacks, bf16=True, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert recorder.ts == [2, 3, 4, 5]
    assert torch.equal(hf.weights(resumed.model), hf.weights(whole[0].model))


def test_states_restored_by_the_trainer_do_not_matter(hf, tmp_path):
    """`restore_callback_states_from_checkpoint` builds the callback anew from what the checkpoint holds."""
    callbacks = [hf.S2DCallback(share_rate=0.25, stop_fraction=0.5), hf.Stop(2)]
    hf.trainer_of(tmp_path, callbacks=callbacks, save_steps=2).train()
    resumed = hf.trainer_of(
        tmp_path, callbacks=[hf.S2DCallback(share_rate=0.5)], restore_callback_states_from_checkpoint=True,
        save_strategy="no",
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (callback,) = (one for one in resumed.callback_handler.callbacks if isinstance(one, hf.S2DCallback))
    ewa = callback._averaging.ewa
    assert (ewa.num_steps, ewa.share_rate, ewa.stop_step) == (hf.UPDATES, 0.25, 3)


@pytest.mark.parametrize("optim", quick(1, ["adamw_torch", "adamw_torch_fused"]))
def test_skipped_steps_are_left_out_and_resumed_as_such(hf, optim, tmp_path):
    """`global_step` counts them, EWA does not. A fused optimizer is called even then."""

    def run(folder, *callbacks, resume=None, **saving):
        recorder = hf.Recorder()
        trainer = hf.trainer_of(
            folder, callbacks=[hf.S2DCallback(share_rate=0.5, schedule=recorder), *callbacks], data=hf.images(bad=3),
            optim=optim, max_grad_norm=0.0, train_sampling_strategy="sequential", **saving,
        )  # fmt: skip
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder.ts

    plain, ts = run(tmp_path / "plain", save_strategy="no")
    assert plain.state.global_step == hf.UPDATES and ts == [0, 1, 2, 3], "image 3 spoils the first update of each epoch"
    assert bool(torch.isfinite(hf.weights(plain.model)).all())
    run(tmp_path / "stopped", hf.Stop(3), save_steps=3)
    checkpoint = str(tmp_path / "stopped" / "checkpoint-3")
    resumed, ts = run(tmp_path / "stopped", resume=checkpoint, save_strategy="no")
    assert ts == [2, 3]
    assert torch.equal(hf.weights(resumed.model), hf.weights(plain.model))


# Merged models


def test_the_model_is_merged_at_the_end_and_saved_dense(hf, whole, tmp_path):
    trainer, _, _ = whole
    assert not is_sparse(trainer.model)
    trainer.save_model(str(tmp_path))
    stock, told = hf.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(hf.weights(stock), hf.weights(trainer.model))


@pytest.mark.parametrize("place", ["", "merged"])
def test_a_checkpoint_loads_as_the_merged_model(hf, place, whole, tmp_path):
    _, _, folder = whole
    checkpoint = folder / "checkpoint-3"
    stock, told = hf.ViTForImageClassification.from_pretrained(checkpoint / place, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    resumed = hf.trainer_of(tmp_path, callbacks=[hf.S2DCallback(share_rate=0.5), hf.Stop(3)], max_steps=hf.UPDATES)
    resumed._load_from_checkpoint(str(checkpoint))
    assert is_sparse(resumed.model), "the weights that the Trainer resumes from"
    assert torch.equal(hf.weights(merge_experts(resumed.model)), hf.weights(stock))
    stock.save_pretrained(tmp_path / "again")
    again = hf.ViTForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(hf.weights(again), hf.weights(stock)), "the redirection is not saved with the loaded model"


def test_without_the_redirection_a_checkpoint_would_not_load(hf, whole, tmp_path):
    """What the entry in config.json is for."""
    shutil.copytree(whole[2] / "checkpoint-3", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert config.pop("transformers_weights") == "merged/model.safetensors"
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        hf.ViTForImageClassification.from_pretrained(tmp_path / "bare")


def test_bert_whose_experts_have_other_names_loads_merged_too(hf, tmp_path):
    """Its FFNs are two separate layers, which a plain load of the sparse weights would start at random."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    convert_to_mof_(model, MoFConfig(targets=("*.layer.*",), init_noise=0.5))
    model.save_pretrained(tmp_path)
    _, told = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert any("intermediate.dense" in key for key in told["missing_keys"]), "random, with a warning only"
    hf.save_merged(model, tmp_path)
    stock, told = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(hf.weights(stock), hf.weights(merge_experts(model)))


class Plain(nn.Module):
    """A model that is not of the library, with tied weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(6, 2, 12, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, x, labels=None):
        logits = self.embed(x)
        for block in self.blocks:
            logits = block(logits)
        logits = self.head(logits).mean(1)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_of_other_origin_is_saved_as_a_state_dict(hf, tmp_path):
    model = Plain()
    convert_to_mof_(model, MoFConfig(targets=("blocks.*",), init_noise=0.5))
    (tmp_path / "checkpoint-1").mkdir()
    path = hf.save_merged(model, tmp_path / "checkpoint-1")
    assert path == tmp_path / "checkpoint-1" / "merged"
    stock = Plain()
    load_model(stock, path / "model.safetensors", strict=True)
    assert torch.equal(hf.weights(stock), hf.weights(merge_experts(model)))


# Refusals


def test_a_checkpoint_written_without_the_callback_is_refused(hf, tmp_path):
    hf.trainer_of(tmp_path, callbacks=[hf.Stop(2)], save_steps=2).train()
    resumed = hf.trainer_of(tmp_path, callbacks=[hf.S2DCallback(share_rate=0.5)])
    with pytest.raises(InputError, match="step 2 was written without S2DCallback"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_that_the_trainer_did_not_load_is_refused(hf, tmp_path):
    """The Trainer only warns of missing keys."""
    hf.trainer_of(tmp_path, callbacks=[hf.S2DCallback(share_rate=0.5), hf.Stop(1)]).train()
    checkpoint = tmp_path / "checkpoint-1"
    kept = {name: value for name, value in load_file(checkpoint / "model.safetensors").items() if "norm" not in name}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="does not have the weights that were saved at step 1"):
        hf.trainer_of(tmp_path, callbacks=[hf.S2DCallback(share_rate=0.5)]).train(
            resume_from_checkpoint=str(checkpoint)
        )


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        ("dense", {}, "S2DCallback: the model has no RUP-MoF layer"),
        ("topk", {}, "top-k experts cannot be merged"),
        ("sparse", {"share_rate": 0.9}, r"share_rate is 0.9: above \(K-1\)/K"),
        ("sparse", {"schedule": "cubic"}, "schedule is 'cubic'"),
        ("sparse", {"count": 2}, "several S2DCallback"),
        (
            "sparse",
            {"schedule": Recorder(), "restore_callback_states_from_checkpoint": True},
            "schedule that is a func",
        ),
        ("sparse", {"push_to_hub": True}, "set hub_strategy='end'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_the_first_update(hf, model, settings, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    arguments = {"share_rate": 0.5, **{key: settings[key] for key in ("share_rate", "schedule") if key in settings}}
    others = {key: value for key, value in settings.items() if key not in ("share_rate", "schedule", "count")}
    callbacks = [hf.S2DCallback(**arguments) for _ in range(settings.get("count", 1))]
    trainer = hf.trainer_of(tmp_path / "run", getattr(hf, model)(), callbacks=callbacks, **others)
    before = hf.weights(trainer.model).clone()
    with pytest.raises(InputError, match=expected):
        trainer.train()
    assert torch.equal(hf.weights(trainer.model), before)


def test_the_examples_of_the_module(hf):
    failed, tried = doctest.testmod(sys.modules["s2d3d.integrations.transformers"])
    assert tried and not failed
