"""What the tests of command lines share: one finished run, and ways to call a tool and see what it leaves behind."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import pytest
import torch
from launcher import launcher

from s2d3d import load_config
from s2d3d.config.load import dump_config
from s2d3d.prepare.shapes import write_shapes
from s2d3d.runs.folder import RunFolder

TINY = (
    "data.num_points=128", "data.augment.scale=null", "data.augment.shift=0", "model.depth=2", "model.trans_dim=24",
    "model.num_heads=2", "model.num_group=16", "model.group_size=8", "model.encoder_dims=32", "model.encoder_width=16",
    "model.drop_path_rate=0", "model.head_dropout=0", "model.init_std=0.1", "s2d.share_rate=0.05", "optim.lr=3e-3",
    "optim.warmup_epochs=1", "train.epochs=10", "train.batch_size=8", "train.label_smoothing=0", "eval.every=0",
    "log.report=false",
)  # fmt: skip
"""A run of two seconds that learns: it tells about half of the shapes, so that equal results mean something."""


@dataclass(frozen=True)
class Call:
    """What a tool returned and wrote."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Trained:
    """A run that `tools/train.py` finished in a process of its own."""

    config: Path
    folder: RunFolder
    process: subprocess.CompletedProcess

    @property
    def last(self) -> Path:
        return self.folder.last

    @property
    def merged(self) -> Path:
        return self.folder.merged


@pytest.fixture
def snapshot():
    """Return every file below some folders with its content, every folder with None."""

    def take(*folders: Path) -> dict[Path, bytes | None]:
        paths = (path for folder in folders for path in folder.rglob("*"))
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    return take


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """Run a tool in a process of its own that has the package imported already, which is most of a short command.

    `prelude` is code that the process runs first.
    """
    streams = [tmp_path_factory.mktemp("streams") / name for name in ("out", "err")]

    def run(name: str, *arguments: object, prelude: str = "") -> subprocess.CompletedProcess:
        command = [f"tools/{name}.py", *map(str, arguments)]
        code = launcher().run(command, streams, prelude)
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in streams))

    yield run
    launcher().process.stdin.close()
    assert launcher().process.wait(60) == 0


@pytest.fixture
def call(tool, capsys):
    """Run a tool in this process."""

    def run(name: str, *arguments: object) -> Call:
        code = tool(name).main([str(argument) for argument in arguments])
        return Call(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def finish(fork, repository, shapes_root, tmp_path_factory):
    """Make a run that a tool finishes in a process of its own."""

    def make(tool: str, config: str, *overrides: str) -> Trained:
        root = tmp_path_factory.mktemp("finished")
        folder = RunFolder(root / "run")
        given = [f"data.root={shapes_root}", f"output_dir={folder.root}", *overrides]
        path = root / "config.yaml"
        path.write_text(dump_config(load_config(repository / "configs" / config, given)))
        process = fork(tool, path)
        assert process.returncode == 0, process.stderr
        return Trained(path, folder, process)

    return make


@pytest.fixture(scope="session")
def trained(finish) -> Trained:
    return finish("train", "demo.yaml", *TINY)


@pytest.fixture
def refuses(call, snapshot, tmp_path, trained, shapes_root, recwarn):
    """Run a tool on a bad input; return its one line, after checking that this is all that it left."""

    def check(name: str, *arguments: object, code: int = 1) -> str:
        watched = (tmp_path, trained.folder.root, shapes_root)
        before = snapshot(*watched)
        result = call(name, *arguments)
        assert result.code == code, result
        assert result.out == ""
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        assert not recwarn.list, "a process would print them as well"
        after = snapshot(*watched)
        assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()
        return result.err.removeprefix("error: ").rstrip("\n")

    return check


@pytest.fixture
def unwritable(tmp_path) -> Iterator[Path]:
    """A folder in which nobody can make a file, root included."""
    if os.geteuid() == 0:
        if not Path("/proc").is_dir():
            pytest.skip("root can write everywhere here")
        yield Path("/proc")
        return
    folder = tmp_path / "readonly"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


@pytest.fixture
def no_gpu(monkeypatch):
    """Let this machine be one without a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# Data sets with something wrong


@pytest.fixture
def data_copy(shapes_root, tmp_path) -> Path:
    return shutil.copytree(shapes_root, tmp_path / "data", ignore=shutil.ignore_patterns(".fps_cache"))


def truncate(root: Path) -> None:
    path = root / "ply_data_train0.h5"
    path.write_bytes(path.read_bytes()[:-20_000])


def spoil_label(root: Path) -> None:
    with h5py.File(root / "ply_data_train0.h5", "a") as file:
        file["label"][7] = 12


def spoil_point(root: Path) -> None:
    with h5py.File(root / "ply_data_test0.h5", "a") as file:
        file["data"][5, 3, 1] = float("nan")


def drop_list(root: Path) -> None:
    (root / "test_files.txt").unlink()


def rename_class(root: Path) -> None:
    names = root / "shape_names.txt"
    names.write_text(names.read_text().replace("torus", "doughnut"))


BROKEN_DATA = {
    "truncated file": (truncate, "ply_data_train0.h5: not an HDF5 file, truncated or damaged", "fetch it again"),
    "label out of range": (
        spoil_label, "ply_data_train0.h5: dataset 'label' holds 12 in sample 7, must be in [0, 12)", "12 in sample 7",
    ),
    "NaN": (spoil_point, "ply_data_test0.h5: dataset 'data' holds NaN or infinity in sample 5", "remove it"),
    "missing list": (drop_list, "test_files.txt: no such file", "see data/README.md"),
}  # fmt: skip
"""What spoils a data set, the beginning of the message below the folder's name, and what it says to do."""


@pytest.fixture(params=BROKEN_DATA.values(), ids=BROKEN_DATA.keys())
def broken_data(request, data_copy) -> tuple[Path, str, str]:
    spoil, message, advice = request.param
    spoil(data_copy)
    return data_copy, f"{data_copy}/{message}", advice


@pytest.fixture
def renamed_data(data_copy) -> Path:
    """As many classes as in training, one of another name."""
    rename_class(data_copy)
    return data_copy


@pytest.fixture
def fewer_shapes(tmp_path) -> Path:
    root = tmp_path / "fewer"
    write_shapes(root, num_train=60, num_test=36, num_points=128, seed=0)
    return root


# Checkpoints with something wrong


class Payload:
    """Pickles to a call that makes a file, which is what a hostile checkpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def hostile(path: Path, trained: Trained) -> None:
    content = torch.load(trained.last, weights_only=True)
    torch.save({**content, "history": Payload(path.with_name("executed"))}, path)


def foreign_pickle(path: Path, trained: Trained) -> None:
    path.write_bytes(pickle.dumps(Payload(path.with_name("executed"))))


def half(path: Path, trained: Trained) -> None:
    whole = trained.last.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def beginning(path: Path, trained: Trained) -> None:
    path.write_bytes(trained.last.read_bytes()[:5000])


def flipped_bit(path: Path, trained: Trained) -> None:
    content = bytearray(trained.last.read_bytes())
    weight = torch.load(trained.last, weights_only=True)["state_dict"]["blocks.blocks.1.mlp.fc1.weight"]
    content[content.index(weight.numpy().tobytes()) + 100] ^= 0x40
    path.write_bytes(content)


def other_content(path: Path, trained: Trained) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def newer(path: Path, trained: Trained) -> None:
    torch.save({**torch.load(trained.last, weights_only=True), "format_version": 99}, path)


def no_weights(path: Path, trained: Trained) -> None:
    content = torch.load(trained.last, weights_only=True)
    del content["state_dict"]
    torch.save(content, path)


BROKEN_CHECKPOINTS = {
    "missing": (lambda path, trained: None, "no such checkpoint"),
    "folder": (lambda path, trained: path.mkdir(), ""),
    "empty": (lambda path, trained: path.touch(), "cannot be read as a checkpoint (truncated, damaged or"),
    "text": (lambda path, trained: path.write_text("seed: 0\n"), "cannot be read as a checkpoint (truncated, damaged"),
    "half": (half, "cannot be read as a checkpoint (truncated, damaged or something else"),
    "beginning": (beginning, "cannot be read as a checkpoint (truncated, damaged or something else"),
    "flipped bit": (flipped_bit, "cannot be read as a checkpoint (damaged: the checksum of its part"),
    "foreign pickle": (foreign_pickle, "cannot be read as a checkpoint ("),
    "hostile": (hostile, "it is more than data: its pickle calls"),
    "another program's": (other_content, "not a checkpoint of s2d3d; it needs one written by tools/train.py"),
    "newer": (newer, "checkpoint format 99, this s2d3d"),
    "incomplete": (no_weights, "checkpoint is incomplete, state_dict missing"),
}
"""What makes a file at a path, and what the message says of it."""


@pytest.fixture(params=BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS.keys())
def broken_checkpoint(request, tmp_path, trained) -> Iterator[tuple[Path, str]]:
    make, message = request.param
    path = tmp_path / "broken.pt"
    make(path, trained)
    yield path, message
    assert not (tmp_path / "executed").exists(), "code in a checkpoint was run"


PRETRAINING = (
    "data.name=shapes", "data.num_points=128", "model.trans_dim=24", "model.encoder_dims=24", "model.depth=2",
    "model.num_heads=2", "model.decoder_depth=2", "model.decoder_num_heads=2", "model.num_group=12",
    "model.group_size=8", "model.encoder_width=8", "s2d.kind=rup", "optim.warmup_epochs=1", "train.epochs=2",
    "train.batch_size=16", "eval.every=1",
)  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(finish) -> Trained:
    return finish("pretrain", "pretrain_mae_small.yaml", *PRETRAINING)
