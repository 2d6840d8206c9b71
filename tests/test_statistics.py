"""sft.evaluation.statistics against scipy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import scipy  # loads scipy.stats at its first use

from sft.evaluation import statistics


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (7, 31), (1, 2), (600, 1319)])
def test_the_interval_of_a_share_is_wilsons(right: int, n: int) -> None:
    wanted = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert statistics.wilson(right / n, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize("df", [1, 2, 3, 7, 30, 499, 10_000])
def test_students_distribution_is_scipys(df: int) -> None:
    for t in (0.0, 0.1, 1.0, 2.5, 8.0, 40.0):
        assert statistics.t_test(t, df) == pytest.approx(2 * scipy.stats.t.sf(t, df), rel=1e-9, abs=1e-13)
    assert statistics.t_quantile(0.975, df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 12, 400])
def test_paired_differences_are_scipys_t_test_and_interval(n: int) -> None:
    rng = random.Random(n)
    a = [rng.gauss(0, 1) for _ in range(n)]
    b = [x + rng.gauss(0.2, 0.5) for x in a]
    found, wanted = statistics.paired(a, b), scipy.stats.ttest_rel(b, a)
    interval = wanted.confidence_interval(0.95)
    assert found.test == "t" and found.n == n
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert found.value == pytest.approx(np.mean(np.subtract(b, a)))
    assert found.stderr == pytest.approx(scipy.stats.sem(np.subtract(b, a)))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 1), (3, 3), (40, 20), (0, 12)])
def test_right_and_wrong_answers_are_tested_by_mcnemars_exact_test(better: int, worse: int) -> None:
    a = [0.0] * better + [1.0] * worse + [1.0] * 7 + [0.0] * 5
    b = [1.0] * better + [0.0] * worse + [1.0] * 7 + [0.0] * 5
    found = statistics.paired(a, b)
    wanted = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found.test == "mcnemar" and found.p == pytest.approx(wanted)
    assert found.stderr == pytest.approx(scipy.stats.sem(np.subtract(b, a)))


@pytest.mark.parametrize("n", [6, 25, 100])
@pytest.mark.parametrize(
    "shares", [(0.01, 0.0, 0.01, 0.98), (0.3, 0.02, 0.02, 0.66), (0.5, 0.2, 0.05, 0.25), (0.9, 0.05, 0.05, 0.0)]
)
def test_newcombes_interval_holds_the_true_difference_in_95_of_100_samples(n: int, shares: tuple[float, ...]) -> None:
    both, better, worse, neither = (np.round(np.array(shares) * 1000) / 1000).tolist()
    drawn = np.random.default_rng(n).multinomial(n, [both, better, worse, neither], 2000)
    intervals = [statistics.newcombe(*map(int, row)) for row in drawn]
    held = np.mean([low <= better - worse <= high for low, high in intervals])
    assert held >= 0.935
    assert np.mean([high - low for low, high in intervals]) < 2 * 1.96 * np.sqrt((better + worse + 4 / n) / n) + 0.1


def test_two_systems_that_agree_on_every_item_may_still_differ() -> None:
    found = statistics.paired([0.0] * 6, [0.0] * 6)
    assert (found.value, found.stderr, found.p) == (0.0, 0.0, 1.0)
    wilson = scipy.stats.binomtest(0, 6).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((-wilson.high, wilson.high))
    for cells in ((3, 5, 1, 7), (0, 2, 0, 9)):
        low, high = statistics.newcombe(*cells)
        other = statistics.newcombe(cells[0], cells[2], cells[1], cells[3])  # the other way round
        assert (-high, -low) == pytest.approx(other) and low < (cells[1] - cells[2]) / sum(cells) < high


def test_a_ratio_with_equal_weights_is_the_paired_t_test_and_with_others_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 60, 300).astype(float)
    a = weights * rng.normal(2.0, 0.3, 300)
    b = a + weights * rng.normal(-0.05, 0.2, 300)
    ones = statistics.paired_ratio(list(a), list(b), [1.0] * 300)
    wanted = scipy.stats.ttest_rel(b, a)
    assert (ones.p, ones.value) == (pytest.approx(wanted.pvalue), pytest.approx(np.mean(b - a)))
    found = statistics.paired_ratio(list(a), list(b), list(weights))
    chosen = rng.integers(0, 300, (4000, 300))
    bootstrap = (b - a)[chosen].sum(1) / weights[chosen].sum(1)
    assert found.value == pytest.approx((b - a).sum() / weights.sum())
    assert found.stderr == pytest.approx(bootstrap.std(), rel=0.08)


def test_holms_correction_is_closed_testing_with_bonferroni() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    # the definition: the largest Bonferroni p of any set of hypotheses that holds this one
    subsets = [[i for i in range(5) if mask >> i & 1] for mask in range(1, 32)]
    wanted = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(5)]
    assert statistics.holm(p) == pytest.approx(wanted)


def test_equal_scores_differ_by_nothing_and_one_item_has_no_error() -> None:
    assert statistics.paired([0.5, 0.7], [0.5, 0.7]).p == 1.0
    assert statistics.paired([0.5, 0.5], [0.75, 0.75]).p == 0.0
    alone = statistics.paired([0.2], [0.4])
    assert alone.stderr is None and alone.p is None and alone.value == pytest.approx(0.2)
