"""Estimates with their counts and 95 % intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

CONFIDENCE: Final = 0.95
_Z: Final = 1.959963984540054  # normal quantile of (1 + 0.95) / 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, what it was counted from, and how sure it is.

    Attributes:
        value: the figure; ``None`` where nothing could be counted (``total`` is 0).
        low: lower end of the 95 % interval; ``None`` with ``value``.
        high: upper end of the 95 % interval; ``None`` with ``value``.
        count: numerator: successes, detections or seconds.
        total: denominator: trials, detections or seconds.
        interval: how the interval was computed, in words.
    """

    value: float | None
    low: float | None
    high: float | None
    count: float
    total: float
    interval: str

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; floats rounded to 6 digits so that files compare."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def wilson(count: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927; Brown, Cai and DasGupta 2001).

    Args:
        count: successes, 0 <= count <= total; may be fractional for an effective sample size.
        total: trials, > 0.

    Raises:
        ValueError: the counts are out of range.
    """
    if not 0 <= count <= total or total <= 0:
        raise ValueError(
            f"wilson: expected 0 <= count <= total and total > 0, but got count {count} and total {total}."
        )
    # scipy's binomtest takes whole counts only, and effective sample sizes are none; the tests compare the two.
    share, z2 = count / total, _Z**2
    centre = share + z2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def proportion(outcomes: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Share of true outcomes with Wilson's interval.

    Args:
        outcomes: one a trial.
        clusters: what each trial belongs to (an image, say). Trials of one cluster are not independent, so the interval
            uses the effective number of trials ``n / deff``, with Kish's design effect estimated from the data
            (Korn and Graubard 1998) and kept between 1 and the mean cluster size. Where all outcomes agree nothing can
            be estimated, and the number of clusters is used.
    """
    total = len(outcomes)
    count = sum(map(bool, outcomes))
    if not total:
        return Estimate(None, None, None, 0, 0, "none: nothing to count")
    effective, words = float(total), "Wilson"
    if clusters is not None:
        effective = total / _design_effect([bool(outcome) for outcome in outcomes], clusters)
        words = f"Wilson, clustered by image (effective n {effective:.0f})"
    low, high = wilson(count / total * effective, effective)
    return Estimate(count / total, low, high, count, total, words)


def _design_effect(outcomes: Sequence[bool], clusters: Sequence[Hashable]) -> float:
    groups: dict[Hashable, list[bool]] = defaultdict(list)
    for outcome, cluster in zip(outcomes, clusters, strict=True):
        groups[cluster].append(outcome)
    total, num_clusters = len(outcomes), len(groups)
    share, mean_size = sum(outcomes) / total, total / num_clusters
    if num_clusters < 2 or share in (0.0, 1.0):
        return mean_size
    residuals = [sum(group) - share * len(group) for group in groups.values()]
    variance = num_clusters / (num_clusters - 1) * sum(r * r for r in residuals) / total**2
    return min(max(variance / (share * (1 - share) / total), 1.0), mean_size)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Ratio of sums with a percentile bootstrap over units (images or batches), numerator and denominator kept paired.

    Args:
        numerators: one a unit.
        denominators: one a unit, same length, >= 0.
        num_resamples: bootstrap samples.
        seed: of the resampling, so that a report can be made again.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.shape != bottom.shape:
        raise ValueError(
            f"bootstrap_ratio: expected as many numerators as denominators, but got {top.shape} and {bottom.shape}."
        )
    if not bottom.sum() > 0:
        return Estimate(None, None, None, float(top.sum()), float(bottom.sum()), "none: nothing to count")
    # scipy.stats.bootstrap draws the same resamples and finds the same ends (see the tests), but gives nan as soon as
    # one of them has only denominators of 0, and refuses a single unit; both happen in small evaluations.
    picks = np.random.default_rng(seed).integers(len(top), size=(num_resamples, len(top)))
    sums = bottom[picks].sum(1)
    ratios = top[picks].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(top.sum() / bottom.sum())
    return Estimate(
        value,
        float(low),
        float(high),
        float(top.sum()),
        float(bottom.sum()),
        f"bootstrap, {num_resamples} resamples of {len(top)}",
    )


def bootstrap_mean(values: Sequence[float], *, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean with a percentile bootstrap; ``total`` is the number of values."""
    return bootstrap_ratio(values, [1.0] * len(values), num_resamples=num_resamples, seed=seed)


def transform(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """The estimate of a monotone function of a figure, e.g. ``1 - x``; the interval's ends are ordered again."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate
    low, high = sorted((function(estimate.low), function(estimate.high)))
    return Estimate(function(estimate.value), low, high, estimate.count, estimate.total, estimate.interval)
