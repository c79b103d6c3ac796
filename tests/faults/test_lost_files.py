"""No command loses a file of the user's: commands times what may stand in their way.

Each attempt notes every file, link and pipe of the user's, calls `main(argv)` and looks again. A command may refuse, in
one line, or do its work; in both cases nothing of the user's has changed, and nothing half-written is left.
"""

import contextlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from s2d3d.atomic import MARK as WORK_MARK
from s2d3d.prepare import folder as folder_module
from s2d3d.prepare.folder import CONVERSION, MARK
from s2d3d.prepare.shapes import write_shapes
from s2d3d.runs.folder import RunFolder

STORED = Path(__file__).parents[1] / "runs" / "fixtures" / "checkpoint_v1.pt"
PRECIOUS = b"the only copy"


def listing(folder: Path) -> dict[str, object]:
    """Return what lies below a folder: content of files, targets of links, kinds of the rest; links not followed."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(place, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = ("link", os.readlink(path))
            elif path.is_file():
                found[key] = path.read_bytes()
            else:
                found[key] = "folder" if path.is_dir() else "special"
    return found


class Attempt:
    """One call of a tool in a folder of its own, and what became of the files there."""

    def __init__(self, tool, home: Path) -> None:
        self.tool, self.home = tool, home
        self.before: dict[str, object] = {}

    def __call__(self, name: str, *argv: object, may_go: tuple[str, ...] = ()) -> int:
        """Call a tool; `may_go` are what it was told to replace, and what lies below."""
        self.before = listing(self.home)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = self.tool(name).main([str(argument) for argument in argv])
        after, text = listing(self.home), err.getvalue()
        gone = {key for key, value in self.before.items() if after.get(key) != value}
        gone = {key for key in gone if not any(key == name or key.startswith(f"{name}/") for name in may_go)}
        assert not gone, f"{sorted(gone)} changed: {text}"
        assert code in (0, 1) and "Traceback" not in text, text
        if code:
            assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1, text
        new = after.keys() - self.before.keys()
        assert not [key for key in new if key.split("/")[0].endswith(".tmp")], f"left: {new}"
        if code:
            assert not [key for key in new if not any(key == n or key.startswith(f"{n}/") for n in may_go)], new
        return code


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """Small inputs for all attempts: data sets, meshes, a cloud."""
    home = tmp_path_factory.mktemp("stock")
    write_shapes(home / "set", num_train=24, num_test=12, num_points=32, seed=0)
    corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    faces = [(0, 1, 3), (0, 3, 2), (4, 5, 7), (4, 7, 6), (0, 1, 5), (0, 5, 4), (2, 3, 7), (2, 7, 6)]
    text = f"OFF\n{len(corners)} {len(faces)} 0\n" + "".join(f"{x} {y} {z}\n" for x, y, z in corners)
    text += "".join(f"3 {a} {b} {c}\n" for a, b, c in faces)
    for split in ("train", "test"):
        for number in range(2):
            path = home / "meshes" / "box" / split / f"box_{number:04d}.off"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    np.savetxt(home / "cloud.xyz", np.random.default_rng(0).normal(size=(64, 3)))
    return home


@pytest.fixture
def attempt(tool, tmp_path, stock, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(STORED, home / "sparse.pt")
    shutil.copyfile(stock / "cloud.xyz", home / "cloud.xyz")
    (home / "precious").write_bytes(PRECIOUS)
    monkeypatch.chdir(home)
    return Attempt(tool, home)


def first_quick(commands):
    """The first command always, the others, which write in the same way, with the slow tests."""
    first, *others = commands
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def first_row_and_column_quick(names, kinds):
    """All pairs: those with the first name or the first kind always, the others with the slow tests."""
    pairs = [(name, kind) for name in names for kind in kinds]
    first = names[0], next(iter(kinds))
    return [pair if set(pair) & set(first) else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


# Commands that write one file

WRITERS = {
    "merge": ("merge", "--checkpoint", "sparse.pt", "--output", "out.pt"),
    "safetensors": ("merge", "--checkpoint", "sparse.pt", "--output", "out.safetensors"),
    "apply_ewa": ("apply_ewa", "--checkpoint", "sparse.pt", "--share-rate", "0.3", "--output", "out.pt"),
    "predict": ("predict", "--checkpoint", "sparse.pt", "--output", "out.json", "cloud.xyz"),
}  # fmt: skip


def _file(path):
    path.write_bytes(PRECIOUS)


def _link(path):
    path.symlink_to("precious")


def _pipe(path):
    os.mkfifo(path)


def _folder(path):
    path.mkdir()
    (path / "file").write_bytes(PRECIOUS)


def _like_ours(path):
    """A folder with the name and the mark of a workspace, and a file that no workspace has."""
    _folder(path)
    (path / WORK_MARK).write_text("out")


BESIDE = ("{out}.tmp", ".{out}.tmp", ".{out}.abcdefgh.tmp", "{out}~", "{out}.bak")
"""Names of other files beside the output that a writer may be tempted to use."""
KINDS = {"file": _file, "link": _link, "pipe": _pipe, "folder": _folder, "like ours": _like_ours}
OWN_PLACE = ("file", "link", "dangling", "pipe", "folder", "input", "link to input", "hard link to input")


@pytest.mark.parametrize(("name", "kind"), first_row_and_column_quick(BESIDE, KINDS))
@pytest.mark.parametrize("command", first_quick(WRITERS))
def test_what_lies_beside_the_output_stays(attempt, command, name, kind):
    tool, *argv = WRITERS[command]
    out = argv[argv.index("--output") + 1]
    KINDS[kind](attempt.home / name.format(out=out))
    assert attempt(tool, *argv) == 0 and (attempt.home / out).is_file()


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("kind", OWN_PLACE)
@pytest.mark.parametrize("command", WRITERS)
def test_what_has_the_place_of_the_output(attempt, command, kind, force):
    tool, *argv = WRITERS[command]
    out = argv[argv.index("--output") + 1]
    place = attempt.home / out
    if kind == "input":
        argv[argv.index("--output") + 1] = out = "sparse.pt"
    elif kind == "link to input":
        place.symlink_to("sparse.pt")
    elif kind == "hard link to input":
        os.link(attempt.home / "sparse.pt", place)
    elif kind == "dangling":
        place.symlink_to("nowhere")
    else:
        KINDS[kind](place)
    replaced = force and kind in ("file", "link", "dangling")
    code = attempt(tool, *argv, *(["--force"] if force else []), may_go=(out,) if replaced else ())
    assert code == (0 if replaced else 1)
    assert (attempt.home / "precious").read_bytes() == PRECIOUS and not (attempt.home / "nowhere").exists()


# Data sets

MAKERS = {
    "shapes": ("shapes", "--num-train", 12, "--num-test", 12, "--num-points", 16, "--seed", 3),
    "copy": ("modelnet40", "--from", "set"),
    "convert": ("modelnet40", "--from", "meshes", "--num-points", 16, "--workers", 1),
    "scan": ("scan", "--from", "set", "--workers", 1, "--num-points", 16),
}  # fmt: skip
FROM = ("copy", "convert", "scan")


def make(attempt, stock, command, *, source=None, output="out", may_go=(), force=True):
    argv = [source if part in ("set", "meshes") and source else part for part in MAKERS[command]]
    for name in ("set", "meshes"):
        if name in argv and not (attempt.home / name).exists():
            shutil.copytree(stock / name, attempt.home / name)
    argv += ["--output", output, *(["--force"] if force else [])]
    return attempt("prepare_data", *argv, may_go=may_go)


def standing(attempt, stock) -> Path:
    return Path(shutil.copytree(stock / "set", attempt.home / "out"))


FOREIGN = {
    "note": lambda out: _file(out / "notes.txt"),
    "hidden": lambda out: _file(out / ".git"),
    "folder": lambda out: _folder(out / "photos"),
    "link": lambda out: (out / "more").symlink_to("../precious"),
    "dangling": lambda out: (out / "more").symlink_to("nowhere"),
    "pipe": lambda out: _pipe(out / "pipe"),
    "other set": lambda out: _file(out / "ply_data_train7.h5"),
    "cache": lambda out: _folder(out / ".fps_cache"),
    "list is a link": lambda out: ((out / "test_files.txt").unlink(), _link(out / "test_files.txt")),
    "scans": lambda out: _folder(out / "main_split"),
    "empty folder": lambda out: (out / "empty").mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", MAKERS)
def test_force_does_not_replace_a_set_with_other_files_in_it(attempt, stock, command, kind):
    FOREIGN[kind](standing(attempt, stock))
    assert make(attempt, stock, command) == 1


@pytest.mark.parametrize("where", ["inside", "same", "deep", "link into it", "through a link"])
@pytest.mark.parametrize("command", FROM)
def test_a_source_in_the_output_stays(attempt, stock, command, where):
    kind = "meshes" if command == "convert" else "set"
    out, output = standing(attempt, stock), "out"
    source = {"inside": "out/source", "same": "out", "deep": "out/a/b/source"}.get(where, "out/source")
    if where != "same":
        shutil.copytree(stock / kind, attempt.home / source)
    if where == "link into it":
        (attempt.home / "elsewhere").symlink_to(source)
        source = "elsewhere"
    if where == "through a link":
        (attempt.home / "elsewhere").symlink_to("out")
        output = "elsewhere"
    assert make(attempt, stock, command, source=source, output=output) == 1 and out.is_dir()


PLACES = {
    "file": _file, "link": lambda path: path.symlink_to("set"), "dangling": lambda path: path.symlink_to("nowhere"),
    "pipe": _pipe, "folder": _folder,
}  # fmt: skip


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("command", MAKERS)
def test_what_is_no_set_stays(attempt, stock, command, kind, force):
    PLACES[kind](attempt.home / "out")
    assert make(attempt, stock, command, force=force) == 1


@pytest.mark.parametrize("command", MAKERS)
def test_a_set_stays_without_force(attempt, stock, command):
    standing(attempt, stock)
    assert make(attempt, stock, command, force=False) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".out.partial", ".out.tmp", ".out.abcdefgh.tmp", "out.tmp", "out.old"])
@pytest.mark.parametrize("command", first_quick(["copy", "shapes", "convert"]))
def test_what_lies_beside_a_set_stays(attempt, stock, command, name, kind):
    KINDS[kind](attempt.home / name)
    code = make(attempt, stock, command, may_go=("out",))
    assert code == (1 if (command, name) == ("convert", ".out.partial") else 0)


@pytest.mark.parametrize("note", ["{}", "[]", '{"kind": "off"}', "text"])
def test_a_folder_with_another_note_is_no_unfinished_conversion(attempt, stock, note):
    _folder(attempt.home / ".out.partial")
    (attempt.home / ".out.partial" / CONVERSION).write_text(note)
    assert make(attempt, stock, "convert") == 1


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("command", ["shapes", "copy", "convert"])
def test_a_set_that_cannot_be_replaced_is_put_back(attempt, stock, command, call, monkeypatch):
    standing(attempt, stock)
    real, calls = os.replace, []

    def fail(source, target, **options):
        if "out" in (Path(source).name, Path(target).name) and Path(target).name not in (MARK, CONVERSION):
            calls.append(target)
            if len(calls) == call:
                raise PermissionError(13, "Permission denied", str(source))
        return real(source, target, **options)

    monkeypatch.setattr(folder_module.os, "replace", fail)
    assert make(attempt, stock, command, may_go=(".out.partial",)) == 1 and len(calls) >= call
    assert listing(attempt.home / "out") == listing(stock / "set")


@pytest.mark.parametrize("command", ["copy", "convert"])
def test_a_source_that_turns_out_damaged_leaves_the_set(attempt, stock, command):
    standing(attempt, stock)
    kind = "meshes" if command == "convert" else "set"
    shutil.copytree(stock / kind, attempt.home / kind)
    last = sorted((attempt.home / kind).rglob("*.off" if command == "convert" else "*test*.h5"))[-1]
    last.write_bytes(last.read_bytes()[:40])
    assert make(attempt, stock, command, may_go=(".out.partial",)) == 1


# Runs

FILES_OF_OTHERS = (
    "metrics.json.tmp", "config.yaml.tmp", "checkpoints/last.pt.tmp", "checkpoints/best.pt.tmp", ".last.pt.tmp",
    "analysis.json", "analysis.png", "robustness.json", "wandb.json", "tensorboard/events.out.tfevents.1.x",
    "report.html", "plots/training.png",
    "replaced/notes.txt", "checkpoints/mine.pt", "last.pt", "notes.txt", ".metrics.json.abcdefgh.tmp/new",
    "checkpoints/.last.pt.abcdefgh.tmp/file", "wandb/x",
)  # fmt: skip


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("name", FILES_OF_OTHERS)
def test_a_new_run_touches_no_file_of_others(tmp_path, name, force):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(PRECIOUS)
    folder = RunFolder(tmp_path / "run")
    folder.create(force=force)
    with folder.giving_back():
        folder.stands()
    folder.release()
    assert path.read_bytes() == PRECIOUS
    with pytest.raises(KeyError), folder.giving_back():
        raise KeyError
    assert path.read_bytes() == PRECIOUS


@pytest.fixture
def finished(attempt, stock):
    """A finished run as its files: whatever happens before the new run stands, they come back."""
    shutil.copytree(stock / "set", attempt.home / "set")
    folder = RunFolder(attempt.home / "run")
    folder.last.parent.mkdir(parents=True)
    for path in (folder.environment, folder.log, folder.metrics, folder.last, folder.best, folder.analysis):
        path.write_bytes(PRECIOUS)
    shutil.copyfile(STORED, folder.merged)
    (folder.root / "notes.txt").write_bytes(PRECIOUS)
    return folder


TINY = (
    "data.root=set", "output_dir=run", "data.num_points=32", "model.depth=2", "model.trans_dim=8", "model.num_heads=2",
    "model.num_group=4", "model.group_size=4", "model.encoder_dims=8", "model.encoder_width=4", "train.epochs=2",
    "optim.warmup_epochs=1", "train.batch_size=8", "train.device=cpu",
)  # fmt: skip


@pytest.mark.parametrize(
    "problem",
    ["bad data", "own pretrained", "linked pretrained", "own config", "dies at once", "dies later", "cannot save"],
)
def test_force_keeps_the_finished_run_until_the_new_one_stands(
    attempt, finished, repository, stock, monkeypatch, problem
):
    from s2d3d import Trainer
    from s2d3d.errors import TrainingError

    config, more = repository / "configs" / "demo.yaml", []
    finished.config.write_text("# mine\n" + config.read_text())
    if problem == "bad data":
        (attempt.home / "set" / "test_files.txt").unlink()
    elif problem == "own pretrained":
        more = ["model.pretrained=run/merged.pt"]
    elif problem == "linked pretrained":
        (attempt.home / "start.pt").symlink_to("run/merged.pt")
        more = ["model.pretrained=start.pt"]
    elif problem == "own config":
        config = "run/config.yaml"
    elif problem == "cannot save":

        def full(self):
            raise OSError(28, "No space left on device", str(self.folder.last))

        monkeypatch.setattr(Trainer, "_save", full)
    else:
        monkeypatch.setattr(Trainer, "_train_epoch", _dies(problem, TrainingError))
    assert attempt("train", config, *TINY, *more, "--force") == 1
    assert not finished.replaced.place.exists()


def _dies(problem, error):
    def die(self):
        if problem == "dies later":
            self._save()
        raise error(f"not finite; last good checkpoint: {self.folder.last_good()}")

    return die


def test_force_replaces_the_run_when_the_new_one_stands(attempt, finished, repository):
    argv = (repository / "configs" / "demo.yaml", *TINY, "--force")
    names = ("environment.json", "log.csv", "metrics.json", "checkpoints", "merged.pt", "analysis.json", "config.yaml")
    gone = tuple(f"run/{name}" for name in names)
    assert attempt("train", *argv, "train.epochs=1", "optim.warmup_epochs=0", may_go=gone) == 0
    assert not finished.replaced.place.exists() and not finished.analysis.exists() and finished.metrics.is_file()


def test_there_are_two_hundred_attempts(request):
    """The quick ones alone, where the whole page is run."""
    own = [item for item in request.session.items if item.fspath == request.node.fspath]
    quick = [item for item in own if item.get_closest_marker("slow") is None]
    assert len(quick) >= 200 or request.session.testscollected < 200
