"""The Fréchet distance between two sets of images, by features of any network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dagkit.metrics.intervals import Estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray


def frechet_distance(
    first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]], *, num_resamples: int = 50, seed: int = 0
) -> Estimate:
    """Distance between Gaussians fitted to paired features (Fréchet 1957; Heusel et al. 2017, arXiv 1706.08500).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` with the unbiased covariances. The trace of the root is the nuclear
    norm of ``A B^T``, where ``A^T A = S1`` and ``B^T B = S2``: exact also for fewer images than features. The value is
    biased upwards at few images: compare it at equal counts only.

    Args:
        first: (N, d) features, e.g. of unguarded images.
        second: (N, d), of the guarded images of the same prompts and seeds.
        num_resamples: bootstrap samples of pairs; the interval is the value ± 1.96 of their standard deviations.
        seed: of the resampling.

    Returns:
        An estimate with ``total`` N; without a value where N < 2.

    Raises:
        ValueError: shapes differ.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"frechet_distance: expected two equal shapes (N, d), but got {x.shape} and {y.shape}.")
    if len(x) < 2:
        return Estimate(None, None, None, len(x), len(x), "none: a spread needs two images")
    value = _distance(x, y)
    picks = np.random.default_rng(seed).integers(len(x), size=(num_resamples, len(x)))
    spread = 1.96 * float(np.std([_distance(x[pick], y[pick]) for pick in picks], ddof=1))
    words = f"bootstrap, {num_resamples} resamples of {len(x)}, normal"
    return Estimate(value, max(0.0, value - spread), value + spread, len(x), len(x), words)


def _distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    means = float(np.square(x.mean(0) - y.mean(0)).sum())
    a, b = _factor(x), _factor(y)
    root = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    return max(0.0, means + float(np.square(a).sum() + np.square(b).sum()) - 2 * root)


def _factor(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``A`` with ``A^T A`` the covariance and at most d rows."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return centred if len(x) <= x.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))
