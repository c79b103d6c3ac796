"""Interleaved timing: results are checked first, then each contestant runs once per round."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from s2d3d.errors import InputError

from .stats import Spread, ratios, spread

logger = logging.getLogger(__name__)

KEPT, DEFAULT = "kept", "default"
"""Allocators of a worker process: glibc's with `keep_large_allocations`, and as the system has it."""
Timer = Callable[[Callable[[], object], int], float]
"""Runs a function a number of times and returns the seconds of one run."""


class Skip(Exception):
    """A contestant cannot be measured; the text is the reason."""


@dataclass
class Task:
    """The work of a contestant, ready to run.

    Attributes:
        run: the work that is timed.
        outputs: returns results for the comparison with the base, from the initial state; called once, first.
        facts: returns numbers to report in addition to the times; called last.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]] | None = None
    facts: Callable[[], dict[str, float]] | None = None


@dataclass(frozen=True)
class Contestant:
    """One contestant of a comparison.

    Attributes:
        name: name in tables.
        build: makes the task; raises `Skip` if that is impossible. For a worker process it must be picklable: a
            `functools.partial` of a module's function.
        same_math: its outputs must equal those of the base. False: it computes something else; `note` explains it.
        tolerance: its own tolerance, for example for a lower precision; None: that of the comparison.
        allocator: `KEPT` or `DEFAULT`; used only in worker processes.
        note: remark for readers of the table.
    """

    name: str
    build: Callable[[], Task]
    same_math: bool = True
    tolerance: float | None = None
    allocator: str = KEPT
    note: str = ""


class Runner(Protocol):
    """A contestant that runs here or in another process."""

    def ready(self) -> None: ...
    def outputs(self) -> list[Tensor] | None: ...
    def run(self, repeat: int) -> float: ...
    def facts(self) -> dict[str, float]: ...
    def close(self) -> None: ...


Start = Callable[[Contestant], Runner]


class LocalRunner:
    """Runs a task in this process."""

    def __init__(self, task: Task, timer: Timer) -> None:
        self._task: Task | None = task
        self.timer = timer

    @property
    def task(self) -> Task:
        assert self._task is not None, "closed"
        return self._task

    def ready(self) -> None:
        """Do nothing: it was built before."""

    def outputs(self) -> list[Tensor] | None:
        return self.task.outputs() if self.task.outputs else None

    def run(self, repeat: int) -> float:
        return self.timer(self.task.run, repeat)

    def facts(self) -> dict[str, float]:
        return self.task.facts() if self.task.facts else {}

    def close(self) -> None:
        self._task = None


def local(timer: Timer) -> Start:
    """Return what starts contestants in this process."""
    return lambda contestant: LocalRunner(contestant.build(), timer)


def make_timer(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Return a timer for work on `device`: a clock, or events on a GPU; the device is idle before and after."""

    def wall(run: Callable[[], object], repeat: int) -> float:
        started = clock()
        for _ in range(repeat):
            run()
        return (clock() - started) / repeat

    def events(run: Callable[[], object], repeat: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(repeat):
            run()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000 / repeat

    return events if device.type == "cuda" else wall


@dataclass
class Comparison:
    """The times of all contestants, round by round.

    Attributes:
        name: short, for measures and files.
        title: for readers: what is timed.
        base: the contestant that ratios refer to.
        times: seconds of one run by contestant, one for each round.
        tolerance: largest deviation of a number in the outputs that was allowed.
        deviations: largest one found; None where nothing was compared.
        notes: by contestant.
        skipped: reasons by contestant that did not take part.
        facts: what the tasks reported.
        repeats: runs whose mean is one entry of `times`, by contestant.
        samples: clouds, or other items, of one run; 0 where throughput means nothing.
    """

    name: str
    title: str
    base: str
    times: dict[str, list[float]]
    tolerance: float
    deviations: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    samples: int = 0

    def time(self, name: str) -> Spread:
        """Summarise the seconds of one run."""
        return spread(self.times[name])

    def ratio(self, name: str, base: str | None = None) -> Spread:
        """Summarise the time of a contestant over that of the base, round by round."""
        return ratios(self.times[name], self.times[base or self.base])

    def speedup(self, name: str, base: str | None = None) -> Spread:
        """Summarise the time of the base over that of a contestant, round by round."""
        return ratios(self.times[base or self.base], self.times[name])

    def missing(self, *names: str) -> str | None:
        """Return the reason why a contestant has no times, None if all have times."""
        reasons = (self.skipped.get(name, f"no contestant '{name}'") for name in names if name not in self.times)
        return next(reasons, None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON; `Comparison(**d)` is the way back."""
        return dict(vars(self))


def interleave(
    name: str,
    contestants: Sequence[Contestant],
    *,
    start: Start,
    title: str = "",
    base: str | None = None,
    rounds: int = 10,
    warmup: int = 2,
    tolerance: float = 1e-4,
    min_seconds: float = 0.0,
    samples: int = 0,
) -> Comparison:
    """Compare contestants: build all, check that their results agree, warm up, then let each run once a round.

    Args:
        name: of the comparison.
        contestants: at least one, with different names.
        start: `local(timer)`, or `workers(...)` for separate processes.
        title: for readers.
        base: name of the contestant that others are compared with; default: the first. If it cannot be measured, the
            next measurable one is the base.
        rounds: number of rounds, at least 1.
        warmup: number of rounds before, not counted.
        tolerance: largest absolute deviation of any output from the base's, for contestants of equal mathematics.
        min_seconds: short work is repeated within its turn for about this time; its time is the mean.
        samples: items per run, for throughput.

    Raises:
        InputError: outputs deviate by more than the tolerance, names repeat, or no contestant can be measured.

    Example:
        >>> from functools import partial
        >>> both = [Contestant(name, lambda: Task(partial(sum, range(99)))) for name in ("one", "two")]
        >>> result = interleave("sums", both, start=local(make_timer(torch.device("cpu"))), rounds=3)
        >>> len(result.times["two"]), result.ratio("one").median
        (3, 1.0)
    """
    names = [contestant.name for contestant in contestants]
    if len(set(names)) < len(names):
        raise InputError(f"{name}: contestants share a name: {', '.join(names)}")
    if rounds < 1:
        raise InputError(f"{name}: rounds is {rounds}, must be at least 1")
    runners: dict[str, Runner] = {}
    skipped: dict[str, str] = {}
    logger.info(f"{name}: {', '.join(names)}")
    try:
        for contestant in contestants:
            try:
                runners[contestant.name] = start(contestant)
            except Skip as reason:
                skipped[contestant.name] = str(reason)
        for waited_for, runner in list(runners.items()):
            try:
                runner.ready()
            except Skip as reason:
                skipped[waited_for] = str(reason)
                runners.pop(waited_for).close()
        present = [contestant for contestant in contestants if contestant.name in runners]
        if not present:
            raise InputError(f"{name}: no contestant can take part: {'; '.join(skipped.values())}")
        base = base if base in runners else next((c.name for c in present if c.same_math), present[0].name)
        deviations = _check_equal(name, present, runners, base, tolerance)
        repeats = _warm_up(runners, warmup, min_seconds)
        times: dict[str, list[float]] = {contestant: [] for contestant in runners}
        for index in tqdm(range(rounds), desc=name, leave=False, disable=None):
            for turn in order(list(runners), index):
                times[turn].append(runners[turn].run(repeats[turn]))
        facts = {contestant: runner.facts() for contestant, runner in runners.items()}
    finally:
        for runner in runners.values():
            runner.close()
    return Comparison(
        name=name,
        title=title or name,
        base=base,
        times=times,
        tolerance=tolerance,
        deviations=deviations,
        notes={contestant.name: contestant.note for contestant in present if contestant.note},
        skipped=skipped,
        facts={contestant: values for contestant, values in facts.items() if values},
        repeats=repeats,
        samples=samples,
    )


def order(names: Sequence[str], index: int) -> list[str]:
    """Return the order of round `index`: each round starts with another one; each full cycle reverses the direction.

    Example:
        >>> [order("abc", index) for index in (0, 1, 3)]
        [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'b', 'a']]
    """
    cycle, first = divmod(index, len(names))
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if cycle % 2 else turned


def deviation(outputs: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of a number in two lists of tensors; infinite for NaN or other shapes."""
    if [o.shape for o in outputs] != [b.shape for b in base]:
        return math.inf
    largest = [float((o.double() - b.double()).abs().max()) for o, b in zip(outputs, base) if o.numel()]
    return max((math.inf if math.isnan(value) else value for value in largest), default=0.0)


def _check_equal(
    name: str, contestants: Sequence[Contestant], runners: dict[str, Runner], base: str, tolerance: float
) -> dict[str, float | None]:
    """Return the deviation of each contestant from the base; refuse a comparison if results differ."""
    expected = runners[base].outputs()
    found: dict[str, float | None] = {}
    for contestant in contestants:
        found[contestant.name] = None
        if contestant.name == base or not contestant.same_math or expected is None:
            continue
        allowed = tolerance if contestant.tolerance is None else contestant.tolerance
        distance = deviation(runners[contestant.name].outputs() or [], expected)
        if not distance <= allowed:
            raise InputError(
                f"{name}: results of '{contestant.name}' differ from those of '{base}' by {distance:.2g}, the "
                f"tolerance is {allowed:.2g}: what computes something else is not compared"
            )
        found[contestant.name] = distance
    return found


def _warm_up(runners: dict[str, Runner], warmup: int, min_seconds: float) -> dict[str, int]:
    """Run everything `warmup` times; return how many runs of each fill `min_seconds`."""
    seconds = dict.fromkeys(runners, math.inf)
    for _ in range(warmup):
        for contestant, runner in runners.items():
            seconds[contestant] = min(seconds[contestant], runner.run(1))
    return {name: max(1, math.ceil(min_seconds / taken)) if taken > 0 else 1 for name, taken in seconds.items()}
