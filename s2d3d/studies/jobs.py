"""Parallel runs of a study: as processes on this machine, or as cluster jobs through submitit."""

import contextlib
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from ..errors import InputError
from ..machine import choose_device
from ..optional import optional
from ..training.signals import SignalWatch
from .cell import Cell, cell_to_dict, single_threaded

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.2
WORKER = "s2d3d.studies.worker"


@dataclass
class Outcome:
    """The result of a call of `run_study`.

    Attributes:
        finished: runs that finished in this call.
        failed: by run, the reason of its failure.
        exit_code: 0; 1 if a run failed; 128 + number of the signal that stopped the study.
    """

    finished: list[Cell] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    exit_code: int = 0

    def fail(self, cell: Cell, reason: str) -> None:
        """Record a failed run, and log the error at once."""
        logger.error(f"error: {cell} failed: {reason}")
        self.failed[str(cell)] = reason
        self.exit_code = 1


class Job(Protocol):
    """A run in progress."""

    def poll(self) -> str | None:
        """Return None while it runs, "" after success, else the reason of the failure in one line."""

    def stop(self) -> None:
        """Request that the run saves its state and ends. Returns immediately."""


class Launcher(Protocol):
    """Starts runs in parallel to this process."""

    def start(self, cell: Cell) -> Job:
        """Start a run."""


def run_concurrently(cells: Sequence[Cell], launcher: Launcher, limit: int) -> Outcome:
    """Run `cells`, at most `limit` at a time. On SIGTERM or Ctrl-C, stop all, wait until they are saved, and return.

    A second Ctrl-C does not wait.

    Args:
        cells: the runs, in starting order.
        launcher: starts a run.
        limit: maximum number of simultaneous runs, at least 1.
    """
    outcome, waiting, running = Outcome(), list(cells), list[tuple[Cell, Job]]()
    signals, stopped = SignalWatch(), False
    with signals.watching():
        while running or (waiting and not signals.signum):
            while waiting and len(running) < limit and not signals.signum:
                cell = waiting.pop(0)
                logger.info(f"start {cell}, {len(waiting)} more wait")
                running.append((cell, launcher.start(cell)))
            if signals.signum and not stopped:
                stopped = True
                logger.info(f"stopping {len(running)} runs; the same command continues them")
                for _, job in running:
                    job.stop()
            reasons = [(cell, job, job.poll()) for cell, job in running]
            running = [(cell, job) for cell, job, reason in reasons if reason is None]
            for cell, _, reason in reasons:
                if reason is None:
                    continue
                if reason == "":
                    logger.info(f"finished {cell}")
                    outcome.finished.append(cell)
                elif not stopped:
                    outcome.fail(cell, reason)
            time.sleep(POLL_SECONDS if running else 0)
    if signals.signum:
        outcome.exit_code = 128 + signals.signum
    return outcome


RUN_BYTES = 4 * 10**9
"""Memory that a run may take, for the number of those that start at the same time unasked."""


def default_jobs(cells: Sequence[Cell], max_runs: int | None) -> int:
    """Return how many runs to do at the same time if nobody says so: on a CPU one on each core, elsewhere one.

    Runs of one thread side by side finish sooner than one after another with all threads: `docs/benchmarks.md`. A user
    who has set `OMP_NUM_THREADS` has chosen the threads of a run, and gets one at a time.

    Args:
        cells: the missing runs.
        max_runs: how many of them to do, None: all.
    """
    devices = {choose_device(name).type for name in {cell.config.train.device for cell in cells}}
    if os.environ.get("OMP_NUM_THREADS") or devices != {"cpu"}:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else RUN_BYTES
    return max(1, min(cores, len(cells), max_runs or len(cells), memory // RUN_BYTES))


class ProcessLauncher:
    """Starts each run as a separate Python process with one thread, on separate cores if there are enough.

    The output of a run goes to `seedN.log` next to its folder. If the parent process ends for any reason, the run stops
    as on SIGTERM.
    """

    def __init__(self, jobs: int) -> None:
        """Divide the cores of this process among `jobs` simultaneous runs, at least 1."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        share = len(cores) // jobs
        self.shares = [cores[slot * share : (slot + 1) * share] for slot in range(jobs)]
        self.jobs: list[_ProcessJob | None] = [None] * jobs

    def start(self, cell: Cell) -> "_ProcessJob":
        """See `Launcher`."""
        slot = next(slot for slot, job in enumerate(self.jobs) if job is None or job.poll() is not None)
        folder = Path(cell.config.output_dir)
        folder.parent.mkdir(parents=True, exist_ok=True)
        package = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
        }  # fmt: skip
        log = folder.with_name(f"{folder.name}.log")
        with open(log, "ab") as output, _pinned(self.shares[slot]):
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER], stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops its runs once
            )  # fmt: skip
        request = json.dumps(cell_to_dict(single_threaded(cell)))
        assert process.stdin is not None  # a pipe, as asked for above
        with contextlib.suppress(BrokenPipeError):  # a worker that died at once: its exit code says so
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
        job = _ProcessJob(process, process.stdin, log)
        self.jobs[slot] = job
        return job


class _ProcessJob:
    def __init__(self, process: subprocess.Popen[bytes], stdin: IO[bytes], log: Path) -> None:
        self.process, self.stdin, self.log = process, stdin, log

    def poll(self) -> str | None:
        code = self.process.poll()
        if code is None:
            return None
        self.stdin.close()
        if code == 0:
            return ""
        if code < 0:
            hint = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
            return f"killed by signal {-code}{hint}; see {self.log}"
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"{lines[-1].removeprefix('error: ') if lines else f'exit code {code}'} (log: {self.log})"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


class SubmititLauncher:
    """Starts each run as a job through submitit (optional, `pip install "s2d3d[slurm]"`).

    A job that is preempted or runs out of time is queued again. It continues from its last checkpoint.
    """

    def __init__(self, cluster: str, folder: str | Path, options: Sequence[str] = ()) -> None:
        """Prepare the executor; nothing is submitted.

        Args:
            cluster: "slurm", "local" (processes here) or "debug" (in this process, with a debugger at an error).
            folder: for submitit's own files, visible from all nodes.
            options: `KEY=VALUE` for submitit's `update_parameters`, such as `slurm_partition=gpu`, `timeout_min=600`,
                `gpus_per_node=1`; a value of digits is a whole number.

        Raises:
            InputError: submitit is missing, the cluster is not available, or an option is unknown.
        """
        with optional("submitit", "--submitit", extra="slurm"):
            submitit = importlib.import_module("submitit")
        pairs = [option.partition("=") for option in options]
        for option, (key, _, value) in zip(options, pairs):
            if not key or not value:
                raise InputError(f"--submitit-option: expected KEY=VALUE, got '{option}'")
        try:
            self.executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
            parameters = {key: int(value) if value.isdecimal() else value for key, _, value in pairs}
            self.executor.update_parameters(**{"timeout_min": 24 * 60, **parameters})
        except (NameError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--submitit {cluster}: {' '.join(str(error).split())}") from None

    def start(self, cell: Cell) -> "_SubmittedJob":
        """See `Launcher`."""
        from .worker import CellTask

        return _SubmittedJob(self.executor.submit(CellTask(cell_to_dict(cell))))


class _SubmittedJob:
    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> str | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        if error is None:
            return ""
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        named = [line for line in lines if re.match(r"[\w.]+(Error|Signal|Interrupt): ", line)]  # ends a traceback
        return f"{(named or lines)[-1]} (log: {self.job.paths.stderr})"

    def stop(self) -> None:
        self.job.cancel()


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Restrict processes that start inside the context to these cores; no cores: no restriction."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
