"""The times of several contestants, round by round, and the ratios that follow from them."""

from dataclasses import dataclass, field
from typing import Any

from .stats import Interval, Spread, estimate, ratios, spread
from .timing import CPU, WALL


@dataclass
class Comparison:
    """The times of all contestants, round by round.

    Attributes:
        name: short, for measures and files.
        title: for readers: what is timed.
        base: the contestant that ratios refer to.
        times: seconds of one run by contestant, one for each round, on the wall.
        tolerance: largest deviation of a number in the outputs that was allowed.
        deviations: largest one found; None where nothing was compared.
        notes: by contestant.
        skipped: reasons by contestant that did not take part.
        facts: what the tasks reported.
        repeats: runs whose mean is one entry of `times`, by contestant.
        samples: clouds, or other items, of one run; 0 where throughput means nothing.
        cpu_times: like `times`, in processor time; empty in results of versions that did not measure it.
        clock: the times that ratios and targets refer to, of `CLOCKS`.
        starts: rounds of each start of the contestants; empty means that all rounds are of one.
        resolve: half width of the intervals that was asked for; None: the number of rounds was fixed.
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
    cpu_times: dict[str, list[float]] = field(default_factory=dict)
    clock: str = WALL
    starts: list[int] = field(default_factory=list)
    resolve: float | None = None

    def seconds(self, name: str, clock: str | None = None) -> list[float]:
        """Return the seconds of one run in each round, by the comparison's clock or the given one."""
        return (self.cpu_times if (clock or self.clock) == CPU else self.times)[name]

    def time(self, name: str) -> Spread:
        """Summarise the seconds of one run."""
        return spread(self.seconds(name))

    def ratio(self, name: str, base: str | None = None, clock: str | None = None) -> Interval:
        """Estimate the time of a contestant over that of the base, from the ratios of the rounds."""
        pairs = ratios(self.seconds(name, clock), self.seconds(base or self.base, clock))
        return estimate(pairs, self.starts)

    def rate(self, name: str, items: float | None = None) -> Interval:
        """Estimate the items per second of a contestant; default: `samples` of one run."""
        count = self.samples if items is None else items
        return estimate([count / seconds for seconds in self.seconds(name)], self.starts)

    def missing(self, *names: str) -> str | None:
        """Return the reason why a contestant has no times, None if all have times."""
        reasons = (self.skipped.get(name, f"no contestant '{name}'") for name in names if name not in self.times)
        return next(reasons, None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON; `Comparison(**d)` is the way back."""
        return dict(vars(self))
