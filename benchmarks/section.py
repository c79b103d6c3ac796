"""Common parts of the subcommands: their settings, and the form of their results."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .comparison import Comparison
from .hardware import hardware, machine_name
from .interleave import Start, local
from .stats import LEVEL, Interval, Spread, fit_exponent, spread
from .timing import WALL, Timer, make_timer
from .worker import workers

Choice = TypeVar("Choice")
BUDGET = 10.0
"""Longest time of a comparison that resolves its ratios, minutes, unless the user says otherwise."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Attributes:
        device: of all contestants.
        num_threads: of every process.
        rounds: of every comparison; None: each comparison has its own number.
        quick: tiny sizes and two rounds, to check that everything works; its numbers have no meaning.
        root: a data set in ModelNet layout for the `data` section; None makes procedural shapes.
        compile: also measure compiled models.
        force_bf16: measure bf16 even without hardware support.
        seed: of weights and inputs.
        clock: the time that ratios refer to, of `CLOCKS`; processor time is for a machine that others use as well.
        resolve: half width of an interval, relative to its ratio, that ends a comparison; None: its fixed rounds do.
        budget: longest time of a comparison with `resolve`, minutes.
        load_average: of the machine before anything is measured.
    """

    device: torch.device
    num_threads: int
    rounds: int | None = None
    quick: bool = False
    root: Path | None = None
    compile: bool = False
    force_bf16: bool = False
    seed: int = 0
    clock: str = WALL
    resolve: float | None = None
    budget: float = BUDGET
    load_average: tuple[float, ...] = field(default_factory=os.getloadavg)

    def pick(self, full: Choice, quick: Choice) -> Choice:
        """Return the size to use: the first, or the second in the quick form."""
        return quick if self.quick else full

    def interleaving(self, rounds: int, *, warmup: int = 2, min_seconds: float = 0.0) -> dict[str, Any]:
        """Return the keywords of `interleave` that say how long to measure."""
        if self.quick:
            return {"rounds": self.rounds or 2, "warmup": 1, "clock": self.clock, "restart": False}
        return {
            "rounds": self.rounds or rounds,
            "warmup": warmup,
            "min_seconds": min_seconds,
            "clock": self.clock,
            "resolve": self.resolve,
            "budget": 60 * self.budget,
            "restart": self.device.type != "cuda",  # there a start compiles for minutes
        }

    @property
    def timer(self) -> Timer:
        return make_timer(self.device)

    def here(self) -> Start:
        """Start contestants in this process."""
        return local(self.timer)

    def apart(self) -> Start:
        """Start each contestant in a separate process."""
        return workers(self.device, self.num_threads)


@dataclass
class Measure:
    """One number of the result, or the reason why it is missing.

    Attributes:
        value: the number.
        low: lower end of its interval, or its lower quartile; None where there is none.
        high: likewise the upper one.
        reason: why it was not measured.
        level: of the interval, such as 0.95; None: the ends are quartiles, or the number is exact.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    level: float | None = None


@dataclass
class Series:
    """A cost as a function of a size.

    Attributes:
        name: the size that grows.
        title: the work that is timed.
        expected: exponent of the arithmetic for large sizes.
        sizes: in ascending order.
        seconds: medians.
        rounds: seconds of every round, by size.
        note: why measured and expected exponent may differ.
    """

    name: str
    title: str
    expected: float
    sizes: list[float]
    seconds: list[float]
    rounds: list[list[float]] = field(default_factory=list)
    note: str = ""

    @property
    def exponent(self) -> float:
        """Exponent fitted to all sizes."""
        return fit_exponent(self.sizes, self.seconds)

    @property
    def last_exponent(self) -> float:
        """Exponent between the two largest sizes, where constant costs matter least."""
        return fit_exponent(self.sizes[-2:], self.seconds[-2:])


@dataclass
class Section:
    """The results of one subcommand.

    Attributes:
        name: the subcommand.
        title: for readers.
        hardware: see `hardware`.
        settings: in plain types.
        comparisons: in order of measurement.
        series: costs against sizes.
        measures: numbers by key; the keys of all sections are distinct.
        facts: lines for readers: title and text.
        tables: by title, the head and the rows of each.
    """

    name: str
    title: str
    hardware: dict[str, Any]
    settings: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self.hardware["device"]

    @property
    def machine(self) -> str:
        """The processor or GPU with its instruction sets and threads: results of equal machines are comparable."""
        return machine_name(self.hardware)

    def add(self, key: str, value: float | Spread | Interval | None, reason: str | None = None) -> None:
        """Record a measure under `<device>.<section>.<key>`; without a value, the reason."""
        key = f"{self.device}.{self.name}.{key}"
        if value is None:
            self.measures[key] = Measure(reason=reason or "not measured")
        elif isinstance(value, Spread):
            self.measures[key] = Measure(value.median, value.low, value.high)
        elif isinstance(value, Interval):
            known = math.isfinite(value.high)
            self.measures[key] = Measure(
                value.value, value.low if known else None, value.high if known else None, level=LEVEL
            )
        else:
            self.measures[key] = Measure(float(value))

    def add_ratio(self, key: str, comparison: Comparison, name: str, base: str) -> None:
        """Record the time of `name` divided by that of `base`, or the reason why it is missing."""
        reason = comparison.missing(name, base)
        self.add(key, None if reason else comparison.ratio(name, base), reason)

    def add_speedup(self, key: str, comparison: Comparison, name: str, base: str) -> None:
        """Record the time of `base` divided by that of `name`, or the reason why it is missing."""
        self.add_ratio(key, comparison, base, name)

    def add_rate(self, key: str, comparison: Comparison, name: str) -> None:
        """Record the samples per second, or the reason why they are missing."""
        reason = comparison.missing(name)
        self.add(key, None if reason else comparison.rate(name), reason)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Section":
        """Return the object that `to_dict` converted."""
        parts = {
            "comparisons": [Comparison(**comparison) for comparison in content["comparisons"]],
            "series": [Series(**series) for series in content["series"]],
            "measures": {key: Measure(**measure) for key, measure in content["measures"].items()},
        }
        return cls(**{**content, **parts})


def new_section(name: str, title: str, settings: Settings) -> Section:
    """Return an empty section with its hardware and settings."""
    plain = {**asdict(settings), "device": str(settings.device), "root": settings.root and settings.root.name}
    plain["load_average"] = [round(value, 2) for value in settings.load_average]
    return Section(name, title, hardware(settings.device, settings.num_threads), plain)


def series_from(comparison: Comparison, sizes: Sequence[float], *, expected: float, note: str = "") -> Series:
    """Turn a comparison of sizes, whose contestants are in their order, into a series."""
    rounds = [comparison.seconds(name) for name in comparison.times]
    seconds = [spread(times).median for times in rounds]
    assert len(rounds) == len(sizes), "every size took part"
    assert all(math.isfinite(value) and value > 0 for value in seconds), "times are positive"
    return Series(comparison.name, comparison.title, expected, list(sizes), seconds, rounds, note)
