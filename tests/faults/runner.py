"""Runs fuzzing in other processes and survives what happens to them."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from children import START

from faults import fuzz as program
from faults.fuzz import CASE_SECONDS

TESTS = Path(__file__).parents[1]


@dataclass
class Result:
    """What became of the cases of one kind."""

    cases: int = 0
    outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(kinds: list[str], first: int, count: int, folder: Path, *, forked: bool = False) -> dict[str, Result]:
    """Run cases `first` to `first + count` of each kind.

    A process that dies or hangs has failed at the case it was at; another one goes on behind it. Each is a new process,
    or a fork of this one, which has the imports already.
    """
    results = {kind: Result() for kind in kinds}
    remaining, start = list(kinds), first
    while remaining:
        batch = remaining if start == first else remaining[:1]
        lines, end = _process(batch, start, first + count - start, folder, forked)
        running = None
        for line in lines:
            result = results[line["kind"]]
            if "start" in line:
                running = line
                continue
            running = None
            result.cases += 1
            result.outcomes[line["outcome"]] += 1
            if line["outcome"] == "failed":
                result.failures.append(f"{line['kind']} {line['case']}: {line['detail']}")
        if running is None and end == "ended":
            remaining, start = ([] if start == first else remaining[1:]), first
            continue
        kind, number = (running["kind"], running["start"]) if running else (remaining[0], start)
        results[kind].cases += 1
        results[kind].outcomes["failed"] += 1
        results[kind].failures.append(f"{kind} {number}: the process {end}")
        remaining, start = remaining[remaining.index(kind) :], number + 1
        if start >= first + count:
            remaining, start = remaining[1:], first
    return results


def _process(kinds: list[str], first: int, count: int, folder: Path, forked: bool) -> tuple[list[dict], str]:
    """Run one process; return its lines, and how it ended: "ended", "hung", or with which code it died."""
    folder.mkdir(parents=True, exist_ok=True)
    log, errors = folder / "cases.jsonl", folder / "errors.txt"
    arguments = ["+".join(kinds), str(first), str(count), str(folder)]
    if forked:
        process = multiprocessing.get_context(START).Process(target=_run, args=(arguments, log, errors))
        process.start()
        process.join(10 * CASE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return _lines(log), "hung"
        return _lines(log), _end(process.exitcode, errors)
    command = [sys.executable, "-m", "faults.fuzz", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as out, open(errors, "wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=TESTS.parent)
        size, changed, allowed = 0, time.monotonic(), 10 * CASE_SECONDS  # the first line waits for the imports
        while process.poll() is None:
            time.sleep(0.1)
            if log.stat().st_size != size:
                size, changed, allowed = log.stat().st_size, time.monotonic(), 3 * CASE_SECONDS
            if time.monotonic() - changed > allowed:
                process.kill()
                process.wait()
                return _lines(log), "hung"
    return _lines(log), _end(process.returncode, errors)


def _run(arguments: list[str], log: Path, errors: Path) -> None:
    """Fuzz in a fork, with its output in the files."""
    for path, descriptor in ((log, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # Not the streams that pytest captures.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    program.main(arguments)


def _end(code: int | None, errors: Path) -> str:
    return "ended" if code == 0 else f"died with code {code}: {errors.read_text()[-1500:]}"


def _lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
