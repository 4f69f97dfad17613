from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from dagkit.metrics import bootstrap_mean, bootstrap_ratio, proportion, transform, wilson


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (7, 23), (50, 50), (93, 100)])
def test_wilson_agrees_with_scipy(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert wilson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("count", "total"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_says_which_counts_are_wrong(count: int, total: int) -> None:
    with pytest.raises(ValueError, match=rf"0 <= count <= total.*got count {count} and total {total}"):
        wilson(count, total)


def test_wilson_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [wilson(int(k), 40) for k in rng.binomial(40, 0.9, 4000)]
    assert np.mean([low <= 0.9 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_proportion_counts_and_says_nothing_of_nothing() -> None:
    estimate = proportion([True, True, False, True])
    assert (estimate.value, estimate.count, estimate.total) == (0.75, 3, 4)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(3, 4))
    empty = proportion([])
    assert (empty.value, empty.low, empty.total) == (None, None, 0)


def test_clustered_interval_is_as_wide_as_that_of_the_clusters_when_they_agree_within() -> None:
    outcomes = [True, True] * 8 + [False, False] * 2
    clusters = [index for index in range(10) for _ in range(2)]
    clustered, plain = proportion(outcomes, clusters), proportion(outcomes)
    assert clustered.value == plain.value == 0.8
    assert (clustered.low, clustered.high) == pytest.approx(wilson(8, 10), abs=0.01)
    assert clustered.high - clustered.low > plain.high - plain.low


def test_clustered_interval_of_independent_trials_is_not_widened_much() -> None:
    rng = np.random.default_rng(1)
    outcomes = list(rng.random(600) < 0.7)
    clustered = proportion(outcomes, [index // 2 for index in range(600)])
    low, high = wilson(sum(outcomes), 600)
    assert clustered.high - clustered.low == pytest.approx(high - low, rel=0.15)


def test_clustered_interval_counts_clusters_when_all_outcomes_agree() -> None:
    estimate = proportion([True] * 20, [index // 2 for index in range(20)])
    assert estimate.low == pytest.approx(wilson(10, 10)[0])
    assert "effective n 10" in estimate.interval


@pytest.mark.parametrize("num", [2, 5, 40])
def test_bootstrap_agrees_with_scipy(num: int) -> None:
    top, bottom = np.random.default_rng(num).random((2, num))
    expected = bootstrap(
        (top, bottom),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    estimate = bootstrap_ratio(top.tolist(), bottom.tolist())
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_bootstrap_ratio_keeps_pairs_together() -> None:
    denominators = [1.0, 10.0, 100.0]
    estimate = bootstrap_ratio([0.5, 5.0, 50.0], denominators)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="as many numerators as"):
        bootstrap_ratio([1.0], [1.0, 2.0])
    assert bootstrap_ratio([1.0], [0.0]).value is None
    sparse = bootstrap_ratio([1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])  # a third of the resamples have no denominator
    assert (sparse.low, sparse.high) == (1.0, 1.0)


def test_bootstrap_mean_has_the_width_of_the_normal_interval() -> None:
    values = list(np.random.default_rng(2).normal(3.0, 1.0, 400))
    estimate = bootstrap_mean(values)
    assert estimate == bootstrap_mean(values)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_transform_orders_the_ends_again() -> None:
    estimate = transform(proportion([True, False, False, False]), lambda share: 1 - share)
    assert estimate.value == 0.75
    assert estimate.low < 0.75 < estimate.high
    assert transform(proportion([]), lambda share: 1 - share).value is None
