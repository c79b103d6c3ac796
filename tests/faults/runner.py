"""Runs fuzzing in other processes and survives what happens to them."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from faults.fuzz import CASE_SECONDS

TESTS = Path(__file__).parents[1]


@dataclass
class Result:
    """What became of the cases of one kind."""

    cases: int = 0
    outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(kinds: list[str], first: int, count: int, folder: Path) -> dict[str, Result]:
    """Run cases `first` to `first + count` of each kind.

    A process that dies or hangs has failed at the case it was at; another one goes on behind it.
    """
    results = {kind: Result() for kind in kinds}
    remaining, start = list(kinds), first
    while remaining:
        lines, end = _process(remaining if start == first else remaining[:1], start, first + count - start, folder)
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


def _process(kinds: list[str], first: int, count: int, folder: Path) -> tuple[list[dict], str]:
    """Run one process; return its lines, and how it ended: "ended", "hung", or with which code it died."""
    folder.mkdir(parents=True, exist_ok=True)
    log, errors = folder / "cases.jsonl", folder / "errors.txt"
    command = [sys.executable, "-m", "faults.fuzz", "+".join(kinds), str(first), str(count), str(folder)]
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
    end = "ended" if process.returncode == 0 else f"died with code {process.returncode}: {errors.read_text()[-1500:]}"
    return _lines(log), end


def _lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
