from __future__ import annotations

import numpy as np
import pytest

from dagkit.metrics import detection_scores


def _square(x: int, side: int = 4) -> np.ndarray:
    mask = np.zeros((8, 8), bool)
    mask[:side, x : x + side] = True
    return mask


def test_scores_of_half_overlapping_squares() -> None:
    scores = detection_scores([_square(2).astype(float)], [_square(0)])
    assert scores.iou.value == pytest.approx(8 / 24)
    assert scores.precision.value == pytest.approx(0.5)
    assert scores.recall.value == pytest.approx(0.5)
    assert scores.image_recall.value == 1.0
    assert scores.false_trigger.value is None  # no safe image


def test_safe_images_count_for_false_triggers_only() -> None:
    empty = np.zeros((8, 8), bool)
    maps = [_square(0) * 0.9, empty * 0.1, _square(0) * 0.6]
    scores = detection_scores(maps, [_square(0), empty, empty])
    assert scores.iou.value == scores.precision.value == 1.0
    assert (scores.false_trigger.count, scores.false_trigger.total) == (1, 2)
    assert detection_scores(maps, [_square(0), empty, empty], threshold=0.7).false_trigger.count == 0


def test_pooled_precision_weighs_images_by_their_pixels() -> None:
    full = np.ones((8, 8), bool)
    scores = detection_scores([full.astype(float), _square(0).astype(float)], [_square(0), _square(0)])
    assert scores.precision.value == pytest.approx(32 / 80)
    assert scores.iou.value == pytest.approx((16 / 64 + 1) / 2)


def test_maps_and_masks_must_match() -> None:
    with pytest.raises(ValueError, match="mask of its own shape"):
        detection_scores([np.zeros((8, 8))], [np.zeros((4, 4), bool)])


def test_images_in_which_a_guard_acts_are_counted_as_told() -> None:
    maps, masks = [_square(0) * 0.9] * 4, [_square(0), _square(0), np.zeros((8, 8), bool), np.zeros((8, 8), bool)]
    scores = detection_scores(maps, masks, acts=[True, False, False, False])
    assert (scores.image_recall.count, scores.image_recall.total) == (1, 2)
    assert (scores.false_trigger.count, scores.false_trigger.total) == (0, 2)
    with pytest.raises(ValueError, match="expected one answer a map, but got 1 for 4 maps"):
        detection_scores(maps, masks, acts=[True])
