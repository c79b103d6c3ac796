"""Interleaved timing: results are checked first, then each contestant runs once per round."""

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from tqdm import tqdm

from s2d3d.errors import InputError

from .comparison import Comparison
from .stats import STARTS
from .timing import CLOCKS, WALL, Timer, Timing

logger = logging.getLogger(__name__)

KEPT, DEFAULT = "kept", "default"
"""Allocators of a worker process: glibc's with `keep_large_allocations`, and as the system has it."""


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
    def run(self, repeat: int) -> Timing: ...
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

    def run(self, repeat: int) -> Timing:
        return self.timer(self.task.run, repeat)

    def facts(self) -> dict[str, float]:
        return self.task.facts() if self.task.facts else {}

    def close(self) -> None:
        self._task = None


def local(timer: Timer) -> Start:
    """Return what starts contestants in this process."""
    return lambda contestant: LocalRunner(contestant.build(), timer)


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
    clock: str = WALL,
    resolve: float | None = None,
    budget: float = math.inf,
    restart: bool = True,
    pairs: Sequence[tuple[str, str]] = (),
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
        clock: the time that ratios refer to, of `CLOCKS`.
        resolve: go on after `rounds` until the interval of each pair is at most this wide to each side, relative to
            the ratio. None: stop after `rounds`.
        budget: seconds after which no further start begins; `rounds` and `STARTS` starts are completed all the same.
        restart: start the contestants anew, `STARTS` times or more, so that the intervals hold for another start as
            well: with `resolve` after each full cycle of orders, otherwise `rounds` are divided among the starts.
        pairs: (name, base) of the ratios to resolve; default: each contestant and the base.

    Raises:
        InputError: outputs deviate by more than the tolerance, names repeat, or no contestant can be measured.

    Example:
        >>> from functools import partial
        >>> from benchmarks.timing import make_timer
        >>> both = [Contestant(name, lambda: Task(partial(sum, range(99)))) for name in ("one", "two")]
        >>> result = interleave("sums", both, start=local(make_timer(torch.device("cpu"))), rounds=3)
        >>> len(result.times["two"]), result.ratio("one").value
        (3, 1.0)
    """
    names = [contestant.name for contestant in contestants]
    if len(set(names)) < len(names):
        raise InputError(f"{name}: contestants share a name: {', '.join(names)}")
    if rounds < 1:
        raise InputError(f"{name}: rounds is {rounds}, must be at least 1")
    assert clock in CLOCKS, clock
    logger.info(f"{name}: {', '.join(names)}")
    starts = (STARTS if resolve is not None else min(STARTS, rounds)) if restart else 1
    stop = _Stop(rounds, resolve, time.monotonic() + budget, starts, pairs)
    result = Comparison(name, title or name, "", {}, tolerance, samples=samples, clock=clock, resolve=resolve)
    present, index = list(contestants), 0
    with tqdm(desc=name, total=rounds if resolve is None else None, leave=False, disable=None) as bar:
        while not stop.is_reached(result):
            with _started(present, start, result) as runners:
                if not index:
                    present = [contestant for contestant in contestants if contestant.name in runners]
                    measurable = next((c.name for c in present if c.same_math), present[0].name)
                    result.base = base if base in runners else measurable
                    result.notes = {contestant.name: contestant.note for contestant in present if contestant.note}
                    result.deviations = _check_equal(name, present, runners, result.base, tolerance)
                    result.times, result.cpu_times = {c: [] for c in runners}, {c: [] for c in runners}
                result.repeats = _warm_up(runners, warmup, min_seconds)
                cycle = 2 * len(runners)
                if resolve is None:
                    cycle = math.ceil((rounds - index) / (starts - len(result.starts)))
                result.starts.append(0)
                while cycle and not (result.starts[-1] and stop.is_reached(result)):
                    for _ in range(cycle):
                        for turn in order(list(runners), index):
                            timing = runners[turn].run(result.repeats[turn])
                            result.times[turn].append(timing.wall)
                            result.cpu_times[turn].append(timing.cpu)
                        index += 1
                        bar.update()
                    result.starts[-1] += cycle
                    cycle = 0 if restart else cycle
                facts = {contestant: runner.facts() for contestant, runner in runners.items()}
                result.facts = {contestant: values for contestant, values in facts.items() if values}
    return result


@dataclass
class _Stop:
    """When a comparison ends: see `interleave`.

    Attributes:
        rounds: fewest rounds.
        resolve: widest half width of an interval; None: `rounds` are enough.
        ends: time after which no further start begins, of `time.monotonic`.
        starts: fewest starts.
        pairs: whose ratios are watched.
        next_check: rounds at which the intervals are estimated again, which takes some time itself.
        resolved: the intervals were narrow enough at the last check.
    """

    rounds: int
    resolve: float | None
    ends: float
    starts: int
    pairs: Sequence[tuple[str, str]]
    next_check: int = 0
    resolved: bool = False

    def is_reached(self, result: Comparison) -> bool:
        """Tell whether a comparison has its rounds, and its intervals are narrow enough or its time is over."""
        done = sum(result.starts)
        if done < self.rounds or len(result.starts) < self.starts:
            return False
        if self.resolve is None or self.resolved or time.monotonic() >= self.ends:
            return True
        if done < self.next_check:
            return False
        self.next_check = math.ceil(1.1 * done)
        watched = [pair for pair in self.pairs if not result.missing(*pair)]
        watched = watched or [(contestant, result.base) for contestant in result.times if contestant != result.base]
        self.resolved = all(result.ratio(*pair).half_width <= self.resolve for pair in watched)
        return self.resolved


@contextlib.contextmanager
def _started(contestants: Sequence[Contestant], start: Start, result: Comparison) -> Iterator[dict[str, Runner]]:
    """Start contestants and close them in the end; note who cannot take part, which is decided by the first start."""
    runners: dict[str, Runner] = {}
    skipped: dict[str, str] = {}
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
        if not runners:
            raise InputError(f"{result.name}: no contestant can take part: {'; '.join(skipped.values())}")
        if result.starts and skipped:
            raise InputError(f"{result.name}: took part before, and cannot again: {'; '.join(skipped.values())}")
        result.skipped |= skipped
        yield runners
    finally:
        for runner in runners.values():
            runner.close()
        runners.clear()
        gc.collect()  # modules with hooks are circles: those of many starts filled the memory


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
            seconds[contestant] = min(seconds[contestant], runner.run(1).wall)
    return {name: max(1, math.ceil(min_seconds / taken)) if taken > 0 else 1 for name, taken in seconds.items()}
