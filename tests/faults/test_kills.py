"""A run that is killed, at any moment and as often as it may be, ends with the weights of one that was not.

Quick ones of this kind are in tests/training/test_resilience.py and test_trainer.py.
"""

import random
import signal
import time

import pytest

from faults.training import Ended, Runs, end

KILLS, TERMS = 30, 10


@pytest.mark.slow
def test_a_kill_at_every_write(runs, record):
    """Every call that changes a file, before and after it: nothing depends on luck."""
    points = int(runs.reference().out.split("points ")[1])
    failures = []
    for point in range(1, points + 1):
        ended = runs.go("--force", die_at=point) if not runs.folder.root.exists() else runs.go(die_at=point)
        failures += problem(runs, f"point {point}", ended, -signal.SIGKILL)
        done = runs.go()
        failures += [f"point {point}: {text}" for text in ([done.err] if done.code else runs.complaints())]
        remove(runs)
    record("kill -9 at every write of a run", points, failures=failures, resumed=points - len(failures))
    assert points > 60 and not failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "count"), [(signal.SIGKILL, KILLS), (signal.SIGTERM, TERMS)], ids=["kill", "terminate"]
)
def test_signals_at_random_moments(runs, record, number, count):
    """A run is hit again and again until it gets through; then the next one, until `count` hits are made."""
    started = time.monotonic()
    runs.reference()
    duration, rng = time.monotonic() - started, random.Random(int(number))
    hits, finished, failures = 0, 0, []
    while hits < count:
        pid = runs.start()
        time.sleep(rng.uniform(0, 0.9 * duration))
        was_there = end(pid, number)
        ended = runs.wait()
        if was_there and ended.code != 0:
            hits += 1
            expected = (-number, 128 + number) if number == signal.SIGTERM else (-number,)
            failures += problem(runs, f"hit {hits}", ended, *expected)
            if ended.code == 128 + number and " --resume " not in ended.err:
                failures.append(f"hit {hits}: no advice in {ended.err!r}")
        elif ended.code == 0:
            finished += 1
            failures += runs.complaints()
            remove(runs)
        else:
            failures.append(f"after hit {hits}: code {ended.code}, {ended.err[-500:]}")
            break
    if runs.folder.root.exists() and not failures:
        done = runs.go()
        failures += [done.err] if done.code else runs.complaints()
    record(f"{number.name} at random moments", hits, failures=failures, resumed=hits - len(failures))
    assert hits == count and not failures


def problem(runs: Runs, where: str, ended: Ended, *codes: int) -> list[str]:
    """Check a process that was hit: its code, and that every checkpoint of its run can be read."""
    found = [] if ended.code in codes else [f"{where}: code {ended.code}, {ended.err[-500:]}"]
    try:
        runs.newest()
    except ValueError as error:
        found.append(f"{where}: {error}")
    return found


def remove(runs: Runs) -> None:
    """Let the next run start anew."""
    for path in sorted(runs.folder.root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    runs.folder.root.rmdir()
