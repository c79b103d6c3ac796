"""Medians, ratios and exponents against numbers worked out by hand and by numpy."""

import numpy as np
import pytest

from benchmarks.stats import Spread, fit_exponent, ratios, spread


def test_spread_equals_numpy():
    values = np.random.default_rng(0).exponential(size=23).tolist()
    found = spread(values)
    assert [found.low, found.median, found.high] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
    assert spread([4.0]) == Spread(4.0, 4.0, 4.0)


def test_ratios_go_round_by_round():
    assert ratios([3.0, 30.0, 4.0], [1.0, 10.0, 4.0]).median == 3.0
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        ratios([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no value"):
        ratios([], [])


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exponent_of_a_power_is_found_whatever_its_factor(power):
    sizes = [16, 64, 100, 1000]
    assert fit_exponent(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power)


def test_exponent_is_the_least_squares_line_of_logarithms():
    sizes, costs = [1, 2, 4, 8], [1.0, 3.0, 3.5, 9.0]
    assert fit_exponent(sizes, costs) == pytest.approx(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
    with pytest.raises(ValueError, match="an exponent needs a cost"):
        fit_exponent([4, 4], [1.0, 2.0])
