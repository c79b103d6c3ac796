"""Callbacks: when each is called, what it sees then, and what its errors leave behind."""

import json

import pytest
import torch
from cases import quick
from weights import assert_same_weights, weights

from s2d3d import Callback, Trainer, load_checkpoint
from s2d3d.s2d.analysis import expert_divergence


class Noting(Callback):
    """Notes each call, with the progress of the run at that time."""

    def __init__(self, name="", notes=None):
        self.name, self.notes = name, [] if notes is None else notes

    def on_update(self, trainer):
        self.notes.append((self.name + "update", trainer.progress.updates, trainer.progress.step))

    def on_epoch(self, trainer):
        self.notes.append((self.name + "epoch", trainer.progress.updates, trainer.progress.epoch))

    def on_finish(self, trainer):
        self.notes.append((self.name + "finish", trainer.progress.updates, trainer.progress.epoch))


def test_calls_come_in_order_and_looking_changes_nothing(tiny_config, tmp_path):
    notes = []
    watched = Trainer(tiny_config(), callbacks=[Noting("a ", notes), Noting("b ", notes)])
    watched.fit()
    expected = []
    for epoch in range(2):
        expected += [("update", 6 * epoch + step, step) for step in range(1, 7)]
        expected.append(("epoch", 6 * epoch + 6, epoch + 1))
    expected.append(("finish", 12, 2))
    assert notes == [(f"{name} {event}", *counts) for event, *counts in expected for name in "ab"]
    plain = Trainer(tiny_config(f"output_dir={tmp_path / 'plain'}"))
    plain.fit()
    assert_same_weights(weights(watched.folder.last), weights(plain.folder.last))
    assert_same_weights(weights(watched.folder.merged), weights(plain.folder.merged))


def test_an_update_is_complete_and_not_yet_saved(tiny_config):
    seen = []

    class Look(Callback):
        def on_update(self, trainer):
            saved = load_checkpoint(trainer.folder.last)["progress"]["updates"]
            gradient = max(float(p.grad.abs().max()) for p in trainer.model.parameters())
            averaged = max(expert_divergence(trainer.model).values())
            seen.append((trainer.progress.updates, saved, gradient > 0, averaged < 1e-6))

    # A constant rate of (K - 1) / K makes the experts equal, which the optimizer's step alone does not.
    config = tiny_config(
        "s2d.share_rate=0.75", "s2d.schedule=constant", "train.checkpoint_every=1", "train.max_steps=4"
    )
    Trainer(config, callbacks=[Look()]).fit()
    assert seen == [(update, update - 1, True, True) for update in range(1, 5)]


def test_an_epoch_is_evaluated_and_not_yet_saved_and_changes_of_the_model_are(tiny_config):
    seen = []

    class Mark(Callback):
        def on_epoch(self, trainer):
            row, saved = trainer.history[-1], load_checkpoint(trainer.folder.last)["progress"]["epoch"]
            seen.append((row["epoch"], trainer.progress.epoch, trainer.progress.step, saved, "val_oa" in row))
            with torch.no_grad():
                trainer.model.cls_head_finetune[3].bias.fill_(trainer.progress.epoch)

    trainer = Trainer(tiny_config("data.val_fraction=0.2"), callbacks=[Mark()])
    trainer.fit()
    assert seen == [(1, 1, 0, 0, True), (2, 2, 0, 1, True)]
    assert (weights(trainer.folder.last)["cls_head_finetune.3.bias"] == 2).all()
    assert (weights(trainer.folder.merged)["cls_head_finetune.3.bias"] == 2).all()


def test_a_finished_run_is_whole_and_a_stopped_one_is_not_finished(tiny_config):
    seen = []

    class Look(Callback):
        def on_finish(self, trainer):
            metrics = json.loads(trainer.folder.metrics.read_text())
            assert metrics["merged"] == trainer.reports["merged"].to_dict()
            assert load_checkpoint(trainer.folder.merged)["class_names"] == trainer.data.class_names
            seen.append(trainer.progress.updates)

    Trainer(tiny_config("train.max_steps=7"), callbacks=[Look()]).fit()
    assert seen == []
    trainer = Trainer(tiny_config(), callbacks=[Look()])
    trainer.fit(resume=trainer.folder.root)
    assert seen == [12]


def test_a_resumed_run_calls_for_what_was_not_saved(tiny_config):
    Trainer(tiny_config("train.max_steps=8")).fit()
    noting = Noting()
    trainer = Trainer(tiny_config(), callbacks=[noting])
    trainer.fit(resume=trainer.folder.root)
    assert [(event, updates) for event, updates, _ in noting.notes] == [
        ("update", 9), ("update", 10), ("update", 11), ("update", 12), ("epoch", 12), ("finish", 12),
    ]  # fmt: skip


@pytest.mark.parametrize("event", quick(1, ["on_update", "on_epoch"]))
def test_an_error_ends_the_run_and_what_was_saved_before_continues(tiny_config, tmp_path, event):
    class Failure(Exception):
        pass

    def fail(self, trainer):
        if trainer.progress.updates in (9, 12):
            raise Failure

    options = ("train.epochs=3", "train.checkpoint_every=4")
    callback = type("Failing", (Callback,), {event: fail})()
    trainer = Trainer(tiny_config(*options), callbacks=[callback])
    with pytest.raises(Failure):
        trainer.fit()
    saved = load_checkpoint(trainer.folder.last)["progress"]
    assert saved["updates"] == {"on_update": 8, "on_epoch": 12}[event] and saved["epoch"] == 1
    assert not list(trainer.folder.root.rglob("*.tmp"))
    resumed = Trainer(tiny_config(*options))
    resumed.fit(resume=trainer.folder.root)
    whole = Trainer(tiny_config(*options, f"output_dir={tmp_path / 'whole'}"))
    whole.fit()
    assert_same_weights(weights(resumed.folder.merged), weights(whole.folder.merged))
