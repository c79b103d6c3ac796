"""Contestants in processes of their own: they start, answer in turn, report errors, and end."""

import os
import signal
import time
from functools import partial

import pytest
import torch

from benchmarks.interleave import DEFAULT, Contestant, Skip, Task, interleave
from benchmarks.presets import PUBLIC_BERT
from benchmarks.training import ModelSpec, build_step
from benchmarks.worker import WorkerRunner, workers
from s2d3d.errors import InputError

CPU = torch.device("cpu")


def note_turns(path, name):
    """Make a task that notes when its run starts and ends, and in which process."""

    def run():
        with open(path, "a") as file:
            file.write(f"{name} {os.getpid()} starts\n{name} {os.getpid()} ends\n")

    return Task(run, lambda: [torch.arange(3.0)], lambda: {"pid": os.getpid(), "threads": torch.get_num_threads()})


def skip():
    raise Skip("not here")


def mistake():
    raise InputError("a mistake")


def fault():
    raise KeyError("a fault")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_contestant_has_a_process_and_its_turns(tmp_path):
    diary = tmp_path / "diary"
    listed = [
        Contestant("a", partial(note_turns, str(diary), "a")),
        Contestant("b", partial(note_turns, str(diary), "b"), allocator=DEFAULT),
        Contestant("c", skip),
    ]
    result = interleave("apart", listed, start=workers(CPU, 1), rounds=2, warmup=1, restart=False)
    lines = [line.split() for line in diary.read_text().splitlines()]
    assert [name for name, _, word in lines if word == "starts"] == ["a", "b", "a", "b", "b", "a"]
    assert all(first[:2] == second[:2] for first, second in zip(lines[::2], lines[1::2])), "one at a time"
    pids = {name: int(pid) for name, pid, _ in lines}
    assert len({*pids.values(), os.getpid()}) == 3
    assert {name: facts["pid"] for name, facts in result.facts.items()} == pids
    assert all(facts["threads"] == 1 and facts["peak_bytes"] > 10**7 for facts in result.facts.values())
    assert result.skipped == {"c": "not here"} and result.deviations == {"a": None, "b": 0.0}
    assert all(seconds > 0 for times in result.times.values() for seconds in times)
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def count_runs(path, seconds=0.0):
    """Make a task that counts its runs in a file; it takes a while to build."""
    time.sleep(seconds)

    def run():
        with open(path, "a") as file:
            file.write("x")

    return Task(run, lambda: [torch.arange(3.0)])


def test_contestants_that_begin_ahead_build_side_by_side_and_are_compared_alike(tmp_path):
    listed = [Contestant(name, partial(count_runs, str(tmp_path / name), 0.3)) for name in "abc"]
    listed += [Contestant("d", skip), Contestant("e", partial(count_runs, str(tmp_path / "e")), same_math=False)]
    runners, start = [], workers(CPU, 1, ahead=True)

    def starting(contestant):
        assert all(runner._ahead for runner in runners), "none is waited for before all have started"
        runners.append(start(contestant))
        return runners[-1]

    result = interleave("ahead", listed, start=starting, rounds=2, warmup=1, restart=False)
    assert result.skipped == {"d": "not here"}
    assert result.deviations == {"a": None, "b": 0.0, "c": 0.0, "e": None}
    assert all((tmp_path / name).read_text() == 4 * "x" for name in "abce"), "one ahead, one to warm up, two rounds"
    assert all(len(times) == 2 and min(times) > 0 for times in result.times.values())
    assert all(not runner.process.is_alive() for runner in runners)


@pytest.mark.parametrize(
    ("build", "message"), [(mistake, "^a mistake$"), (die, "contestant 'x': its process ended with code -9")]
)
def test_what_goes_wrong_ahead_is_raised_and_ends_all(build, message):
    runners, start = [], workers(CPU, 1, ahead=True)

    def starting(contestant):
        runners.append(start(contestant))
        return runners[-1]

    with pytest.raises(InputError, match=message):
        interleave("ahead", [Contestant("x", build), Contestant("y", skip)], start=starting)
    assert len(runners) == 2 and all(not runner.process.is_alive() for runner in runners)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (skip, Skip, "^not here$"),
        (mistake, InputError, "^a mistake$"),
        (fault, RuntimeError, "(?s)contestant 'x':.*KeyError: 'a fault'"),
        (die, InputError, "contestant 'x': its process ended with code -9; killed, probably for lack of memory"),
    ],
)
def test_what_goes_wrong_there_is_raised_here(build, error, message):
    with pytest.raises(error, match=message):
        WorkerRunner("x", build, DEFAULT, CPU, 1)


def test_models_of_other_processes_are_equal():
    spec = PUBLIC_BERT.quick
    listed = [
        Contestant("reference", partial(build_step, spec.but(source="reference")), allocator=DEFAULT),
        Contestant("ours", partial(build_step, spec.but(experts=4))),
    ]
    result = interleave("models", listed, start=workers(CPU, 1), rounds=1, warmup=1)
    assert 0 < result.deviations["ours"] < 1e-4


def test_specifications_are_plain_values():
    """They cross to other processes, and identify what was measured."""
    spec = ModelSpec("point_bert", dict(depth=2))
    assert spec.but(batch=4) == ModelSpec("point_bert", dict(depth=2), batch=4) != spec
