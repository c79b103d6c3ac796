"""Medians, ratios and exponents against numbers worked out by hand and by numpy."""

import numpy as np
import pytest

from benchmarks.stats import Spread, estimate, fit_exponent, ratios, spread


def test_spread_equals_numpy():
    values = np.random.default_rng(0).exponential(size=23).tolist()
    found = spread(values)
    assert [found.low, found.median, found.high] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
    assert spread([4.0]) == Spread(4.0, 4.0, 4.0)


def test_ratios_go_round_by_round():
    assert ratios([3.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == [3.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        ratios([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no value"):
        spread([])


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exponent_of_a_power_is_found_whatever_its_factor(power):
    sizes = [16, 64, 100, 1000]
    assert fit_exponent(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power)


def test_exponent_is_the_least_squares_line_of_logarithms():
    sizes, costs = [1, 2, 4, 8], [1.0, 3.0, 3.5, 9.0]
    assert fit_exponent(sizes, costs) == pytest.approx(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
    with pytest.raises(ValueError, match="an exponent needs a cost"):
        fit_exponent([4, 4], [1.0, 2.0])


# Intervals


def test_the_estimate_is_the_mean_of_the_middle_half_of_the_logarithms():
    values = np.random.default_rng(3).lognormal(sigma=0.4, size=12)
    expected = np.exp(np.sort(np.log(values))[3:9].mean())
    found = estimate(values.tolist())
    assert found.value == pytest.approx(expected) and found.low < expected < found.high
    assert estimate(values.tolist()) == found, "the bootstrap is seeded"
    assert estimate(values.tolist(), logarithmic=False).value == pytest.approx(np.sort(values)[3:9].mean())


def test_the_interval_of_the_inverse_is_the_inverse_interval():
    values = np.random.default_rng(4).lognormal(sigma=0.2, size=20)
    there, back = estimate(values.tolist()), estimate((1 / values).tolist())
    assert back.value == pytest.approx(1 / there.value)
    assert back.low == pytest.approx(1 / there.high, rel=0.01) and back.high == pytest.approx(1 / there.low, rel=0.01)


@pytest.mark.parametrize("count", [2, 3, 6, 24])
def test_intervals_hold_the_truth_in_95_of_100_cases(count):
    draws = np.random.default_rng(count)
    held = 0
    for _ in range(100):
        found = estimate(np.exp(0.1 * draws.standard_normal(count)).tolist())
        held += found.low <= 1 <= found.high
    assert held >= 88, "of 95 expected"


def test_whole_starts_are_resampled_where_processes_differ():
    """Rounds of one start share an error, as those of one process do: single rounds alone would hide it."""
    draws, alone, together = np.random.default_rng(0), 0, 0
    for _ in range(60):
        errors = np.repeat(0.02 * draws.standard_normal(8), 6) + 0.005 * draws.standard_normal(48)
        values = np.exp(errors).tolist()
        single, whole = estimate(values), estimate(values, [6] * 8)
        alone += single.low <= 1 <= single.high
        together += whole.low <= 1 <= whole.high
    assert together >= 52 and alone < 45


@pytest.mark.parametrize("starts", [2, 3, 6])
def test_intervals_of_few_starts_hold_the_truth(starts):
    draws, held = np.random.default_rng(starts), 0
    for _ in range(100):
        errors = np.repeat(0.02 * draws.standard_normal(starts), 4) + 0.02 * draws.standard_normal(4 * starts)
        found = estimate(np.exp(errors).tolist(), [4] * starts)
        held += found.low <= 1 <= found.high
    assert held >= 88, "of 95 expected"


def test_one_round_says_nothing_about_its_noise():
    found = estimate([1.5])
    assert (found.value, found.low, found.high) == (1.5, 0.0, float("inf"))
    with pytest.raises(ValueError, match="no value"):
        estimate([])
    with pytest.raises(ValueError, match="3 rounds are not those of starts of 1, 1"):
        estimate([1.0, 2.0, 3.0], [1, 1])


def test_starts_of_other_lengths_are_resampled_as_well():
    values = np.exp(np.random.default_rng(5).normal(0.1, 0.02, size=20)).tolist()
    found = estimate(values, [4, 4, 2, 4, 4, 2])
    assert found.low < np.exp(0.1) < found.high and found != estimate(values)
