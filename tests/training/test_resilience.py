"""What a run survives: a kill at any write, a damaged checkpoint, a full disk, other data, a second process."""

import errno
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from cases import quick
from faults.damage import flip_bits
from weights import assert_same_weights

from s2d3d import Callback, Trainer, load_checkpoint, load_config, load_model
from s2d3d.atomic import replacing
from s2d3d.datasets import BatchLoader
from s2d3d.errors import InputError, TrainingError, UnreadableError
from s2d3d.prepare.shapes import write_shapes
from s2d3d.runs.folder import RunFolder
from s2d3d.training import trainer as trainer_module

V1 = Path(__file__).parents[1] / "runs" / "fixtures" / "checkpoint_v1.pt"
"""Written by format version 1: update 2 of 6 of the run that `v1_config` describes."""


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Folders of runs that several tests start from, by name; each is made once."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def whole(tiny_config, templates):
    """The run that nothing happened to."""
    folder = RunFolder(templates / "whole")
    if not folder.merged.exists():
        Trainer(tiny_config("train.epochs=3", f"output_dir={folder.root}")).fit()
    return folder


@pytest.fixture
def stopped(tiny_config, templates, tmp_path):
    """A run of 3 epochs of 6 updates, stopped after 8; its last two checkpoints are of updates 8 and 6."""
    if not (templates / "stopped").exists():
        Trainer(tiny_config("train.epochs=3", "train.max_steps=8", f"output_dir={templates / 'stopped'}")).fit()
    return RunFolder(shutil.copytree(templates / "stopped", tmp_path / "run"))


def resume(tiny_config, path, *overrides):
    trainer = Trainer(tiny_config("train.epochs=3", *overrides))
    trainer.fit(resume=path)
    return trainer.folder


# Epochs without a checkpoint


def test_epochs_that_are_not_saved_are_trained_again_and_nothing_else_changes(tiny_config, whole, monkeypatch):
    class Killed(Exception):
        pass

    trainer, saved = Trainer(tiny_config("train.epochs=3", "train.save_every=2")), []

    def note():
        saved.append(trainer.progress.epoch)
        if trainer.progress.epoch == 2:
            raise Killed
        type(trainer)._save(trainer)

    monkeypatch.setattr(trainer, "_save", note)
    with pytest.raises(Killed):
        trainer.fit()
    assert saved == [0, 2] and load_checkpoint(trainer.folder.last)["progress"]["epoch"] == 0
    assert not trainer.folder.best.exists(), "the first epoch was better than nothing, but was not saved"
    assert trainer.folder.log.read_text().count("\n") == 2
    final = resume(tiny_config, trainer.folder.root, "train.save_every=2")
    assert load_checkpoint(final.previous)["progress"]["epoch"] == 2
    assert load_checkpoint(final.last)["progress"]["epoch"] == 3
    assert load_checkpoint(final.best)["progress"]["epoch"] in (2, 3)
    assert_same_weights(final.last, whole.last)
    assert [line.split(",")[0] for line in final.log.read_text().splitlines()] == ["epoch", "1", "2", "3"]


def test_a_resumed_run_may_save_more_often_and_forgets_rows_of_epochs_that_were_not(tiny_config, whole):
    first = Trainer(tiny_config("train.epochs=3", "train.save_every=3", "train.max_steps=14"))
    first.fit()
    folder = first.folder
    os.replace(folder.previous, folder.last)  # as if it had been killed before it could save: the start
    assert folder.log.read_text().count("\n") == 3
    stopped = Trainer(tiny_config("train.epochs=3", "train.max_steps=1"))
    stopped.fit(resume=folder.root)
    assert folder.log.read_text().count("\n") == 1, "the header"
    assert_same_weights(resume(tiny_config, folder.root).last, whole.last)


# The checkpoint before the last one


@pytest.mark.parametrize("damage", quick(2, ["cut", "gone", "bits", "empty"]))
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tiny_config, whole, stopped, caplog, damage):
    assert load_checkpoint(stopped.previous)["progress"]["updates"] == 6
    content = stopped.last.read_bytes()
    if damage == "gone":
        stopped.last.unlink()
    else:
        broken = {"bits": flip_bits(content, 200, seed=1), "cut": content[: len(content) // 2], "empty": b""}[damage]
        stopped.last.write_bytes(broken)
    with caplog.at_level(logging.WARNING):
        folder = resume(tiny_config, stopped.root)
    warning = next(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith(f"warning: {stopped.last}: ") and warning.endswith(
        f"; continuing from the checkpoint before it, {stopped.previous}"
    )
    assert_same_weights(folder.last, whole.last)
    assert_same_weights(folder.merged, whole.merged)
    assert folder.aside.exists() == (damage != "gone"), "nothing of the user's is destroyed"
    assert not list(folder.root.rglob("*.tmp"))


def test_a_kill_right_after_falling_back_loses_nothing(tiny_config, whole, stopped):
    """The damaged file must not take the place of the good one when the next checkpoint moves it on."""
    stopped.last.write_bytes(b"damaged")

    class Killed(Callback):
        def on_update(self, trainer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_config("train.epochs=3"), callbacks=[Killed()]).fit(resume=stopped.root)
    for path in (stopped.last, stopped.previous):
        assert load_checkpoint(path)["progress"]["updates"] == 6
    assert_same_weights(resume(tiny_config, stopped.root).merged, whole.merged)


def test_both_damaged_is_an_error_that_names_a_file(tiny_config, stopped):
    for path in (stopped.last, stopped.previous):
        path.write_bytes(path.read_bytes()[:3000])
    before = {path: path.read_bytes() for path in stopped.root.rglob("*.pt")}
    with pytest.raises(UnreadableError, match=re.escape(f"{stopped.previous}: cannot be read as a checkpoint")):
        resume(tiny_config, stopped.root)
    assert {path: path.read_bytes() for path in stopped.root.rglob("*.pt")} == before


def test_a_damaged_file_that_is_named_itself_is_an_error(tiny_config, stopped):
    stopped.last.write_bytes(b"")
    with pytest.raises(UnreadableError, match=re.escape(f"the checkpoint before it is {stopped.previous}")):
        resume(tiny_config, stopped.last)


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(tiny_config, stopped):
    """An older file would be read, and the newer one's updates be lost without need."""
    torch.save({**torch.load(stopped.last, weights_only=True), "format_version": 99}, stopped.last)
    with pytest.raises(InputError, match="checkpoint format 99"):
        resume(tiny_config, stopped.root)


# Kills between two writes of one epoch's end


@pytest.mark.parametrize("lost", quick(1, ["mark_best", "write_log"]))
def test_what_was_due_after_a_checkpoint_is_made_up_for(tiny_config, whole, monkeypatch, lost):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        if trainer.progress.epoch == 2:
            raise Killed
        return original(*arguments)

    trainer = Trainer(tiny_config("train.epochs=3", "train.keep_every=2"))
    original = getattr(trainer.folder, lost)
    monkeypatch.setattr(trainer.folder, lost, kill)
    with pytest.raises(Killed):
        trainer.fit()
    folder = trainer.folder
    assert load_checkpoint(folder.last)["progress"]["epoch"] == 2
    if lost == "mark_best":
        assert load_checkpoint(folder.best)["progress"]["epoch"] == 1 and not folder.kept(2).exists()
    resumed = Trainer(tiny_config("train.epochs=3", "train.keep_every=2", "train.max_steps=13"))
    resumed.fit(resume=folder.root)
    assert load_checkpoint(folder.best)["progress"]["epoch"] == 2 and folder.kept(2).is_file()
    final = resume(tiny_config, folder.root, "train.keep_every=2")
    assert_same_weights(final.last, whole.last)
    assert_same_weights(final.best, whole.best)
    assert final.log.read_text().count("\n") == 4


def test_continuing_elsewhere_or_from_the_best_keeps_both_right(tiny_config, whole, stopped, tmp_path):
    elsewhere = resume(tiny_config, stopped.root, f"output_dir={tmp_path / 'elsewhere'}")
    assert_same_weights(elsewhere.merged, whole.merged)
    assert_same_weights(elsewhere.best, whole.best)
    best = load_checkpoint(stopped.best)["progress"]["updates"]
    assert best == 6
    from_best = resume(tiny_config, stopped.best, "train.max_steps=7")
    assert load_checkpoint(from_best.best)["progress"]["updates"] == best, "not what last.pt was, which is later"


def test_a_start_that_was_killed_before_its_first_checkpoint_can_be_repeated(tiny_config, monkeypatch):
    config = tiny_config("train.max_steps=1")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).fit()
    monkeypatch.undo()
    Trainer(config).fit()


def test_half_written_files_of_a_killed_process_are_removed_and_no_others(tiny_config, stopped):
    for path in (stopped.metrics, stopped.last):
        child = os.fork()
        if not child:
            with replacing(path) as file:
                file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    left = [path for path in stopped.root.rglob(".*.tmp") if path.is_dir()]
    assert len(left) == 2
    others = [stopped.root / "mine.txt", stopped.root / "metrics.json.tmp", stopped.last.with_name("last.pt.tmp")]
    for path in others:
        path.write_text("kept")
    resume(tiny_config, stopped.root, "train.max_steps=9")
    assert not any(path.exists() for path in left)
    assert [path.read_text() for path in others] == ["kept"] * 3


# A full disk


@pytest.mark.parametrize("after", quick(1, [30_000, 0]))
def test_a_full_disk_names_the_file_and_leaves_the_checkpoint_before_it(
    tiny_config, whole, monkeypatch, after, tmp_path
):
    real, written = open, {"saves": 0}

    class Full:
        def __init__(self, file):
            self.file, self.room = file, after

        def write(self, data):
            size = memoryview(data).nbytes
            if size > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= size
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            self.file.close()

    def limited(path, *arguments, **options):
        file = real(path, *arguments, **options)
        if ".last.pt." not in str(path):
            return file
        written["saves"] += 1
        return Full(file) if written["saves"] == 3 else file

    monkeypatch.setattr("s2d3d.atomic.open", limited, raising=False)
    trainer = Trainer(tiny_config("train.epochs=3"))
    with pytest.raises(OSError) as caught:
        trainer.fit()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(trainer.folder.last)
    assert caught.value.strerror == (
        "cannot be written (No space left on device); free space and try again; what was there before is unchanged"
    )
    monkeypatch.undo()
    assert load_checkpoint(trainer.folder.last)["progress"]["updates"] == 6
    assert not list(trainer.folder.root.rglob("*.tmp"))
    assert_same_weights(resume(tiny_config, trainer.folder.root).merged, whole.merged)


# Other processes, other data


def test_two_processes_in_one_folder_are_refused(tiny_config, stopped):
    stopped.create(resume=stopped.last)
    with pytest.raises(InputError, match="another process is training here"):
        resume(tiny_config, stopped.root)
    stopped.release()
    resume(tiny_config, stopped.root, "train.max_steps=9")


def test_resuming_on_other_clouds_of_the_same_number_is_refused(tiny_config, stopped, shapes_root, tmp_path):
    other = tmp_path / "other"
    write_shapes(other, num_train=96, num_test=36, num_points=128, seed=1)
    with pytest.raises(InputError, match=r"was trained on other clouds than those in .*other, or its test files have"):
        resume(tiny_config, stopped.root, f"data.root={other}")
    moved = shutil.copytree(shapes_root, tmp_path / "moved")
    resume(tiny_config, stopped.root, f"data.root={moved}", "train.max_steps=9")


def test_a_preparing_thread_that_fails_stops_the_run_which_resumes(tiny_config, whole, monkeypatch):
    original, calls = BatchLoader._load, []

    def fail(self, order, epoch, step):
        calls.append(step)
        if self.shuffle and epoch == 1 and step == 4:
            raise OSError(errno.EIO, "Input/output error", "data.h5")
        return original(self, order, epoch, step)

    monkeypatch.setattr(BatchLoader, "_load", fail)
    trainer = Trainer(tiny_config("train.epochs=3", "train.checkpoint_every=2"))
    with pytest.raises(OSError, match="Input/output error"):
        trainer.fit()
    monkeypatch.undo()
    assert load_checkpoint(trainer.folder.last)["progress"]["updates"] == 10
    final = resume(tiny_config, trainer.folder.root, "train.checkpoint_every=2")
    assert_same_weights(final.merged, whole.merged)


@pytest.mark.parametrize(
    ("key", "value"),
    quick(6, [
        ("progress", {"epoch": -1, "step": 7, "updates": 1}), ("optimizer", {}), ("ewa", {}), ("rng", [{}]),
        ("sums", [torch.zeros(9)]), ("history", [{"epoch": 1}]), ("progress", {}), ("progress", {"epoch": "1"}),
        ("progress", [1]), ("optimizer", None), ("rng", 3), ("sums", []), ("history", 5), ("data", 5),
        ("rng", [{"python": (3, (1, 2), None), "numpy": ("MT19937", [0], 0, 0, 0.0), "torch": torch.zeros(3)}]),
    ]),
)  # fmt: skip
def test_a_training_state_of_another_kind_is_one_line(tiny_config, stopped, key, value):
    payload = torch.load(stopped.last, weights_only=True)
    torch.save(payload | {key: value}, stopped.last)
    before = stopped.last.read_bytes()
    with pytest.raises(InputError) as caught:
        resume(tiny_config, stopped.root)
    message = str(caught.value)
    assert message.startswith(f"{stopped.last}: ") and "\n" not in message
    assert stopped.last.read_bytes() == before


# Format versions


@pytest.fixture
def v1_config(tmp_path):
    root = tmp_path / "shapes"
    write_shapes(root, num_train=24, num_test=12, num_points=32, seed=0)
    stored = torch.load(V1, weights_only=True)["config"]
    overrides = [f"data.root={root}", f"output_dir={tmp_path / 'v1'}", "train.max_steps=null"]

    def read(*more):
        from s2d3d.config.load import parse_config

        return parse_config(stored, where="v1", overrides=[*overrides, *more])

    return read


def test_a_file_of_format_1_is_read_as_one_of_format_2():
    stored, loaded = torch.load(V1, weights_only=True), load_checkpoint(V1)
    assert stored["format_version"] == 1 and loaded["format_version"] == 2
    assert loaded["s2d"]["kind"] == "rup" and loaded["model"]["up_axis"] == "z" and loaded["versions"]["torch"]
    for key, weight in stored["state_dict"].items():
        assert torch.equal(loaded["state_dict"][key], weight), key
    assert load_model(V1)(torch.rand(2, 32, 3)).shape == (2, 12)


def test_a_file_of_format_1_without_kind_is_migrated(tmp_path):
    stored = torch.load(V1, weights_only=True)
    del stored["s2d"]["kind"], stored["versions"]
    torch.save(stored, tmp_path / "old.pt")
    loaded = load_checkpoint(tmp_path / "old.pt")
    assert loaded["s2d"]["kind"] == "rup" and loaded["versions"] == {}
    points = torch.rand(2, 32, 3)
    assert torch.equal(load_model(tmp_path / "old.pt")(points), load_model(V1)(points))


def test_a_run_of_format_1_continues(v1_config, tmp_path):
    trainer = Trainer(v1_config())
    trainer.fit(resume=V1)
    saved = load_checkpoint(trainer.folder.last)
    assert torch.load(trainer.folder.last, weights_only=True)["format_version"] == 2
    assert saved["progress"]["updates"] == 6 and len(saved["history"]) == 2


# Diverging


def test_the_shapes_of_the_batch_are_named(tiny_config):
    class Poison(Callback):
        def on_update(self, trainer):
            if trainer.progress.updates == 8:
                self.loss, trainer.task.loss = trainer.task.loss, self.poisoned

        def poisoned(self, network, points, labels):
            self.seen = labels
            return self.loss(network, points * float("nan"), labels)

    poison = Poison()
    trainer = Trainer(tiny_config(), callbacks=[poison])
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert message.startswith("loss or gradient is not finite at update 9 (epoch 2); last good checkpoint: ")
    dataset = trainer.data.train.dataset
    indices = [int(index) for index in re.search(r"\(shapes ([\d, ]+) of split 'train'\)", message)[1].split(", ")]
    assert torch.equal(dataset.labels[indices], poison.seen), "these very shapes, in this order"
    assert all(dataset.names[index] in message for index in indices[:8]) and "and 8 more" in message
    assert load_checkpoint(trainer.folder.last)["progress"]["updates"] == 6


def test_config_bounds_the_number_of_threads(repository):
    """More threads than a machine can start end the process without a word."""
    with pytest.raises(InputError, match=r"train\.num_threads: must be at most 1024"):
        load_config(repository / "configs" / "demo.yaml", ["train.num_threads=1000000"])
