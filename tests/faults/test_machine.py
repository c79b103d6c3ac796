"""Faults of the machine: a full disk, data that changes under a run, a process of several that dies or hangs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from weights import log_rows

from faults.training import Runs, end, same_weights
from s2d3d.runs.folder import RunFolder

WITHIN = 60
"""Seconds in which a process must notice that another one is gone."""
SLOW_UPDATES = (
    "import time\n"
    "from functools import partialmethod\n"
    "from s2d3d import Callback, Trainer\n"
    "class Slow(Callback):\n"
    "    def on_update(self, trainer):\n"
    "        time.sleep(0.05)\n"
    "Trainer.__init__ = partialmethod(Trainer.__init__, callbacks=[Slow()])\n"
)
"""Run before a training: leaves time to do something to it."""


@pytest.fixture
def small_disk(tmp_path):
    """Make file systems of a given size; `resize` changes them."""
    mounted = []

    def make(name: str, size: int) -> Path:
        place = tmp_path / name
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    def resize(place: Path, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)

    make.resize = resize
    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
def test_full_disks_of_many_sizes(runs, small_disk, record, tmp_path):
    """The disk is full at the first write, in the middle, at the last one; then there is room again."""
    runs.reference()
    needed = sum(path.stat().st_size for path in runs.whole.root.rglob("*") if path.is_file())
    sizes = [int(needed * share / 16) for share in range(1, 25, 2)]
    stopped, failures = 0, []
    for number, size in enumerate(sizes):
        disk = small_disk(f"disk{number}", max(size, 8192))
        runs.folder = RunFolder(disk / "run")
        ended = runs.go(f"output_dir={runs.folder.root}")
        if ended.code:
            stopped += 1
            errors = ended.err.splitlines()[-1:]
            if ended.code != 1 or not errors or not re.match(r"error: .*No space left on device", errors[0]):
                failures.append(f"{size} bytes: code {ended.code}, {ended.err[-600:]}")
        failures += [f"{size} bytes: {path} was left" for path in runs.folder.root.rglob("*.tmp")]
        try:
            runs.newest()
        except ValueError as error:
            failures.append(f"{size} bytes: {error}")
        small_disk.resize(disk, 10 * needed)
        done = runs.go(f"output_dir={runs.folder.root}")
        failures += [f"{size} bytes: {text}" for text in ([done.err[-600:]] if done.code else runs.complaints())]
    record("full disk", len(sizes), failures=failures, stopped=stopped, had_room=len(sizes) - stopped)
    assert stopped > 5 and not failures


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20_000])


def replace(path: Path) -> None:
    with h5py.File(path, "r") as file:
        points, labels, axis = file["data"][()], file["label"][()], file.attrs["up_axis"]
    path.unlink()
    with h5py.File(path, "w") as file:
        file["data"], file["label"], file.attrs["up_axis"] = points[::-1], labels, axis


@pytest.mark.slow
def test_data_that_changes_under_a_run(runs, shapes_root, tmp_path, record):
    """Points in memory are not touched by it; a streamed set stops with a message, and goes on once it is back."""
    runs.reference()
    data, failures, outcomes = tmp_path / "data", [], {"unaffected": 0, "stopped": 0}
    cases = [(change, budget) for change in (cut, replace, Path.unlink) for budget in (4.0, 1e-9)]
    for change, budget in cases:
        where = f"{change.__name__}, budget {budget}"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(shapes_root, data)
        runs.folder = RunFolder(tmp_path / f"run {change.__name__} {budget}")
        options = (f"output_dir={runs.folder.root}", f"data.root={data}", f"data.memory_budget_gb={budget}")
        runs.start(*options, prelude=SLOW_UPDATES)
        while not runs.folder.log.exists():  # the first epoch is over
            time.sleep(0.02)
        change(data / "ply_data_train0.h5")
        ended = runs.wait()
        if ended.code == 0:
            outcomes["unaffected"] += 1
        else:
            outcomes["stopped"] += 1
            message = ended.err.splitlines()[-1]
            if not re.match(r"error: .*ply_data_train0\.h5: (has changed since it was opened|no such file)", message):
                failures.append(f"{where}: {ended.err[-600:]}")
            if change is replace:
                other = runs.go(*options)
                if "was trained on other clouds" not in other.err:
                    failures.append(f"{where}: resumed on other clouds: {other.err[-600:]}")
            shutil.copy(shapes_root / "ply_data_train0.h5", data)
            ended = runs.go(*options)
        failures += [f"{where}: {text}" for text in ([ended.err[-600:]] if ended.code else runs.complaints())]
    record("data cut short, replaced or removed during a run", len(cases), failures=failures, **outcomes)
    assert outcomes == {"unaffected": 3, "stopped": 3} and not failures


# Several processes


RANKS = """
import os, runpy, sys, time
from datetime import timedelta
from functools import partialmethod
from s2d3d import Callback, Trainer
from s2d3d import machine as runtime

timeout, notes, *arguments = sys.argv[1:]
runtime.PEER_TIMEOUT = timedelta(seconds=float(timeout))

class Noted(Callback):
    def on_update(self, trainer):
        with open(f"{notes}/rank{trainer.runtime.rank}", "w") as file:
            file.write(f"{os.getpid()} {trainer.progress.updates}")
        time.sleep(0.05)

Trainer.__init__ = partialmethod(Trainer.__init__, callbacks=[Noted()])
sys.argv = ["tools/train.py", *arguments]
runpy.run_path("tools/train.py", run_name="__main__")
"""


class Ranks:
    """Two processes under torchrun, one of which something happens to."""

    def __init__(self, repository: Path, config: Path, notes: Path, port: int) -> None:
        self.repository, self.config, self.notes, self.port = repository, config, notes, port
        self.script = notes / "ranks.py"
        self.script.write_text(RANKS)

    def start(self, timeout: float, *arguments: object) -> subprocess.Popen:
        """Start both; their messages go to a file."""
        for path in self.notes.glob("rank[01]"):
            path.unlink()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={self.port}",
            self.script, timeout, self.notes, self.config, *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(self.repository), "OMP_NUM_THREADS": "1"}
        with open(self.notes / "messages.txt", "w") as messages:
            return subprocess.Popen(
                list(map(str, command)), cwd=self.repository, env=environment, stdout=messages, stderr=messages
            )

    def messages(self) -> str:
        """Return what the processes printed."""
        return (self.notes / "messages.txt").read_text(errors="replace")

    def wait_for(self, process: subprocess.Popen, rank: int, updates: int) -> int:
        """Wait until a rank has made some updates; return its process id."""
        note, deadline = self.notes / f"rank{rank}", time.monotonic() + 300
        while time.monotonic() < deadline:
            text = note.read_text().split() if note.exists() else []
            if len(text) == 2 and int(text[1]) >= updates:
                return int(text[0])
            assert process.poll() is None, self.messages()[-3000:]
            time.sleep(0.05)
        raise AssertionError(self.messages()[-3000:])


@pytest.fixture
def ranks(repository, shapes_root, runs: Runs, tmp_path) -> Ranks:
    notes = tmp_path / "notes"
    notes.mkdir()
    return Ranks(repository, runs.config, notes, 29_621)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "timeout"),
    [(1, signal.SIGKILL, 600), (0, signal.SIGKILL, 600), (1, signal.SIGSTOP, 10)],
    ids=["rank 1 dies", "rank 0 dies", "rank 1 hangs"],
)
def test_the_others_notice_that_a_process_is_gone(ranks, runs, record, tmp_path, rank, number, timeout, request):
    """They stop with a message within a minute, and together they resume to the weights of a quiet run."""
    whole = RunFolder(tmp_path / "whole")
    process = ranks.start(600, f"output_dir={whole.root}")
    assert process.wait(600) == 0, ranks.messages()[-3000:]
    process = ranks.start(timeout)
    pid = ranks.wait_for(process, rank, 6)
    end(pid, number)
    started, failures = time.monotonic(), []
    try:
        code = process.wait(WITHIN + 60)
    except subprocess.TimeoutExpired:
        process.kill()
        code = "still running"
    seconds = time.monotonic() - started
    if code in (0, "still running") or seconds > WITHIN + (timeout if number == signal.SIGSTOP else 0):
        failures.append(f"code {code} after {seconds:.0f} s")
    if "another process of this run has ended or does not answer" not in ranks.messages():
        failures.append(f"no message: {ranks.messages()[-3000:]}")
    process = ranks.start(600, "--resume", runs.folder.root)
    if process.wait(600) != 0:
        failures.append(ranks.messages()[-3000:])
    else:
        same = same_weights(runs.folder.merged, whole.merged) and log_rows(runs.folder) == log_rows(whole)
        failures += [] if same else ["the resumed run differs"]
    failures += [f"{path} was left" for path in runs.folder.root.rglob("*.tmp")]
    name = request.node.callspec.id
    record(f"{name} under torchrun", 1, failures=failures, resumed=1 - bool(failures))
    assert not failures
