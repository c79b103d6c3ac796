"""Medians and quartiles, intervals of paired ratios, and exponents of measured times."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Level of all intervals."""
_NORMAL = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
RESAMPLES = 1000
"""Resamples of a bootstrap."""
STARTS = 6
"""Starts of each contestant, at least, where it can be started anew."""


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    median: float
    low: float
    """The 25 % quantile."""
    high: float
    """The 75 % quantile."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of 95 %.

    Attributes:
        value: the estimate.
        low: lower end; 0 where one round alone says nothing about the noise.
        high: upper end; infinite then.
    """

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval, relative to the value."""
        return (self.high - self.low) / (2 * self.value)


def spread(values: Sequence[float]) -> Spread:
    """Summarise values by median and quartiles, with linear interpolation.

    Raises:
        ValueError: there is none.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 10.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    if not values:
        raise ValueError("no value to summarise")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratios of two series round by round.

    A slowdown of a whole round affects both series and cancels. In a ratio of two medians it would not cancel.

    Args:
        values: one positive number a round.
        base: as many, of the same rounds.

    Raises:
        ValueError: the series differ in length.

    Example:
        >>> ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
        [2.0, 2.0, 2.0]
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} rounds cannot be compared with {len(base)}")
    return [value / other for value, other in zip(values, base)]


def estimate(values: Sequence[float], starts: Sequence[int] = (), *, logarithmic: bool = True) -> Interval:
    """Estimate the typical value of numbers, with a bootstrap interval of 95 %.

    The estimate is the mean of the middle half of the logarithms: like a median it ignores bursts, and it needs a
    third fewer rounds for an interval of the same width. The interval is the percentile interval of 1,000 resamples,
    widened by sqrt(n / (n - 1)) and by Student's quantile over the normal one, which corrects for few rounds.
    It is symmetric under inversion: the estimate of 1 / values is 1 / the estimate, with the ends exchanged.

    Args:
        values: such as the ratios of the rounds.
        starts: rounds of each start of the contestants, in order; their sum is the number of values. With `STARTS`
            or more of them, whole starts are resampled, so that what belongs to a start, such as the places of its
            memory, counts as noise. Of fewer, the interval is Student's, over the estimates of the starts. The
            interval of a single start holds for this start alone.
        logarithmic: for ratios and rates, which are positive. False averages the numbers themselves.

    Raises:
        ValueError: there is no value, or the starts have another number of rounds.

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 4 (widening).

    Example:
        >>> estimate([2.0, 2.0, 2.0, 2.0])
        Interval(value=2.0, low=2.0, high=2.0)
    """
    if not values:
        raise ValueError("no value to summarise")
    if starts and sum(starts) != len(values):
        raise ValueError(f"{len(values)} rounds are not those of starts of {', '.join(map(str, starts))}")
    if len(values) == 1:
        return Interval(values[0], 0.0, math.inf)
    scaled = np.asarray(values, dtype=np.float64)
    scaled = np.log(scaled) if logarithmic else scaled
    center = float(_middle_mean(scaled[None])[0])
    generator = np.random.default_rng(0)
    blocks = np.split(scaled, np.cumsum(starts)[:-1])
    back = math.exp if logarithmic else float
    if 1 < len(blocks) < STARTS:
        deviation = float(np.std([_middle_mean(block[None])[0] for block in blocks], ddof=1))
        half = _student(len(blocks) - 1) * deviation / math.sqrt(len(blocks))
        return Interval(back(center), back(center - half), back(center + half))
    if len(blocks) > 1:
        chosen = generator.integers(len(blocks), size=(RESAMPLES, len(blocks)))
        if len(set(starts)) == 1:
            means = _middle_mean(np.stack(blocks)[chosen].reshape(RESAMPLES, -1))
        else:
            means = np.array([_middle_mean(np.concatenate([blocks[i] for i in row])[None])[0] for row in chosen])
        count = len(blocks)
    else:
        count = len(scaled)
        means = _middle_mean(scaled[generator.integers(count, size=(RESAMPLES, count))])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    wider = math.sqrt(count / (count - 1)) * _student(count - 1) / _NORMAL
    ends = (center + wider * min(0.0, low - center), center + wider * max(0.0, high - center))
    return Interval(back(center), back(ends[0]), back(ends[1]))


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit cost = a * size**p by least squares of the logarithms; return p.

    Args:
        sizes: at least two different positive numbers.
        costs: one positive number for each.

    Raises:
        ValueError: fewer than two sizes, or another number of costs.

    Example:
        >>> round(fit_exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs a cost for each of two sizes or more, not {len(costs)} for {list(sizes)}")
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs])
    return slope


def _middle_mean(rows: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of each row (m, n): without the n // 4 smallest and largest."""
    length = rows.shape[1]
    cut = length // 4
    if cut:
        rows = np.partition(rows, (cut, length - cut - 1), axis=1)
    return rows[:, cut : length - cut].mean(axis=1)


def _student(freedom: int) -> float:
    """Return the quantile of Student's distribution at (1 + LEVEL) / 2.

    Source: Abramowitz and Stegun, 26.7.5, exact to 1 % from 3 degrees of freedom on; closed forms for 1 and 2.
    """
    p, z = (1 + LEVEL) / 2, _NORMAL
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
