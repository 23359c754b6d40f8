"""Statistics of a few seeds and a few streams, by scipy: intervals, paired differences, and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from clstream.params import check_integer, check_share


class Mean(NamedTuple):
    """The mean of some values, and the interval that has the mean of all there could be; NaN: not defined.

    Args:
        mean: of the values; NaN if one of them is.
        low, high: the interval's ends; NaN for a single value.
        deviation: the sample standard deviation; NaN for a single value.
        size: how many values there are.

    """

    mean: float
    low: float
    high: float
    deviation: float
    size: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Return the mean of values and its confidence interval by Student's t, which supposes that they are about normal.

    A single value has no interval: how much a method varies can't be seen in one run.

    Raises ValueError if there are no values, and for a confidence that is not from 0 to below 1.
    """
    import numpy as np
    from scipy import stats

    check_share(confidence=confidence)
    if not values:
        raise ValueError("there are no values to take the mean of")
    count, mean = len(values), float(np.mean(values))
    if count == 1 or not math.isfinite(mean):
        return Mean(mean, math.nan, math.nan, math.nan, count)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Mean(mean, mean - half, mean + half, deviation, count)


class PairedDifference(NamedTuple):
    """The mean of paired differences, its bootstrap interval, the p-value of a paired test, and the number of pairs."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> PairedDifference:
    """Return how much the values of `first` are above those of `second`, pair by pair.

    Args:
        first, second: (pairs,) each; values in the same place share stream, order of classes, and seed.
        confidence: of the interval: percentiles of the means of `resamples` bootstrap samples (Efron 1979). Of few pairs it is
            narrower than it should be, so what is shown is decided by the test.
        resamples: bootstrap samples that are drawn.
        seed: of the generator that draws them.

    The p-value is that of the paired t-test, two-sided. Where all differences are alike, and not 0, that test has nothing to go by,
    and it is the sign test's, 2 ** (1 - pairs); where all are 0 it is 1. It is NaN, as the interval is, for fewer than two pairs,
    and where a value is not finite.

    Raises ValueError if they differ in length, or are empty, and for another option that can't be.
    """
    import numpy as np
    from scipy import stats

    check_share(confidence=confidence)
    check_integer(1, resamples=resamples)
    check_integer(0, seed=seed)
    if len(first) != len(second) or not first:
        raise ValueError(f"paired differences need pairs, not {len(first)} values and {len(second)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite then, or NaN, says so
        differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
        count, mean = len(differences), float(np.mean(differences))
    if count < 2 or not np.isfinite(differences).all():
        return PairedDifference(mean, math.nan, math.nan, math.nan, count)
    if np.ptp(differences) <= 1e-12 * max(1.0, abs(mean)):  # but for rounding all are alike
        p = 1.0 if abs(mean) <= 1e-12 else float(stats.binomtest(count, count).pvalue)
        return PairedDifference(mean, mean, mean, p, count)
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=resamples, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedDifference(mean, float(interval.low), float(interval.high), p, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several, so that the chance of any false finding is bounded (Holm 1979).

    The smallest of m is multiplied by m, the next one by m - 1, and so on; none is below the one before it, or above 1. NaN, a
    test that was not made, stays NaN and doesn't count.
    """
    order = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    adjusted, least = [math.nan] * len(p_values), 0.0
    for position, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - position) * p_values[place]))
        adjusted[place] = least
    return adjusted


class Ranking(NamedTuple):
    """Ranks of methods over streams (Demsar 2006).

    Args:
        average: (methods,), the mean over the streams of each method's rank; 1 is the best, ties share the mean of their ranks.
        statistic, p: of the Friedman test of whether the methods differ at all; NaN for fewer than three methods or two streams.
        critical_difference: of Nemenyi's test: methods whose average ranks are at least so far apart differ.

    """

    average: tuple[float, ...]
    statistic: float
    p: float
    critical_difference: float


def ranking(values: Sequence[Sequence[float]], higher_is_better: bool = True, alpha: float = 0.05) -> Ranking:
    """Return the average ranks of methods, and how far apart these must be to say that two methods differ.

    Args:
        values: (streams, methods), as the means over the seeds.
        higher_is_better: whether the highest value has rank 1.
        alpha: the chance of a false finding.

    Raises ValueError if there are no streams, fewer than two methods, or values that are not finite.
    """
    import numpy as np
    from scipy import stats

    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] < 1 or matrix.shape[1] < 2 or not np.isfinite(matrix).all():
        raise ValueError(f"ranks need finite values of at least two methods on each stream, not of shape {matrix.shape}")
    matrix = matrix.round(12)  # means that differ by the order of a sum alone are ties
    ranks = stats.rankdata(-matrix if higher_is_better else matrix, axis=1)
    streams, methods = matrix.shape
    statistic = p = math.nan
    if methods >= 3 and streams >= 2 and np.ptp(ranks) > 0:
        statistic, p = map(float, stats.friedmanchisquare(*matrix.T))
    average = tuple(float(rank) for rank in ranks.mean(0))
    return Ranking(average, statistic, p, critical_difference(methods, streams, alpha))


def critical_difference(methods: int, streams: int, alpha: float = 0.05) -> float:
    """Return how far apart the average ranks of two methods must be over so many streams (Nemenyi's test; Demsar 2006, table 5).

    It is q sqrt(methods (methods + 1) / (6 streams)), with q the studentised range of that many methods over sqrt(2).

    Raises ValueError for fewer than two methods, no stream, or an alpha that is not from 0 to below 1.
    """
    from scipy import stats

    check_integer(2, methods=methods)
    check_integer(1, streams=streams)
    check_share(alpha=alpha)
    q = float(stats.studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * streams))


def cliques(average: Sequence[float], difference: float) -> list[tuple[int, ...]]:
    """Return the largest groups of methods whose average ranks are closer than the critical difference, by number, best first."""
    order = sorted(range(len(average)), key=lambda number: average[number])
    groups: list[tuple[int, ...]] = []
    for first in range(len(order)):
        last = max(place for place in range(first, len(order)) if average[order[place]] - average[order[first]] < difference)
        group = tuple(order[first : last + 1])
        if len(group) > 1 and not (groups and {*group} <= {*groups[-1]}):
            groups.append(group)
    return groups
