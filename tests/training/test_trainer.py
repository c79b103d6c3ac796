"""The trainer: a run that stops and resumes equals one that did not, whatever stopped it."""

import json
import logging
import os
import signal
import socket

import pytest
import torch
from children import START, train_and_kill
from torch.multiprocessing import start_processes
from weights import assert_same_weights, log_rows, weights

from s2d3d import (
    Callback,
    Trainer,
    convert_to_mof_,
    create_model,
    load_checkpoint,
    load_config,
    load_model,
    save_checkpoint,
)
from s2d3d.config.load import dump_config
from s2d3d.errors import InputError, TrainingError
from s2d3d.runs.folder import RunFolder
from s2d3d.training.signals import StoppedBySignal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return RunFolder(tmp_path_factory.mktemp("uninterrupted") / "whole")


@pytest.fixture
def uninterrupted(tiny_config, whole):
    """The folder of a run of 3 epochs that nothing happened to; it is trained once."""
    if not whole.merged.exists():
        Trainer(tiny_config("train.epochs=3", f"output_dir={whole.root}")).fit()
    return whole


def test_run_folder_is_complete_and_merge_changes_nothing(tiny_config):
    trainer = Trainer(tiny_config())
    merged = trainer.fit()
    folder = trainer.folder
    assert merged == folder.merged
    for path in (
        folder.config,
        folder.environment,
        folder.log,
        folder.metrics,
        folder.last,
        folder.best,
        folder.merged,
    ):
        assert path.is_file(), path
    assert not list(folder.root.rglob("*.tmp"))
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["sparse"]["confusion"] == metrics["merged"]["confusion"]
    assert metrics["sparse"]["loss"] == metrics["merged"]["loss"]
    assert metrics["parameters"]["training"] > metrics["parameters"]["merged"]
    assert len(log_rows(folder)) == 2
    # The merged file fits a model that never heard of experts.
    payload = load_checkpoint(merged)
    dense = create_model("point_bert_tiny", num_classes=12, **payload["model"]["kwargs"])
    dense.load_state_dict(payload["state_dict"], strict=True)
    # It is the mean of experts that differ, not one of them.
    stacked = weights(folder.last)["blocks.blocks.1.mlp.fc1.weight"]
    assert not torch.equal(stacked[0], stacked[1])
    assert torch.allclose(payload["state_dict"]["blocks.blocks.1.mlp.fc1.weight"], stacked.mean(0).t(), atol=1e-7)


def test_resume_after_a_stop_in_mid_epoch_is_bit_exact(tiny_config, uninterrupted):
    stopped = Trainer(tiny_config("train.epochs=3", "train.max_steps=15"))  # in the third epoch of 6 updates
    assert stopped.fit() == stopped.folder.last
    assert load_checkpoint(stopped.folder.last)["progress"]["updates"] == 15
    assert not stopped.folder.merged.exists()
    resumed = Trainer(tiny_config("train.epochs=3"))
    resumed.fit(resume=stopped.folder.root)
    assert_same_weights(weights(resumed.folder.last), weights(uninterrupted.last))
    assert_same_weights(weights(resumed.folder.merged), weights(uninterrupted.merged))
    assert log_rows(resumed.folder) == log_rows(uninterrupted)


def test_resume_between_two_epochs_is_bit_exact(tiny_config, uninterrupted):
    Trainer(tiny_config("train.epochs=3", "train.max_steps=12")).fit()
    resumed = Trainer(tiny_config("train.epochs=3"))
    resumed.fit(resume=resumed.folder.root)
    assert_same_weights(weights(resumed.folder.last), weights(uninterrupted.last))


def test_the_mode_of_compilation_arrives_and_may_change_on_resume(tiny_config, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, *, mode: modes.append(mode) or network)
    first = Trainer(tiny_config("train.max_steps=1"))
    first.fit()
    keys = "train.compile=true", "train.compile_mode=reduce-overhead"
    Trainer(tiny_config("train.max_steps=2", *keys)).fit(resume=first.folder.root)
    Trainer(tiny_config("train.max_steps=3", "train.compile=true")).fit(resume=first.folder.root)
    assert modes == ["reduce-overhead", "default"]
    assert load_checkpoint(first.folder.last)["progress"]["updates"] == 3


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_with_the_conventional_code(tiny_config, uninterrupted, signum):
    class Struck(Callback):
        def on_update(self, trainer):
            if trainer.progress.updates == 9:
                signal.raise_signal(signum)

    struck = Trainer(tiny_config("train.epochs=3"), callbacks=[Struck()])
    with pytest.raises(StoppedBySignal) as stop:
        struck.fit()
    assert stop.value.exit_code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the earlier handlers are back"
    resumed = Trainer(tiny_config("train.epochs=3"))
    resumed.fit(resume=struck.folder.last)
    assert_same_weights(weights(resumed.folder.last), weights(uninterrupted.last))


def test_a_signal_in_the_evaluation_of_the_last_epoch_is_obeyed(tiny_config):
    class Struck(Callback):
        def on_epoch(self, trainer):
            if trainer.history[-1]["epoch"] == 2:
                signal.raise_signal(signal.SIGTERM)

    struck = Trainer(tiny_config("train.epochs=2"), callbacks=[Struck()])
    with pytest.raises(StoppedBySignal):
        struck.fit()
    assert not struck.folder.merged.exists()
    resumed = Trainer(tiny_config("train.epochs=2"))
    assert resumed.fit(resume=struck.folder.last).is_file(), "only the ending was left to do"
    assert resumed.progress.updates == 2 * resumed.steps_per_epoch


def test_a_run_that_is_resumed_at_its_limit_makes_no_further_update(tiny_config):
    first = Trainer(tiny_config("train.max_steps=3"))
    first.fit()
    before = weights(first.folder.last)
    for _ in range(2):
        Trainer(tiny_config("train.max_steps=3")).fit(resume=first.folder.last)
    assert load_checkpoint(first.folder.last)["progress"]["updates"] == 3
    assert_same_weights(weights(first.folder.last), before)


def test_kill_9_in_mid_epoch_resumes_bit_exact(tiny_config, uninterrupted, tmp_path):
    config = tiny_config("train.epochs=3", "train.checkpoint_every=4")
    train_and_kill(config, tmp_path / "config.yaml", 10)
    resumed = Trainer(config)
    assert load_checkpoint(resumed.folder.last)["progress"]["updates"] == 8
    resumed.fit(resume=resumed.folder.root)
    assert_same_weights(weights(resumed.folder.last), weights(uninterrupted.last))


class Counts(Callback):
    def __init__(self):
        self.calls = []

    def on_update(self, trainer):
        self.calls.append("update")

    def on_epoch(self, trainer):
        self.calls.append("epoch")

    def on_finish(self, trainer):
        self.calls.append("finish")


def train_rank(rank, folder, port):
    """Train as one of two ranks that torchrun has started; tests/faults has torchrun itself."""
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    logging.basicConfig(level=logging.INFO, filename=folder / "log", force=True)
    trainer = Trainer(load_config(folder / "config.yaml"), callbacks=[counts := Counts()])
    trainer.fit()
    torch.save((trainer.model.state_dict(), counts.calls), folder / f"rank{trainer.runtime.rank}.pt")


def test_two_processes_end_with_identical_weights_and_one_log(tiny_config, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(train_rank, (tmp_path, port), nprocs=2, start_method=START)
    (first, *calls), (second, *others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_same_weights(first, second)
    assert calls == others == [[*["update"] * 6, "epoch"] * 2 + ["finish"]], "every rank calls"
    assert (tmp_path / "log").read_text().count("epoch 1/2:") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["merged"]["num_samples"] == 36, "each test shape counts once"
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["updates"] == 12


def test_twins_start_from_the_same_dense_weights(tiny_config, tmp_path):
    dense = Trainer(tiny_config("s2d.kind=none", "train.max_steps=1", f"output_dir={tmp_path / 'dense'}"))
    sparse = Trainer(tiny_config("train.max_steps=1", f"output_dir={tmp_path / 'sparse'}"))
    saved = []
    for trainer in (dense, sparse):
        trainer.fit()
        saved.append(trainer)
    start_dense, start_sparse = (create_and_convert(trainer) for trainer in saved)
    assert_same_weights(start_dense, start_sparse)


def create_and_convert(trainer):
    """Merged initial weights, as the trainer builds them."""
    from s2d3d import merge_experts

    trainer._build_model()
    return merge_experts(trainer.model).state_dict()


def test_a_diverged_run_names_the_update_and_the_last_good_checkpoint(tiny_config):
    trainer = Trainer(tiny_config("optim.lr=1e30", "optim.warmup_epochs=0", "optim.clip_grad=null"))
    with pytest.raises(TrainingError, match=r"not finite at update \d+ .*last good checkpoint: .*last\.pt"):
        trainer.fit()
    for key, value in weights(trainer.folder.last).items():
        assert torch.isfinite(value).all(), key


def test_an_existing_run_is_not_replaced_without_force(tiny_config):
    config = tiny_config("train.max_steps=2")
    Trainer(config).fit()
    before = config_bytes(Trainer(config).folder)
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(config).fit()
    assert config_bytes(Trainer(config).folder) == before
    Trainer(config, force=True).fit()


def config_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.01"], "optim.lr=0.002, the config says 0.01"),
        (["model.depth=4"], "model.depth=2"),
        (["s2d.num_experts=2"], "s2d.num_experts=4"),
    ],
)
def test_resuming_another_run_is_refused(tiny_config, overrides, message):
    trainer = Trainer(tiny_config("train.max_steps=2"))
    trainer.fit()
    with pytest.raises(InputError, match=message):
        Trainer(tiny_config(*overrides)).fit(resume=trainer.folder.root)


def test_a_checkpoint_from_before_a_key_existed_resumes_with_its_default(tiny_config):
    trainer = Trainer(tiny_config("train.max_steps=2"))
    path = trainer.fit()
    payload = load_checkpoint(path)
    del payload["config"]["model"]["variant"], payload["config"]["train"]["ema_decay"]
    save_checkpoint(path, payload)
    with pytest.raises(InputError, match=r"train\.ema_decay=None, the config says 0\.9"):
        Trainer(tiny_config("train.ema_decay=0.9")).fit(resume=path)
    Trainer(tiny_config("train.max_steps=3")).fit(resume=path)
    assert load_checkpoint(path)["progress"]["updates"] == 3


def test_resuming_a_model_file_is_refused(tiny_config, uninterrupted):
    with pytest.raises(InputError, match="no training state"):
        Trainer(tiny_config()).fit(resume=uninterrupted.merged)


def test_resuming_a_finished_run_repeats_its_result(tiny_config):
    short = "train.epochs=1", "optim.warmup_epochs=0"
    first = Trainer(tiny_config(*short))
    first.fit()
    again = Trainer(tiny_config(*short))
    again.fit(resume=first.folder.root)
    assert again.reports["merged"] == first.reports["merged"]


def test_options_of_training(tiny_config):
    trainer = Trainer(
        tiny_config(
            "train.amp=bf16",
            "train.accum_steps=2",
            "train.ema_decay=0.9",
            "data.val_fraction=0.2",
            "eval.votes=3",
            "eval.every=1",
            "s2d.init=independent",
            "train.label_smoothing=0.1",
        )
    )
    trainer.fit()
    assert set(trainer.reports) == {"sparse", "merged", "ema", "recalibrated", "voting"}, "after 12 updates"
    assert trainer.reports["voting"].votes == 3
    rows = log_rows(trainer.folder)
    assert all(row["val_oa"] for row in rows) and rows[0]["test_oa"]
    assert load_model(trainer.folder.merged)(torch.rand(2, 128, 3)).shape == (2, 12)


def test_accumulation_has_the_gradient_of_the_whole_batch(tiny_config, tmp_path):
    """Without BatchNorm in the way, drop path or experts, two halves give the gradient of one whole."""
    gradients = []
    for index, accum_steps in enumerate((1, 2)):
        config = tiny_config(
            "s2d.kind=none", f"train.accum_steps={accum_steps}", "model.drop_path_rate=0.0", "model.head_dropout=0.0",
            "train.max_steps=1", f"output_dir={tmp_path / str(index)}",
        )  # fmt: skip
        trainer = Trainer(config)
        trainer.fit()
        trainer._build_model()
        trainer.network.eval()  # BatchNorm with fixed statistics
        points, labels = next(iter(trainer.data.train))
        trainer._forward_backward(points, labels)
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6), name
        assert gradients[0][name].any(), name


@pytest.mark.real_data
def test_real_modelnet40_trains_stops_and_resumes(repository, modelnet40_root, tmp_path):
    overrides = [f"data.root={modelnet40_root}", f"output_dir={tmp_path / 'run'}", "data.fraction=0.02"]
    config = repository / "configs" / "modelnet_s2d_small.yaml"
    stopped = Trainer(load_config(config, [*overrides, "train.max_steps=2"]))
    stopped.fit()
    resumed = Trainer(load_config(config, [*overrides, "train.max_steps=4"]))
    resumed.fit(resume=stopped.folder.root)
    payload = load_checkpoint(resumed.folder.last)
    assert payload["progress"]["updates"] == 4 and len(payload["class_names"]) == 40


def test_trying_a_batch_leaves_no_trace(tiny_config):
    """The checkpoint from before the first update holds the fresh model, BatchNorm statistics included."""

    class Stop(Callback):
        def on_update(self, trainer):
            raise KeyboardInterrupt

    config = tiny_config()
    trainer = Trainer(config, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    state = load_checkpoint(trainer.folder.last)
    torch.manual_seed(config.seed)
    fresh = create_model(config.model.name, num_classes=12, **config.model.kwargs)
    convert_to_mof_(fresh, config.s2d.mof())
    assert_same_weights(state["state_dict"], fresh.state_dict())
    torch.manual_seed(config.seed * 1000)
    assert torch.equal(state["rng"][0]["torch"], torch.get_rng_state())
