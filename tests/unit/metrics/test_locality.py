from __future__ import annotations

import numpy as np
import pytest

from dagkit.metrics import difference, ssim


def test_difference_separates_inside_from_outside() -> None:
    before = np.full((20, 20, 3), 100, np.uint8)
    after = before.copy()
    after[:10, :10] += 51  # 0.2 of the range
    mask = np.zeros((20, 20), bool)
    mask[:10, :10] = True
    result = difference(before, after, mask)
    assert (result.edited_share, result.inside, result.outside) == pytest.approx((0.25, 0.2, 0.0))
    assert not result.is_untouched
    shifted = difference(before, after, np.roll(mask, 10, axis=1))
    assert (shifted.inside, shifted.outside) == pytest.approx((0.0, 0.2 / 3))


def test_difference_below_the_tolerance_is_no_edit_yet_not_untouched() -> None:
    before = np.zeros((16, 16, 3), np.uint8)
    result = difference(before, before + 3)
    assert result.edited_share == 0
    assert not result.is_untouched
    assert result.inside is None
    assert result.outside is None
    assert difference(before, before).is_untouched


def test_difference_names_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*\(9, 8, 3\)"):
        difference(np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8))


def test_ssim_agrees_with_scikit_image() -> None:
    reference = pytest.importorskip("skimage.metrics").structural_similarity
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
    second = np.clip(first + rng.normal(0, 40, first.shape), 0, 255).astype(np.uint8)
    expected = reference(
        first, second, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False, data_range=255
    )
    assert ssim(first, second) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_equal_images_is_one_and_small_ones_are_refused() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert ssim(image, image) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(image[:8], image[:8])
