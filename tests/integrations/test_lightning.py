"""The callback of Lightning, against the real one: real updates, resuming, the merged state dict."""

import doctest
import importlib
import sys
import warnings

import pytest
import torch

from s2d3d import is_sparse, merge_experts
from s2d3d.errors import InputError


@pytest.fixture(scope="module")
def lit():
    """Return the modules, data and trainers; they load Lightning."""
    return importlib.import_module("tests.integrations.small_lightning")


@pytest.mark.parametrize("validate", [False, True])
def test_it_trains_resumes_and_merges(lit, validate, tmp_path):
    path, whole, resumed = tmp_path / "merged.pt", lit.Recorder(), lit.Recorder()
    callback = lit.S2DCallback(share_rate=0.5, schedule=whole, merged_path=path)
    uninterrupted = lit.fit(tmp_path / "whole", callback, validate=validate, precision="bf16-mixed")
    assert whole.ts == list(range(lit.UPDATES)) and callback.num_steps == lit.UPDATES
    merged = torch.load(path, weights_only=True)

    save = lit.ModelCheckpoint(tmp_path / "stopped", save_last=True)
    stopped = lit.S2DCallback(share_rate=0.5, schedule=lit.Recorder())
    lit.fit(tmp_path, stopped, lit.Stop(), save, validate=validate, precision="bf16-mixed")
    assert stopped.num_steps == 3
    again = lit.fit(
        tmp_path, lit.S2DCallback(share_rate=0.5, schedule=resumed, merged_path=path), validate=validate,
        resume=tmp_path / "stopped" / "last.ckpt", precision="bf16-mixed",
    )  # fmt: skip
    assert resumed.ts == [3, 4, 5]
    assert torch.equal(lit.weights(again), lit.weights(uninterrupted))

    stock = lit.Classifier()
    stock.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert torch.equal(lit.weights(stock), lit.weights(merge_experts(again))) and is_sparse(again)
    assert all(torch.equal(merged[name], tensor) for name, tensor in stock.state_dict().items())


def test_the_default_schedule_spans_the_training_and_goes_on_with_the_trainer(lit, tmp_path):
    callback, module = lit.S2DCallback(share_rate=0.5), lit.sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lit.trainer_of(tmp_path, callback, enable_checkpointing=False)
        trainer.fit(module, lit.batches())
        ewa = callback._averaging.ewa
        assert ewa.total_steps == ewa.num_steps == lit.UPDATES and ewa.last_share_rate() == 0.5
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, lit.batches())
        assert (callback._averaging.ewa.total_steps, callback.num_steps) == (9, 9)
    lit.fit(tmp_path, callback, module=lit.sparse(), enable_checkpointing=False)
    assert callback.num_steps == lit.UPDATES, "a new training begins at 0"


def test_a_step_that_the_scaler_skips_is_not_an_update(lit, tmp_path):
    """The first batch of each epoch is infinite; Lightning's `global_step` counts its update."""
    from lightning.pytorch.plugins import MixedPrecision

    recorder, scaler = lit.Recorder(), torch.amp.GradScaler("cpu", init_scale=4.0)
    module = lit.fit(
        tmp_path, lit.S2DCallback(share_rate=0.5, schedule=recorder), data=lit.batches(factor=float("inf")),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], enable_checkpointing=False,
    )  # fmt: skip
    assert recorder.ts == [0, 1, 2, 3]
    assert module.trainer.global_step == lit.UPDATES and bool(torch.isfinite(lit.weights(module)).all())


def test_with_several_optimizers_it_follows_that_of_the_experts(lit, tmp_path):
    recorder = lit.Recorder()
    callback = lit.S2DCallback(share_rate=0.5, schedule=recorder, total_steps=4)
    lit.fit(tmp_path, callback, module=lit.sparse(lit.Manual), accumulate_grad_batches=1, enable_checkpointing=False)
    assert recorder.ts == [0, 1, 2, 3] and callback._averaging.ewa.total_steps == 4


def test_validating_a_checkpoint_leaves_the_random_state_alone(lit, tmp_path, monkeypatch):
    lit.fit(tmp_path, lit.S2DCallback(share_rate=0.5), lit.ModelCheckpoint(tmp_path, save_last=True))
    restored = []
    monkeypatch.setattr("s2d3d.integrations.lightning.set_rng_state", lambda *state: restored.append(state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lit.trainer_of(tmp_path, lit.S2DCallback(share_rate=0.5))
        trainer.validate(lit.sparse(), lit.batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert not restored
    lit.fit(tmp_path, lit.S2DCallback(share_rate=0.5), resume=tmp_path / "last.ckpt")
    assert len(restored) == 1


def test_a_checkpoint_written_without_the_callback_is_refused(lit, tmp_path):
    lit.fit(tmp_path, lit.Stop(), lit.ModelCheckpoint(tmp_path, save_last=True))
    with pytest.raises(InputError, match=r"last.ckpt: was written without S2DCallback"):
        lit.fit(tmp_path, lit.S2DCallback(share_rate=0.5), resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("module", "arguments", "settings", "expected"),
    [
        ("Classifier", {}, {}, "S2DCallback: the model has no RUP-MoF layer"),
        ("sparse", {"share_rate": 0.9}, {}, r"share_rate is 0.9: above \(K-1\)/K"),
        ("sparse", {}, {"max_epochs": -1}, "number of updates of this training is unknown; give total_steps"),
        ("sparse", {"merged_path": "no/such/folder/merged.pt"}, {}, "folder no/such/folder does not exist"),
    ],
)
def test_what_cannot_be_right_is_refused_before_the_first_update(lit, module, arguments, settings, expected, tmp_path):
    model = getattr(lit, module)()
    before = lit.weights(model).clone()
    with pytest.raises(InputError, match=expected):
        lit.fit(tmp_path, lit.S2DCallback(**{"share_rate": 0.5, **arguments}), module=model, **settings)
    assert torch.equal(lit.weights(model), before)


@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_weights_that_are_averaged_after_the_merge_are_refused(lit, kind, tmp_path):
    callbacks = importlib.import_module("lightning.pytorch.callbacks")
    if not hasattr(callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    averaging = getattr(callbacks, kind)(**({"swa_lrs": 0.1} if kind.startswith("S") else {"decay": 0.9}))
    own = lit.S2DCallback(share_rate=0.5, merged_path=tmp_path / "merged.pt")
    with pytest.raises(InputError, match=f"{kind} averages the weights .* after they were merged .*; put S2DCallback"):
        lit.fit(tmp_path, own, averaging)
    module = lit.fit(tmp_path, averaging, own)
    merged = torch.load(tmp_path / "merged.pt")
    for name, tensor in merge_experts(module).state_dict().items():
        torch.testing.assert_close(tensor, merged[name])


def test_the_examples_of_the_module(lit):
    failed, tried = doctest.testmod(sys.modules["s2d3d.integrations.lightning"])
    assert tried and not failed
