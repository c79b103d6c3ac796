"""The run that `--force` replaces is whole at any moment: in its place, or in `replaced`, or after `recover`."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from s2d3d.errors import InputError
from s2d3d.runs.folder import RunFolder

NAMES = ("config.yaml", "log.csv", "merged.pt", "checkpoints/last.pt", "checkpoints/epoch_005.pt", "analysis.json")


@pytest.fixture
def folder(tmp_path):
    """A finished run, and a file of the user's."""
    folder = RunFolder(tmp_path / "run")
    folder.last.parent.mkdir(parents=True)
    for name in (*NAMES, "notes.txt"):
        (folder.root / name).write_text(f"old {name}")
    return folder


def contents(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


OLD = {name: f"old {name}" for name in (*NAMES, "notes.txt")}


def replace(folder: RunFolder, *, fail: bool) -> None:
    """Train a new run: it writes some files and fails, or stands."""
    with folder.giving_back():
        folder.create(force=True)
        for name in ("checkpoints/last.pt", "config.yaml", "environment.json"):
            (folder.root / name).write_text(f"new {name}")
        if fail:
            raise KeyError
        folder.stands()


def test_a_run_that_fails_gives_the_old_one_back(folder):
    with pytest.raises(KeyError):
        replace(folder, fail=True)
    assert contents(folder.root) == OLD and not folder.replaced.place.exists()


def test_a_run_that_stands_has_replaced_the_old_one(folder):
    replace(folder, fail=False)
    assert contents(folder.root).keys() == {"checkpoints/last.pt", "config.yaml", "environment.json", "notes.txt"}


def test_a_run_that_is_stopped_on_purpose_keeps_both(folder):
    with pytest.raises(KeyboardInterrupt), folder.giving_back(KeyboardInterrupt):
        folder.create(force=True)
        folder.last.write_text("new")
        raise KeyboardInterrupt
    folder.release()
    assert folder.last.read_text() == "new" and RunFolder(folder.replaced.place).merged.read_text() == OLD["merged.pt"]
    RunFolder(folder.root).recover()
    assert folder.last.read_text() == "new", "it may be resumed"
    other = RunFolder(folder.root)
    with pytest.raises(KeyError), other.giving_back():
        other.create(force=True)
        assert not folder.last.exists()
        raise KeyError
    assert contents(folder.root) == OLD, "not the run without an epoch, the one before it"


def run_until(point: int, folder: RunFolder, fail: bool) -> bool:
    """Replace a run in a process that ends at the n-th moment before or after a change; tell whether it got through."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == point:
                os._exit(9)
            result = function(*arguments, **options)
            count += 1
            if count == point:
                os._exit(9)
            return result

        return call

    try:
        for name in ("replace", "unlink", "rmdir", "mkdir", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(KeyError):
            replace(folder, fail=fail)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("fail", [True, False], ids=["fails", "stands"])
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_change_loses_nothing(folder, tmp_path, step, fail):
    """The old run comes back, or is kept, until the new one stands. Quick: every ninth moment; slow: every one."""
    backup, point = shutil.copytree(folder.root, tmp_path / "backup"), 1
    while not run_until(point, RunFolder(folder.root), fail):
        after = RunFolder(folder.root)
        after.recover()
        found = contents(after.root)
        assert found["notes.txt"] == OLD["notes.txt"]
        kept = contents(after.replaced.place) if after.replaced.is_there() else found
        stands = not fail and not after.replaced.is_there() and found.get("config.yaml") == "new config.yaml"
        assert stands or OLD.items() <= (found | kept).items(), f"point {point}: {sorted(found)}"
        shutil.rmtree(folder.root)
        shutil.copytree(backup, folder.root)
        point += step
    assert point > 40


@pytest.mark.parametrize(
    "note", ["", "{}", '{"state": "whole"}', '{"state": "whole", "files": ["../precious"]}', '{"files": 3, "state": 1}']
)
def test_a_folder_that_is_not_ours_is_left_alone(folder, note):
    folder.replaced.place.mkdir()
    folder.replaced.note.write_text(note)
    (folder.root.parent / "precious").write_text("mine")
    before = contents(folder.root.parent)
    folder.recover()
    with pytest.raises(InputError, match="has the name of the folder that keeps a replaced run; move it elsewhere"):
        folder.create(force=True)
    assert contents(folder.root.parent) == before


def test_what_somebody_puts_beside_the_replaced_run_stays(folder):
    with folder.giving_back():
        folder.create(force=True)
        (folder.replaced.place / "mine.txt").write_text("mine")
        folder.stands()
    assert (folder.replaced.place / "mine.txt").read_text() == "mine"


def test_a_file_that_is_read_is_not_replaced(folder, tmp_path):
    (tmp_path / "link.pt").symlink_to(folder.merged)
    for source in (folder.merged, tmp_path / "link.pt"):
        with pytest.raises(InputError, match="is what is read, and --force would replace it; copy it elsewhere"):
            folder.check(force=True, reads=[source])
    folder.check(force=True, reads=[folder.root / "notes.txt", tmp_path / "none"])


def test_files_that_cannot_be_moved_stay(folder, monkeypatch):
    real = os.replace

    def refuse(source, target):
        if Path(source).name == "last.pt" and "replaced" in Path(target).parts:
            raise OSError(18, "Invalid cross-device link")
        return real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"last.pt: cannot be moved to .*replaced \(Invalid cross-device link\)"):
        folder.create(force=True)
    assert contents(folder.root) == OLD
