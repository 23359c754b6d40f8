"""Statistics of seeds and streams: hand-worked values, published ones, and scipy as an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clstream.comparison.statistics import cliques, critical_difference, holm, mean_interval, paired_difference, ranking


def test_the_interval_of_a_mean_by_hand() -> None:
    mean, low, high, deviation, size = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t with 2 degrees of freedom, 97.5 %
    assert (mean, deviation, size) == (2.0, 1.0, 3)
    assert (low, high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.02, 7)
    ours = mean_interval(values.tolist(), 0.9)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = [(sample := mean_interval(generator.normal(0, 1, 4).tolist())).low < 0 < sample.high for _ in range(1000)]
    assert 0.93 < sum(covered) / 1000 < 0.97


def test_one_value_has_no_interval_and_what_is_not_defined_no_mean() -> None:
    mean, low, high, deviation, size = mean_interval([0.5])
    assert (mean, size) == (0.5, 1) and math.isnan(low) and math.isnan(high) and math.isnan(deviation)
    assert math.isnan(mean_interval([0.5, math.nan]).mean) and math.isnan(mean_interval([0.5, math.nan]).high)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom, p = 0.07418."""
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert difference.mean == 2.0 and difference.pairs == 3
    assert difference.p == pytest.approx(0.0741799, abs=1e-6)
    assert difference.p == pytest.approx(stats.ttest_rel([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).pvalue)
    assert 1.0 <= difference.low < 2.0 < difference.high <= 3.0


def test_pairing_sees_what_seeds_share() -> None:
    """Both vary by 0.1 with the seed, and differ by 0.01 in each: only pairs show it."""
    shared = np.random.default_rng(0).normal(0.7, 0.1, 6)
    small = np.random.default_rng(1).normal(0.01, 0.002, 6)
    assert paired_difference((shared + small).tolist(), shared.tolist()).p < 0.001
    assert stats.ttest_ind(shared + small, shared).pvalue > 0.5


def test_the_bootstrap_is_seeded_and_is_that_of_resampled_means() -> None:
    first, second = np.random.default_rng(5).normal([[0.8], [0.7]], 0.05, (2, 12)).tolist()
    once, again = paired_difference(first, second), paired_difference(first, second)
    assert once == again
    assert paired_difference(first, second, resamples=99).high != paired_difference(first, second, resamples=99, seed=1).high
    differences = np.array(first) - np.array(second)
    means = differences[np.random.default_rng(7).integers(12, size=(200_000, 12))].mean(1)
    assert (once.low, once.high) == (
        pytest.approx(np.quantile(means, 0.025), abs=0.002),
        pytest.approx(np.quantile(means, 0.975), abs=0.002),
    )


def test_differences_that_are_all_alike_are_judged_by_their_signs() -> None:
    assert paired_difference([1.0] * 5, [0.5] * 5) == (0.5, 0.5, 0.5, 0.0625, 5)
    assert paired_difference([0.3] * 5, [0.1] * 5).p == 0.0625  # 0.3 - 0.1 is rounded
    assert paired_difference([0.5, 0.6], [0.5, 0.6]).p == 1.0


def test_too_few_pairs_show_nothing() -> None:
    lone = paired_difference([1.0], [0.0])
    assert lone.mean == 1.0 and lone.pairs == 1 and math.isnan(lone.p) and math.isnan(lone.low)
    assert math.isnan(paired_difference([1.0, math.nan], [0.0, 0.0]).p)
    with pytest.raises(ValueError, match="need pairs, not 2 values and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="need pairs"):
        paired_difference([], [])


def test_holm_by_hand() -> None:
    """Of 0.01, 0.04, 0.03, 0.005: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which is below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    values = holm([0.01, math.nan, 0.02])
    assert values[0] == pytest.approx(0.02) and math.isnan(values[1]) and values[2] == pytest.approx(0.02)


@pytest.mark.slow
def test_holm_bounds_false_findings() -> None:
    """Six methods that don't differ: at least one of 15 pairs is called different in at most 5 % of experiments, or a bit more."""
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(300):
        runs = generator.normal(0, 1, (6, 8))
        pairs = [stats.ttest_rel(runs[a], runs[b]).pvalue for a in range(6) for b in range(a)]
        wrong += min(holm(pairs)) < 0.05
    assert wrong / 300 < 0.08


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_critical_values_are_those_of_demsars_table_5(methods: int, q: float) -> None:
    assert critical_difference(methods, 10) / math.sqrt(methods * (methods + 1) / 60) == pytest.approx(q, abs=1e-3)


DEMSAR = [
    (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967), (0.628, 0.661, 0.654, 0.657),
    (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931), (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625),
    (0.775, 0.838, 0.866, 0.875), (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
    (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
]  # fmt: skip
"""Demsar 2006, table 6: AUC of four variants of C4.5 on 14 data sets; 0.9751 for one of two 0.975 that it ranks above the other."""


def test_ranks_are_those_of_demsars_example() -> None:
    result = ranking(DEMSAR)
    assert result.average == pytest.approx((3.143, 2.000, 2.893, 1.964), abs=5e-4)
    assert result.critical_difference == pytest.approx(1.25, abs=5e-3)
    statistic = 12 * 14 / 20 * (sum(rank**2 for rank in result.average) - 4 * 25 / 4)
    assert statistic == pytest.approx(9.28, abs=5e-3)  # as in the paper, which doesn't correct for ties; scipy does:
    ties = (4**3 - 4) + 3 * (2**3 - 2)  # one row of four, three of two
    assert result.statistic == pytest.approx(statistic / (1 - ties / (14 * (4**3 - 4))))
    assert result.p == pytest.approx(stats.chi2.sf(result.statistic, 3))


def test_ranks_where_less_is_better_and_of_few() -> None:
    assert ranking([[1.0, 2.0, 2.0]], higher_is_better=False).average == (1.0, 2.5, 2.5)
    assert ranking([[1.0, 2.0, 2.0]]).average == (3.0, 1.5, 1.5)
    assert ranking([[0.1 + 0.2, 0.3, 0.2]]).average == (1.5, 1.5, 3.0)  # the same mean, summed in another order
    assert math.isnan(ranking([[1.0, 2.0]]).p) and math.isnan(ranking([[1.0, 1.0, 1.0]] * 3).p)
    for odd in ([], [[1.0]], [[1.0, math.nan]]):
        with pytest.raises(ValueError, match="finite values of at least two methods"):
            ranking(odd)


def test_cliques_are_the_largest_groups_that_are_not_told_apart() -> None:
    assert cliques([1.0, 1.5, 3.0, 2.2], 1.0) == [(0, 1), (1, 3), (3, 2)]
    assert cliques([1.0, 1.5, 3.0, 2.2], 5.0) == [(0, 1, 3, 2)]
    assert cliques([1.0, 3.0], 1.0) == []


def test_options_that_can_not_be_are_refused() -> None:
    with pytest.raises(ValueError, match="confidence must be a share"):
        mean_interval([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="resamples must be a whole number"):
        paired_difference([1.0, 2.0], [0.0, 0.0], resamples=0)
    with pytest.raises(ValueError, match="methods must be a whole number of at least 2"):
        critical_difference(1, 3)
