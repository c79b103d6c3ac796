"""The process that fuzzes: cases of one kind, each a function of its number, under limits of memory and time.

Run as `python -m faults.fuzz KIND FIRST COUNT FOLDER`; it prints one JSON line before each case and one after it, so
that the process which reads them knows which case ended or hung this one.
"""

import json
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

CASE_SECONDS = 30
EXTRA_BYTES = 3 * 2**29
"""What a case may allocate beyond what the process has when it starts."""
KINDS = ("yaml", "override", "h5", "checkpoint", "command")


class Outcome(NamedTuple):
    """How a case ended: "refused" in the wanted form, "accepted", or "failed", and why."""

    kind: str
    detail: str = ""


class Hung(BaseException):
    """A case took too long; no `except Exception` may swallow this."""


def refused(message: str, starts: tuple[str, ...], what: object = "") -> Outcome:
    """Judge an error: lines of bounded length that each begin with what is wrong."""
    lines = message.splitlines()
    if lines and all(line.startswith(starts) and len(line) < 6000 and line.isprintable() for line in lines):
        return Outcome("refused")
    return Outcome("failed", f"message {message[:500]!r} for {what!r}")


def accepted(fine: bool, complaint: str, what: object = "") -> Outcome:
    """Judge what was taken for good."""
    return Outcome("accepted") if fine else Outcome("failed", f"{complaint}: {what!r}")


def limit_memory() -> None:
    """Bound the address space; HDF5 and torch fail with an error above it, which is a finding."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        limit = pages * os.sysconf("SC_PAGE_SIZE") + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def build(kind: str, folder: Path):
    """Return the function that runs a case of a kind."""
    repository = Path(__file__).parents[2]
    if kind in ("yaml", "override"):
        from faults.fuzz_config import ConfigCases

        return getattr(ConfigCases(folder, repository / "configs" / "demo.yaml"), kind)
    if kind == "h5":
        from faults.fuzz_h5 import H5Cases

        return H5Cases(folder).run
    if kind == "checkpoint":
        from faults.fuzz_checkpoint import CheckpointCases

        return CheckpointCases(folder).run
    from faults.fuzz_command import CommandCases

    return CommandCases(folder, repository).run


def run_case(case, number: int, kind: str) -> Outcome:
    """Run one case; whatever escapes from it is a failure."""

    def hang(signum: int, frame: object) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(CASE_SECONDS)
    try:
        return case(random.Random(f"{kind} {number}"))
    except Hung:
        return Outcome("failed", f"took more than {CASE_SECONDS} s")
    except BaseException:
        return Outcome("failed", traceback.format_exc()[-2500:])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def main(arguments: list[str]) -> None:
    kind, first, count, folder = arguments
    stream = os.fdopen(os.dup(1), "w", buffering=1)  # what a case prints must not be taken for a line of ours
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in kind.split("+"):
        place = Path(folder, name)
        place.mkdir(parents=True, exist_ok=True)
        case = build(name, place)
        limit_memory()
        for number in range(int(first), int(first) + int(count)):
            stream.write(json.dumps({"kind": name, "start": number}) + "\n")
            outcome = run_case(case, number, name)
            result = {"kind": name, "case": number, "outcome": outcome.kind, "detail": outcome.detail}
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
