"""The callback of Lightning, against the real one: real updates, resuming, the merged state dict."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.layers import Mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2d3d import MoFConfig, convert_to_mof_, is_sparse, merge_experts
from s2d3d.errors import InputError
from s2d3d.integrations.lightning import S2DCallback

UPDATES = 6
"""Of a training: 2 epochs of 5 batches, 2 of which make an update; the third of an epoch has one batch."""


class Classifier(LightningModule):
    """Maps (B, T, 6) to 3 classes through an FFN, in automatic optimization."""

    def __init__(self):
        super().__init__()
        self.mlp, self.drop, self.head = Mlp(6, 12), nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(x + self.mlp(x)).mean(1))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Manual(Classifier):
    """Two optimizers, stepped by hand; that of the experts after every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        head, mlp = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        head.step()
        head.zero_grad()
        if index % 2 == 1:
            mlp.step()
            mlp.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.SGD(self.mlp.parameters(), lr=0.1)]


class Recorder:
    """A schedule that notes which updates asked for it."""

    def __init__(self):
        self.ts: list[int] = []

    def __call__(self, t: int) -> float:
        self.ts.append(t)
        return t / UPDATES


class Stop(Callback):
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def sparse(kind=Classifier) -> LightningModule:
    torch.manual_seed(1)
    module = kind()
    convert_to_mof_(module, MoFConfig(targets=("mlp",), every=1, init_noise=0.5))
    return module


def batches(factor: float = 1.0) -> DataLoader:
    """Return 10 samples in batches of 2, shuffled by the global generator; `factor` multiplies the first sample."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(10, 4, 6, generator=generator), torch.arange(10) % 3
    x[0] *= factor
    return DataLoader(TensorDataset(x, y), batch_size=2, shuffle=factor == 1.0)


def trainer_of(folder, *callbacks, **settings) -> Trainer:
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, **settings}
    return Trainer(
        default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def fit(folder, *callbacks, module=None, data=None, resume=None, validate=False, **settings) -> LightningModule:
    module = module or sparse()
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers and batches
        trainer = trainer_of(folder, *callbacks, **settings)
        trainer.fit(module, data or batches(), batches() if validate else None, ckpt_path=resume)
    return module


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("validate", [False, True])
def test_it_trains_resumes_and_merges(validate, tmp_path):
    path, whole, resumed = tmp_path / "merged.pt", Recorder(), Recorder()
    callback = S2DCallback(share_rate=0.5, schedule=whole, merged_path=path)
    uninterrupted = fit(tmp_path / "whole", callback, validate=validate, precision="bf16-mixed")
    assert whole.ts == list(range(UPDATES)) and callback.num_steps == UPDATES
    merged = torch.load(path, weights_only=True)

    save = ModelCheckpoint(tmp_path / "stopped", save_last=True)
    stopped = S2DCallback(share_rate=0.5, schedule=Recorder())
    fit(tmp_path, stopped, Stop(), save, validate=validate, precision="bf16-mixed")
    assert stopped.num_steps == 3
    again = fit(
        tmp_path, S2DCallback(share_rate=0.5, schedule=resumed, merged_path=path), validate=validate,
        resume=tmp_path / "stopped" / "last.ckpt", precision="bf16-mixed",
    )  # fmt: skip
    assert resumed.ts == [3, 4, 5]
    assert torch.equal(weights(again), weights(uninterrupted))

    stock = Classifier()
    stock.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert torch.equal(weights(stock), weights(merge_experts(again))) and is_sparse(again)
    assert all(torch.equal(merged[name], tensor) for name, tensor in stock.state_dict().items())


def test_the_default_schedule_spans_the_training_and_goes_on_with_the_trainer(tmp_path):
    callback, module = S2DCallback(share_rate=0.5), sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(tmp_path, callback, enable_checkpointing=False)
        trainer.fit(module, batches())
        ewa = callback._averaging.ewa
        assert ewa.total_steps == ewa.num_steps == UPDATES and ewa.last_share_rate() == 0.5
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, batches())
        assert (callback._averaging.ewa.total_steps, callback.num_steps) == (9, 9)
    fit(tmp_path, callback, module=sparse(), enable_checkpointing=False)
    assert callback.num_steps == UPDATES, "a new training begins at 0"


def test_a_step_that_the_scaler_skips_is_not_an_update(tmp_path):
    """The first batch of each epoch is infinite; Lightning's `global_step` counts its update."""
    from lightning.pytorch.plugins import MixedPrecision

    recorder, scaler = Recorder(), torch.amp.GradScaler("cpu", init_scale=4.0)
    module = fit(
        tmp_path, S2DCallback(share_rate=0.5, schedule=recorder), data=batches(factor=float("inf")),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], enable_checkpointing=False,
    )  # fmt: skip
    assert recorder.ts == [0, 1, 2, 3]
    assert module.trainer.global_step == UPDATES and bool(torch.isfinite(weights(module)).all())


def test_with_several_optimizers_it_follows_that_of_the_experts(tmp_path):
    recorder = Recorder()
    callback = S2DCallback(share_rate=0.5, schedule=recorder, total_steps=4)
    fit(tmp_path, callback, module=sparse(Manual), accumulate_grad_batches=1, enable_checkpointing=False)
    assert recorder.ts == [0, 1, 2, 3] and callback._averaging.ewa.total_steps == 4


def test_validating_a_checkpoint_leaves_the_random_state_alone(tmp_path, monkeypatch):
    fit(tmp_path, S2DCallback(share_rate=0.5), ModelCheckpoint(tmp_path, save_last=True))
    restored = []
    monkeypatch.setattr("s2d3d.integrations.lightning.set_rng_state", lambda *state: restored.append(state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(tmp_path, S2DCallback(share_rate=0.5))
        trainer.validate(sparse(), batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert not restored
    fit(tmp_path, S2DCallback(share_rate=0.5), resume=tmp_path / "last.ckpt")
    assert len(restored) == 1


def test_a_checkpoint_written_without_the_callback_is_refused(tmp_path):
    fit(tmp_path, Stop(), ModelCheckpoint(tmp_path, save_last=True))
    with pytest.raises(InputError, match=r"last.ckpt: was written without S2DCallback"):
        fit(tmp_path, S2DCallback(share_rate=0.5), resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("module", "arguments", "settings", "expected"),
    [
        (Classifier, {}, {}, "S2DCallback: the model has no RUP-MoF layer"),
        (sparse, {"share_rate": 0.9}, {}, r"share_rate is 0.9: above \(K-1\)/K"),
        (sparse, {}, {"max_epochs": -1}, "number of updates of this training is unknown; give total_steps"),
        (sparse, {"merged_path": "no/such/folder/merged.pt"}, {}, "folder no/such/folder does not exist"),
    ],
)
def test_what_cannot_be_right_is_refused_before_the_first_update(module, arguments, settings, expected, tmp_path):
    model = module()
    before = weights(model).clone()
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, S2DCallback(**{"share_rate": 0.5, **arguments}), module=model, **settings)
    assert torch.equal(weights(model), before)
