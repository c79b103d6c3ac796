"""Runs of `tools/train.py` in forked processes that can be killed, and what must hold after they are resumed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from weights import log_rows

from s2d3d import load_checkpoint
from s2d3d.runs.folder import RunFolder

PROGRAM = """
import json, os, runpy, signal, sys, traceback
import s2d3d, torch
torch.set_num_threads(1)

def die_at(point):
    # Ends this process, as kill -9 does, before or after its n-th call that changes a file.
    import s2d3d.atomic as atomic
    count = 0
    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    for name in ("replace", "link", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    write, seen = atomic._Watched.write, 0
    def sometimes(self, data):
        nonlocal seen
        seen += 1
        return (counted(write) if seen % 150 == 0 else write)(self, data)
    atomic._Watched.write = sometimes
    return lambda: count

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number in (1, 2):
        os.dup2(os.open(request["streams"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    counted = die_at(request["die_at"]) if request["die_at"] is not None else None
    exec(request["prelude"])
    sys.argv = request["arguments"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    if counted:
        print("points", counted())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its code, minus the signal's number if one ended it, and what it printed."""

    code: int
    out: str
    err: str


class Launcher:
    """Starts runs that have the package imported already, which takes longer than a tiny run."""

    def __init__(self, repository: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}, bufsize=1,
        )  # fmt: skip

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *arguments: object) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def start(self, arguments: Sequence[object], streams: Sequence[Path], die_at: int | None, prelude: str) -> int:
        """Start one run; return its process id."""
        request = {"arguments": list(map(str, arguments)), "streams": list(map(str, streams))}
        request |= {"die_at": die_at, "prelude": prelude}
        self.process.stdin.write(json.dumps(request) + "\n")
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Wait for the run that was started last; return how it ended."""
        return int(self.process.stdout.readline())


class Runs:
    """Runs of one config, and the comparison with the run to which nothing happens."""

    def __init__(self, launcher: Launcher, config: Path, folder: Path) -> None:
        self.launcher, self.config, self.home = launcher, config, folder
        self.folder = RunFolder(folder / "run")
        self.whole = RunFolder(folder / "whole")
        self.streams = (folder / "stdout.txt", folder / "stderr.txt")

    def start(self, *arguments: object, die_at: int | None = None, prelude: str = "") -> int:
        """Start or resume the run, as a user who starts the same command again does."""
        resume = ["--resume", self.folder.root] if self._has_checkpoint() else []
        command = ["tools/train.py", self.config, *arguments, *resume]
        return self.launcher.start(command, self.streams, die_at, prelude)

    def wait(self) -> Ended:
        """Wait for the process that was started last."""
        return Ended(self.launcher.wait(), *(path.read_text(errors="replace") for path in self.streams))

    def go(self, *arguments: object, die_at: int | None = None, prelude: str = "") -> Ended:
        """Start or resume the run and wait for its end."""
        self.start(*arguments, die_at=die_at, prelude=prelude)
        return self.wait()

    def reference(self) -> Ended:
        """Train the run to which nothing happens; all files that it changes are counted."""
        command = ["tools/train.py", self.config, f"output_dir={self.whole.root}"]
        self.launcher.start(command, self.streams, 10**9, "")
        ended = self.wait()
        assert ended.code == 0, ended.err
        return ended

    def newest(self) -> int:
        """Return the updates that a resumed run starts from, -1 where there is no checkpoint; all are readable."""
        updates = [load_checkpoint(path)["progress"]["updates"] for path in self._resumable() if path.exists()]
        return max(updates, default=-1)

    def complaints(self) -> list[str]:
        """Compare the finished run with the one to which nothing happened; an empty list is equality."""
        found = []
        for name in ("last", "best", "merged"):
            mine, other = getattr(self.folder, name), getattr(self.whole, name)
            if not mine.exists() or not same_weights(mine, other):
                found.append(f"{name} differs")
        for epoch, path in self.whole.all_kept().items():
            if not self.folder.kept(epoch).exists() or not same_weights(self.folder.kept(epoch), path):
                found.append(f"the model kept of epoch {epoch} differs")
        if log_rows(self.folder) != log_rows(self.whole):
            found.append("the log differs")
        found += [f"{path} was left" for path in self.folder.root.rglob("*.tmp")]
        return found

    def _resumable(self) -> tuple[Path, Path]:
        return self.folder.last, self.folder.previous

    def _has_checkpoint(self) -> bool:
        return any(path.exists() for path in self._resumable())


def same_weights(first: Path, second: Path) -> bool:
    """Tell whether two checkpoints hold the same weights, bit for bit."""
    first, second = (load_checkpoint(path)["state_dict"] for path in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def end(pid: int, number: signal.Signals) -> bool:
    """Send a signal to a process that may have ended; tell whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
