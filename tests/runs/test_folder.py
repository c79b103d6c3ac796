"""The run folder: who may write there, and files that appear whole."""

import csv
import json
import os
from pathlib import Path

import pytest

from s2d3d.atomic import check_writable, write_json, write_text
from s2d3d.errors import InputError
from s2d3d.runs.folder import RunFolder, find_checkpoint
from s2d3d.runs.replaced import NOTE


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "a")


def fill(folder: RunFolder) -> list[Path]:
    """A finished run of two kept models, and a file of the user's own."""
    folder.create()
    files = [folder.config, folder.environment, folder.log, folder.metrics, folder.last, folder.best, folder.merged]
    files += [folder.final, folder.kept(5), folder.kept(10)]
    for path in [*files, folder.root / "notes.txt", folder.root / "checkpoints" / "mine.pt"]:
        path.write_text(path.name)
    return files


def contents(folder: RunFolder) -> dict[str, str]:
    return {
        path.relative_to(folder.root).as_posix(): path.read_text() for path in folder.root.rglob("*") if path.is_file()
    }


def test_a_new_run_makes_its_folders(folder):
    folder.check()
    assert not folder.root.parent.exists(), "checking leaves no trace"
    folder.create()
    assert (folder.root / "checkpoints").is_dir() and contents(folder) == {}


@pytest.mark.parametrize("index", range(10))
def test_any_file_of_a_run_protects_the_folder(folder, index):
    kept = fill(folder)[index]
    for path in set(folder.root.rglob("*")) - {kept}:
        if path.is_file():
            path.unlink()
    for enter in (folder.check, folder.create):
        with pytest.raises(InputError) as caught:
            enter()
        assert str(caught.value) == (
            f"{folder.root}: holds a run already; continue it with --resume {folder.root}, choose another output_dir, "
            "or pass --force to replace it"
        )
    assert kept.read_text() == kept.name


def test_other_files_do_not(folder):
    folder.root.mkdir(parents=True)
    (folder.root / "notes.txt").write_text("mine")
    folder.create()
    assert contents(folder) == {"notes.txt": "mine"}


def test_force_removes_the_run_and_nothing_else(folder):
    fill(folder)
    folder.check(force=True)
    assert len(contents(folder)) == 12
    before = contents(folder)
    folder.create(force=True)
    own = {"notes.txt": "notes.txt", "checkpoints/mine.pt": "mine.pt"}
    assert contents(folder).items() >= own.items() and not folder.last.exists()
    kept = RunFolder(folder.replaced.place)
    assert {name: text for name, text in contents(kept).items() if name != NOTE} | own == before, "until the new stands"
    folder.stands()
    assert contents(folder) == own


def test_force_removes_what_other_tools_found_out_about_the_run(folder):
    fill(folder)
    others = (folder.robustness, folder.analysis, folder.root / "analysis.png", *folder.report_files())
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the old model")
    folder.create(resume=folder.last)
    assert all(path.exists() for path in others), "the run goes on"
    folder.create(force=True)
    assert not any(path.exists() for path in others)
    folder.stands()
    (folder.plots / "mine.png").write_text("of the user")
    assert (folder.plots / "mine.png").exists() and not any(path.exists() for path in others)


def test_a_run_that_continues_keeps_everything(folder, monkeypatch):
    fill(folder)
    before = contents(folder)
    monkeypatch.chdir(folder.root.parent)
    for checkpoint in (folder.last, folder.best, folder.kept(5), Path("a") / "checkpoints" / "last.pt"):
        folder.create(resume=checkpoint)
        folder.create(resume=checkpoint, force=True)
    assert contents(folder) == before


def test_a_run_that_continues_from_elsewhere_is_a_new_one_here(folder, tmp_path):
    other = RunFolder(tmp_path / "runs" / "b")
    fill(other)
    folder.create(resume=other.last)
    fill(folder)
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        folder.create(resume=other.last)
    assert str(caught.value) == (
        f"{folder.root}: holds a run already, and {other.last} is not of it; choose another output_dir, "
        "or pass --force to replace it"
    )
    assert contents(folder) == before
    folder.create(resume=other.last, force=True)
    assert "merged.pt" not in contents(folder) and len(contents(other)) == 12


def test_kept_models_by_epoch(folder):
    fill(folder)
    (folder.root / "checkpoints" / "epoch_x.pt").write_text("no number")
    folder.kept(100).write_text("late")
    assert folder.kept(7).name == "epoch_007.pt"
    assert list(folder.all_kept()) == [5, 10, 100]
    assert folder.all_kept()[100].read_text() == "late"


@pytest.mark.parametrize("linking", [True, False])
def test_best_is_what_last_was_when_it_was_marked(folder, monkeypatch, linking):
    def refused(source, target):
        raise OSError("no links here")

    if not linking:
        monkeypatch.setattr(os, "link", refused)
    folder.create()
    folder.last.write_text("epoch 1")
    folder.mark_best()
    write_text(folder.last, "epoch 2")
    assert folder.best.read_text() == "epoch 1"
    folder.mark_best()
    assert folder.best.read_text() == "epoch 2" and sorted(contents(folder)) == [
        "checkpoints/best.pt",
        "checkpoints/last.pt",
    ]


def test_log_has_a_row_for_each_epoch_and_empty_cells(folder):
    folder.create()
    folder.write_log([{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 0.25, "oa": 1e-7}], ("epoch", "loss", "oa"))
    with open(folder.log, newline="") as file:
        assert list(csv.reader(file)) == [["epoch", "loss", "oa"], ["1", "0.333333", ""], ["2", "0.25", "1e-07"]]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_crash_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch, function):
    path = tmp_path / "metrics.json"
    write_json(path, {"oa": 0.5})

    class Crash(Exception):
        pass

    def crash(*arguments, **options):
        raise Crash

    monkeypatch.setattr(os, function, crash)
    with pytest.raises(Crash):
        write_json(path, {"oa": 0.6})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"oa": 0.5} and list(tmp_path.iterdir()) == [path]


def test_find_checkpoint_takes_a_file_or_a_run_folder(folder, tmp_path):
    fill(folder)
    assert find_checkpoint(folder.root) == folder.last
    assert find_checkpoint(str(folder.best)) == folder.best
    with pytest.raises(
        InputError, match=f"^{tmp_path}/no: no such checkpoint to resume from; start anew without --resume$"
    ):
        find_checkpoint(tmp_path / "no")
    with pytest.raises(InputError, match=f"^{tmp_path}/checkpoints/last.pt: no such checkpoint to resume from"):
        find_checkpoint(tmp_path)


def test_check_writable(tmp_path):
    (tmp_path / "file").write_text("mine")
    for good in (tmp_path, tmp_path / "a" / "b" / "c"):
        check_writable(good)
    for bad in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(
            InputError, match=f"^{tmp_path}/file: is a file, a folder is needed here; choose another place$"
        ):
            check_writable(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_check_writable_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(Path("runs/a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/", "/dev", "/dev/null/run", "/proc/run", "/sys/run", "/dev/../dev/x"])
def test_no_run_where_the_system_keeps_its_own(place):
    with pytest.raises(InputError, match="choose another"):
        RunFolder(place).check()
