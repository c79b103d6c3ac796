"""The statistics of studies against scipy, textbook numbers, a loop, and the whole distribution written out."""

import itertools
import math
import sys

import numpy as np
import pytest
from scipy import stats

from s2d3d.errors import InputError
from s2d3d.studies.stats import (
    bonferroni_level,
    correctness,
    detectable_difference,
    equivalence_p,
    hierarchical_bootstrap,
    holm,
    paired_t,
)

HAND = [0.5, 1.0, 1.5, 0.2, 0.8]
"""Mean 0.8, sum of squared deviations 0.98, hence s = sqrt(0.245) and s / sqrt(5) = sqrt(0.049)."""


def test_interval_of_hand_data_with_the_quantile_of_the_tables():
    result = paired_t(HAND)
    assert result.n == 5 and result.mean == pytest.approx(0.8) and result.std == pytest.approx(math.sqrt(0.245))
    half = 2.776445 * math.sqrt(0.049)  # t of 0.975 with 4 degrees of freedom
    assert (result.low, result.high) == pytest.approx((0.8 - half, 0.8 + half), rel=1e-6)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("differences", [HAND, [0.1, -0.3], [-2.0, -1.5, -1.75, -2.5, 0.0, -1.0]])
def test_interval_and_p_are_those_of_the_t_distribution(differences, level):
    n, mean = len(differences), sum(differences) / len(differences)
    error = math.sqrt(sum((value - mean) ** 2 for value in differences) / (n - 1) / n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    result = paired_t(differences, level)
    assert (result.low, result.high) == pytest.approx((mean - half, mean + half), rel=1e-9)
    assert result.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, n - 1), rel=1e-9)


def test_two_pairs_have_the_p_value_of_the_cauchy_distribution():
    """One degree of freedom: t = 0.6 / 0.2 = 3, and P(|T| > t) = 1 - 2 / pi arctan(t)."""
    assert paired_t([0.4, 0.8]).p == pytest.approx(1 - 2 / math.pi * math.atan(3), rel=1e-9)


def test_a_single_pair_has_a_mean_and_nothing_else():
    result = paired_t([0.25])
    assert (result.n, result.mean) == (1, 0.25)
    assert result.std is result.low is result.high is result.p is None


@pytest.mark.parametrize("value", [0.0, 6 / 798])
def test_equal_differences_are_no_certainty(value):
    result = paired_t([value, value + 1e-17, value])
    assert result.mean == pytest.approx(value) and result.low is result.high is result.p is None


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_a_detectable_difference_is_found_four_times_out_of_five(n):
    """20,000 experiments of n pairs with that mean; their share has a deviation of 0.3 %."""
    drawn = np.random.default_rng(0).normal(detectable_difference(2.0, n), 2.0, (20_000, n))
    assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_more_pairs_detect_less():
    values = [detectable_difference(1.0, n) for n in (2, 3, 5, 10, 30, 1000)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(2.8 / math.sqrt(1000), rel=0.01)
    assert detectable_difference(0.0, 3) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_counts_comparisons_that_are_still_to_come():
    assert holm([0.01, 0.02], number=5) == pytest.approx([0.05, 0.08])


def test_bonferroni_divides_the_error():
    assert bonferroni_level(1) == pytest.approx(0.95) and bonferroni_level(5) == pytest.approx(0.99)


def test_correctness_of_a_string():
    assert correctness("0110").tolist() == [0, 1, 1, 0]
    assert (correctness("10") - correctness("01")).tolist() == [1, -1], "signed"


# Bootstrap

PARTS = [np.array([1, 0, -1]), np.array([1, 1, 0])]


def whole_distribution(crossed: bool) -> list[float]:
    """Every resample of two seeds and three shapes, all equally likely."""
    means = []
    draws = list(itertools.product(range(3), repeat=3))
    for seeds in itertools.product(range(2), repeat=2):
        shapes = [(draw, draw) for draw in draws] if crossed else itertools.product(draws, repeat=2)
        for of_seeds in shapes:
            means.append(np.mean([PARTS[seed][list(draw)].mean() for seed, draw in zip(seeds, of_seeds)]))
    return means


@pytest.mark.parametrize(("crossed", "level"), [(True, 0.55), (False, 0.65)])
def test_bootstrap_interval_is_that_of_all_resamples(crossed, level):
    means = np.round(whole_distribution(crossed), 9)
    for end in ((1 - level) / 2, (1 + level) / 2):  # far from a jump of the distribution: the quantile is settled
        steps = [np.mean(means <= value) for value in np.unique(means)]
        assert min(abs(end - step) for step in steps) > 0.02
    expected = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    got = hierarchical_bootstrap(PARTS, crossed=crossed, resamples=10_000, level=level)
    assert got == pytest.approx(tuple(expected), abs=1e-8)


def loop(parts, crossed, resamples, rng):
    means = []
    for _ in range(resamples):
        common = rng.integers(len(parts[0]), size=len(parts[0]))
        total = 0.0
        for seed in rng.integers(len(parts), size=len(parts)):
            own = common if crossed else rng.integers(len(parts[seed]), size=len(parts[seed]))
            total += parts[seed][own].mean()
        means.append(total / len(parts))
    return np.array(means)


@pytest.mark.parametrize("crossed", [True, False])
def test_bootstrap_interval_is_that_of_a_loop(crossed):
    rng = np.random.default_rng(7)
    parts = [rng.choice([-1, 0, 1], 200, p=[0.05, 0.85, 0.1]) for _ in range(4)]
    means = loop(parts, crossed, 4000, rng)
    low, high = hierarchical_bootstrap(parts, crossed=crossed)
    # The error of an empirical 2.5 % quantile of a normal sample is about 2.7 deviations / sqrt(resamples).
    tolerance = 4 * 2.7 * means.std() * math.sqrt(1 / 4000 + 1 / 10_000) + 1 / 800
    assert low == pytest.approx(np.quantile(means, 0.025), abs=tolerance)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=tolerance)
    assert tolerance < 0.2 * (high - low)


def test_shapes_that_all_seeds_share_leave_more_doubt_than_shapes_of_each():
    rng = np.random.default_rng(0)
    hard = rng.choice([-1, 0, 1], 300, p=[0.1, 0.8, 0.1])
    widths = [np.ptp(hierarchical_bootstrap([hard] * 5, crossed=crossed)) for crossed in (True, False)]
    assert widths[0] == pytest.approx(math.sqrt(5) * widths[1], rel=0.1)


def test_bootstrap_is_a_function_of_its_seed():
    first, again, other = (hierarchical_bootstrap(PARTS, crossed=False, resamples=50, seed=s) for s in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("margin", [0.1, 0.3, 0.5, 2.0])
def test_equivalence_is_two_one_sided_tests(margin):
    """Against the closed form, and the 90 % interval: it lies inside the margin just where p is below 0.05."""
    for seed in range(20):
        differences = np.random.default_rng(seed).normal(0.1, 0.3, 8).tolist()
        error = np.std(differences, ddof=1) / np.sqrt(8)
        tails = [stats.t.sf((margin + sign * np.mean(differences)) / error, 7) for sign in (-1, 1)]
        p = equivalence_p(differences, margin)
        assert p == pytest.approx(max(tails))
        interval = paired_t(differences, level=0.9)
        assert (p < 0.05) == (-margin < interval.low and interval.high < margin)


def test_equivalence_of_one_or_of_equal_differences_is_unknown():
    assert equivalence_p([0.1], 0.5) is None and equivalence_p([0.1, 0.1, 0.1], 0.5) is None


@pytest.mark.parametrize("compute", [
        lambda: paired_t([1.0, 2.0]), lambda: detectable_difference(1.0, 5), lambda: equivalence_p([0.1, 0.2], 0.5),
    ],
)  # fmt: skip
def test_a_missing_scipy_is_named(monkeypatch, compute):
    monkeypatch.setitem(sys.modules, "scipy", None)
    needed = r'^the (interval|power|equivalence test) of a study needs scipy .*: pip install "s2d3d\[studies\]"$'
    with pytest.raises(InputError, match=needed):
        compute()
