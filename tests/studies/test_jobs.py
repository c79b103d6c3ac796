"""Runs beside this process: the loop that starts and stops them with made-up jobs, then real processes and submitit."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from s2d3d.errors import InputError
from s2d3d.studies import jobs as study_jobs
from s2d3d.studies.cell import cell_from_dict, cell_to_dict, single_threaded
from s2d3d.studies.jobs import ProcessLauncher, SubmititLauncher, run_concurrently
from s2d3d.studies.plan import load_study
from s2d3d.studies.run import run_study
from s2d3d.studies.store import read_records


@pytest.fixture
def cells(write_study):
    return load_study(write_study(seeds=[0, 1, 2])).cells


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(study_jobs, "POLL_SECONDS", 0.001)


class MadeUp:
    """Starts jobs that end after some polls, each as it is told; notes how many run at a time."""

    def __init__(self, polls=3, reasons=(), on_poll=lambda launcher: None):
        self.polls, self.reasons, self.on_poll = polls, dict(reasons), on_poll
        self.started, self.running, self.most, self.stopped = [], set(), 0, []

    def start(self, cell):
        launcher, name = self, str(cell)
        self.started.append(name)
        self.running.add(name)
        self.most = max(self.most, len(self.running))

        class Job:
            left = self.polls

            def poll(self):
                launcher.on_poll(launcher)
                self.left -= 1
                if self.left > 0:
                    return None
                launcher.running.discard(name)
                return launcher.reasons.get(name, "" if name not in launcher.stopped else "stopped")

            def stop(self):
                launcher.stopped.append(name)
                self.left = 2

        return Job()


@pytest.mark.parametrize("limit", [1, 2, 4, 100])
def test_all_runs_are_started_in_order_and_no_more_at_a_time(cells, limit):
    launcher = MadeUp()
    outcome = run_concurrently(cells, launcher, limit)
    assert launcher.started == [str(cell) for cell in cells] and launcher.most == min(limit, len(cells))
    assert sorted(map(str, outcome.finished)) == sorted(launcher.started)
    assert (outcome.exit_code, outcome.failed) == (0, {})


def test_a_run_that_fails_leaves_the_others_alone(cells):
    outcome = run_concurrently(cells, MadeUp(reasons={"s2d/seed0": "no memory"}), 2)
    assert outcome.failed == {"s2d/seed0": "no memory"} and outcome.exit_code == 1
    assert len(outcome.finished) == len(cells) - 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_what_runs_once_waits_for_it_and_starts_nothing_more(cells, signum):
    polls = []

    def strike(launcher):
        polls.append(len(launcher.running))
        if len(polls) == 4:
            signal.raise_signal(signum)

    launcher = MadeUp(polls=50, on_poll=strike)
    outcome = run_concurrently(cells, launcher, 2)
    assert launcher.started == launcher.stopped == [str(cell) for cell in cells[:2]]
    assert not launcher.running, "it waited"
    assert outcome.exit_code == 128 + signum and outcome.failed == {}, "stopped is not failed"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_passes_through_json_unchanged(cells):
    for cell in cells:
        plain = json.loads(json.dumps(cell_to_dict(cell)))
        assert cell_from_dict(plain) == cell


def test_a_run_side_by_side_has_one_thread(cells):
    changed = single_threaded(cells[0])
    assert changed.config.train.num_threads == 1 and cells[0].config.train.num_threads is None
    assert changed.config.model_copy(update={"train": cells[0].config.train}) == cells[0].config


# Processes


class Popen(subprocess.Popen):
    """A worker that tells its cores and threads instead of training."""

    def __init__(self, command, **kwargs):
        assert command == [sys.executable, "-m", "s2d3d.studies.worker"]
        program = (
            "import json, os, sys; task = json.loads(sys.stdin.readline()); cores = os.sched_getaffinity(0); "
            "print(json.dumps({'cores': sorted(cores), 'threads': os.environ['OMP_NUM_THREADS'], "
            "'config': task['config']['train']['num_threads'], 'session': os.getsid(0) == os.getpid()})); "
            "print('error: the last line') if task['seed'] == 1 else None; "
            "os.kill(os.getpid(), 9) if task['seed'] == 2 else sys.exit(task['seed'])"
        )
        super().__init__([sys.executable, "-c", program], **kwargs)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin processes to cores")
def test_processes_have_cores_and_one_thread_and_say_why_they_failed(cells, monkeypatch, tmp_path):
    monkeypatch.setattr(study_jobs.subprocess, "Popen", Popen)
    before = os.sched_getaffinity(0)
    jobs = min(2, len(before))
    launcher = ProcessLauncher(jobs)
    assert (
        sorted(core for share in launcher.shares for core in share) == sorted(before)[: jobs * (len(before) // jobs)]
    ), "no core twice"
    chosen = [cell for cell in cells if cell.arm == "dense"]
    outcome = run_concurrently(chosen, launcher, jobs)
    assert os.sched_getaffinity(0) == before
    assert [str(cell) for cell in outcome.finished] == ["dense/seed0"] and outcome.exit_code == 1
    log = tmp_path / "runs" / "dense" / "seed1.log"
    assert outcome.failed["dense/seed1"] == f"the last line (log: {log})"
    assert outcome.failed["dense/seed2"].startswith("killed by signal 9, perhaps for lack of memory; see ")
    for seed in range(3):
        said = json.loads((tmp_path / "runs" / "dense" / f"seed{seed}.log").read_text().splitlines()[0])
        assert said["cores"] in launcher.shares and (said["threads"], said["config"], said["session"]) == ("1", 1, True)


def test_more_jobs_than_cores_are_not_pinned():
    many = ProcessLauncher(1000)
    assert many.shares == [[]] * 1000


# submitit


def test_submitit_runs_a_study(write_study, tmp_path):
    """Its debug cluster runs each job in this process."""
    pytest.importorskip("submitit")
    study = load_study(write_study(seeds=[0]))
    launcher = SubmititLauncher("debug", tmp_path / "jobs", ["timeout_min=5"])
    outcome = run_study(study, results=tmp_path / "results", launcher=launcher, jobs=2)
    assert outcome.exit_code == 0 and len(outcome.finished) == 2
    assert set(read_records(tmp_path / "results", study.cells)) == {("dense", 0), ("s2d", 0)}


MESSAGE = """Job (task=0) failed during processing with trace:
----------------------
Traceback (most recent call last):
  File "worker.py", line 1, in __call__
s2d3d.errors.InputError: nowhere: no such folder; make it with: prepare_data.py
----------------------
You can check full logs with 'job.stderr(0)' and 'job.stdout(0)' or at paths:
  - jobs/1_0_log.err"""
"""What submitit says of a job that failed."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, ""),
        (RuntimeError(MESSAGE), "s2d3d.errors.InputError: nowhere: no such folder; make it with: prepare_data.py"),
        (RuntimeError("the job\nwas lost"), "was lost"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_reason_of_a_failure_is_the_line_that_ends_its_traceback(cells, monkeypatch, tmp_path, error, reason):
    pytest.importorskip("submitit")
    polls, stops = iter([False, True]), []
    job = SimpleNamespace(
        done=lambda: next(polls), exception=lambda: error, paths=SimpleNamespace(stderr="1_0_log.err"),
        cancel=lambda: stops.append(True),
    )  # fmt: skip
    launcher = SubmititLauncher("local", tmp_path / "jobs")
    monkeypatch.setattr(launcher.executor, "submit", lambda task: job)
    started = launcher.start(cells[0])
    assert started.poll() is None
    assert started.poll() == (f"{reason} (log: 1_0_log.err)" if error else "")
    started.stop()
    assert stops == [True]


@pytest.mark.slow
def test_submitit_tells_a_failure(write_study, tmp_path):
    """In a process of its own, which imports torch only to fail."""
    pytest.importorskip("submitit")
    study = load_study(write_study(seeds=[0]), ["data.root=nowhere"])
    launcher = SubmititLauncher("local", tmp_path / "jobs")
    outcome = run_study(study, results=tmp_path / "results", launcher=launcher, max_runs=1)
    assert outcome.exit_code == 1
    reason = outcome.failed["dense/seed0"]
    assert reason.startswith("s2d3d.errors.InputError: nowhere: no such folder; make it with") and "(log: " in reason


def test_submitit_queues_a_preempted_run_again(cells):
    submitit = pytest.importorskip("submitit")
    from s2d3d.studies.worker import CellTask

    task = CellTask(cell_to_dict(cells[0]))
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is task


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [
        ("debug", ["timeout_min"], r"--submitit-option: expected KEY=VALUE, got 'timeout_min'"),
        ("debug", ["no_such=1"], r"--submitit debug: .*no_such"),
    ],
)
def test_submitit_options_are_checked(tmp_path, cluster, options, message):
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match=message):
        SubmititLauncher(cluster, tmp_path / "jobs", options)


def test_missing_submitit_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r'^--submitit needs submitit .*: pip install "s2d3d\[slurm\]"$'):
        SubmititLauncher("slurm", tmp_path)
