from __future__ import annotations

import numpy as np
import pytest
import torch

from dagkit.metrics import frechet_distance


def exact(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """2d + 2 points whose mean and unbiased covariance are exactly ``mean`` and ``diag(scale^2)``."""
    width = len(mean)
    points = np.concatenate([np.eye(width), -np.eye(width), np.zeros((2, width))])
    return mean + points * scale * np.sqrt((len(points) - 1) / 2)


def test_gaussians_by_hand() -> None:
    """|m1 - m2|^2 + sum of (s1 - s2)^2, since diagonal covariances commute."""
    first, second = exact(np.array([0.0, 1, 2]), np.array([1.0, 2, 3])), exact(np.ones(3), np.array([2.0, 2, 1]))
    assert np.allclose(np.cov(first.T), np.diag([1, 4, 9]))
    estimate = frechet_distance(first, second)
    assert estimate.value == pytest.approx((1 + 0 + 1) + (1 + 0 + 4))
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.total == len(first)


@pytest.mark.parametrize(("count", "width"), [(400, 6), (5, 8)])
def test_it_is_torchmetrics_fid_of_the_same_features(count: int, width: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Means(torch.nn.Module):
        num_features = width

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.double().flatten(1)[:, :width] / 100

    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(low, 256, (count, 3, 4, 4), dtype=np.uint8)) for low in (0, 90)]
    fid = FrechetInceptionDistance(feature=Means(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    for is_real, batch in zip((True, False), images, strict=True):
        fid.update(batch, real=is_real)
    ours = frechet_distance(*(Means()(batch).numpy() for batch in images))
    assert ours.value == pytest.approx(float(fid.compute()), rel=1e-4)


def test_equal_sets_have_no_distance_and_one_image_no_spread() -> None:
    points = np.random.default_rng(1).normal(size=(10, 4))
    assert frechet_distance(points, points).value == pytest.approx(0, abs=1e-9)
    assert frechet_distance(points[:1], points[:1]).value is None
    with pytest.raises(ValueError, match=r"expected two equal shapes \(N, d\), but got \(10, 4\) and \(9, 4\)"):
        frechet_distance(points, points[:9])
