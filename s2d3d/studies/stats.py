"""The statistics of a study: paired differences over seeds, their intervals, and correction for several comparisons."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..optional import optional

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
ROUNDING = 1e-12
"""Differences within this distance count as equal. Accuracies are multiples of 1 / (number of shapes)."""


@dataclass(frozen=True)
class PairedT:
    """A paired t test of differences over seeds.

    Attributes:
        n: number of pairs; degrees of freedom are n - 1.
        mean: of the differences.
        std: their deviation, n - 1; None for a single pair.
        low: lower end of the interval. `low`, `high` and `p` are None for a single pair or equal differences.
        high: upper end of the interval.
        p: two-sided p-value of a mean of 0.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    p: float | None


def paired_t(differences: Sequence[float], level: float = LEVEL) -> PairedT:
    """Return mean, interval and p-value of paired differences, by Student's t with n - 1 degrees of freedom.

    Args:
        differences: one for each seed, at least one.
        level: of the interval, in (0, 1).

    Returns:
        Interval and p are None for a single difference, and if all differences are equal. Accuracies are counts of
        shapes, so a few differences can be equal by chance. An interval of width 0 would overstate the certainty.

    Source: Student, "The Probable Error of a Mean", Biometrika 1908.

    Example:
        >>> result = paired_t([1.0, 2.0, 3.0])
        >>> round(result.low, 3), result.mean, round(result.high, 3)
        (-0.484, 2.0, 4.484)
    """
    with optional("scipy", "the interval of a study", extra="studies"):
        from scipy import stats

    n, mean = len(differences), math.fsum(differences) / len(differences)
    if n == 1:
        return PairedT(1, mean, None, None, None, None)
    std = statistics.stdev(differences)
    if max(differences) - min(differences) < ROUNDING:
        return PairedT(n, mean, std, None, None, None)
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(level)
    return PairedT(n, mean, std, float(low), float(high), float(test.pvalue))


def equivalence_p(differences: Sequence[float], margin: float) -> float | None:
    """Return the p-value of two one-sided t tests: that the true mean lies outside (-margin, margin).

    It is below 0.05 if and only if the 90 % interval of `paired_t` lies inside the margin.

    Args:
        differences: one for each seed, at least one.
        margin: above 0, in the unit of the differences.

    Returns:
        The larger p-value of the two tests; None for a single difference or equal differences, as in `paired_t`.

    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability", J. Pharmacokinetics and Biopharmaceutics 1987.

    Example:
        >>> round(equivalence_p([-0.1, 0.0, 0.1, 0.2], margin=0.5), 4)
        0.003
    """
    with optional("scipy", "the equivalence test of a study", extra="studies"):
        from scipy import stats

    if len(differences) == 1 or max(differences) - min(differences) < ROUNDING:
        return None
    above = stats.ttest_1samp(differences, -margin, alternative="greater")
    below = stats.ttest_1samp(differences, margin, alternative="less")
    return float(max(above.pvalue, below.pvalue))


def detectable_difference(std: float, n: int) -> float:
    """Return the true mean that a two-sided paired t test of n pairs detects with 80 % power at the 5 % level.

    A comparison whose interval holds 0 says little about differences smaller than this.

    Args:
        std: deviation of the differences, assumed to be known; at least 0.
        n: number of pairs, at least 2.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2.

    Example:
        >>> round(detectable_difference(1.0, 10), 2)
        1.0
    """
    with optional("scipy", "the power of a study", extra="studies"):
        from scipy import optimize, stats

    bound = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    # The shift of a noncentral t is the mean in units of its standard error; its other tail is negligible here.
    shift = optimize.brentq(lambda shift: stats.nct.sf(bound, n - 1, shift) - POWER, 0, 2 * bound)
    return float(shift) * std / math.sqrt(n)


def holm(p_values: Sequence[float], number: int | None = None) -> list[float]:
    """Correct p-values for their number by Holm's step-down method; the family-wise error stays below the level.

    Args:
        p_values: in any order.
        number: number of planned comparisons, at least that of p-values; default: the number of p-values.

    Returns:
        The corrected p-values, in the same order, at most 1.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statistics 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    number = len(p_values) if number is None else number
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (number - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bonferroni_level(number: int) -> float:
    """Return the level of each of `number` intervals so that all hold simultaneously at `LEVEL` (Bonferroni).

    Example:
        >>> round(bonferroni_level(10), 3)
        0.995
    """
    return 1 - (1 - LEVEL) / number


def hierarchical_bootstrap(
    differences: Sequence[np.ndarray],
    *,
    crossed: bool,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the percentile interval of a mean difference of accuracies, over seeds and shapes.

    Each resample draws seeds and shapes with replacement and averages over both, with equal weight for each seed. With
    `crossed`, all seeds score the same shapes (a test split); the shapes are then drawn once for all seeds of a
    resample, because a hard shape is hard for every seed. Otherwise each seed has different shapes (a validation part
    that the seed chooses), and the shapes are drawn separately for each drawn seed.

    Args:
        differences: for each seed, for each shape, correct minus correct of the reference: (n,) int, in {-1, 0, 1}.
        crossed: see above; all seeds must then have the same n shapes in the same order.
        resamples: number of resamples, at least 1.
        seed: of the resamples.
        level: of the interval, in (0, 1).

    Returns:
        The lower and the upper end.

    Source: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8.

    Example:
        >>> low, high = hierarchical_bootstrap([np.array([1, 0, 0, 0]), np.array([0, 1, 0, 0])], crossed=True)
        >>> low <= 0.25 <= high
        True
    """
    rng = np.random.default_rng(seed)
    count = len(differences)
    if crossed:
        # Shapes with the same results for all seeds are interchangeable: the counts of each kind are multinomial.
        kinds, sizes = np.unique(np.stack(differences), axis=1, return_counts=True)
        drawn = rng.multinomial(sizes.sum(), sizes / sizes.sum(), size=resamples) / sizes.sum()
        weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        means = np.einsum("rs,sk,rk->r", weights, kinds, drawn, optimize=True)
    else:
        values = np.array([-1, 0, 1])
        sizes = np.array([len(part) for part in differences])
        shares = np.array([[np.mean(part == value) for value in values] for part in differences])
        chosen = rng.integers(count, size=(resamples, count))
        drawn = rng.multinomial(sizes[chosen], shares[chosen])
        means = ((drawn @ values) / sizes[chosen]).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def correctness(text: str) -> np.ndarray:
    """Convert the 0/1 string of reports and records to an array (n,) int8.

    Example:
        >>> correctness("101").tolist()
        [1, 0, 1]
    """
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int8) - ord("0")
