"""Medians, quartiles and exponents of measured times."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    median: float
    low: float
    """The 25 % quantile."""
    high: float
    """The 75 % quantile."""


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


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Summarise the ratios of two series round by round.

    A slowdown of a whole round affects both series and cancels. In a ratio of two medians it would not cancel.

    Args:
        values: one positive number a round.
        base: as many, of the same rounds.

    Raises:
        ValueError: the series differ in length, or are empty.

    Example:
        >>> ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]).median
        2.0
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} rounds cannot be compared with {len(base)}")
    return spread([value / other for value, other in zip(values, base)])


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
