"""Islands and holes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dagkit.segmenters.cleaning import clean_mask


def test_small_islands_go_and_small_holes_are_filled():
    mask = np.zeros((40, 40), bool)
    mask[5:25, 5:25] = True
    mask[10, 10] = False  # a hole
    mask[30:33, 30:33] = True  # an island: 9 of 400
    mask[26, 3] = True

    expected = np.zeros_like(mask)
    expected[5:25, 5:25] = True
    assert np.array_equal(clean_mask(mask), expected)
    assert np.array_equal(clean_mask(mask, island_share=0.0, hole_share=0.0), mask)


def test_large_parts_and_large_gaps_stay():
    ring = np.zeros((40, 60), bool)
    ring[5:25, 5:25] = True
    ring[10:20, 10:20] = False
    ring[10:20, 40:50] = True  # a third of the ring: a second thing, no island
    assert np.array_equal(clean_mask(ring), ring)


def test_a_gap_at_the_border_is_no_hole():
    mask = np.ones((20, 20), bool)
    mask[0, 3] = False
    mask[7, 7] = False
    expected = np.ones_like(mask)
    expected[0, 3] = False
    assert np.array_equal(clean_mask(mask), expected)


def test_a_hole_that_is_small_once_another_is_filled_is_filled_too():
    mask = np.ones((6, 8), bool)
    mask[0, :5] = False
    mask[2, 1:3] = False  # 2 of 40, and of 41 once the next is filled
    mask[2, 4] = False
    expected = np.ones_like(mask)
    expected[0, :5] = False
    assert np.array_equal(clean_mask(mask), expected)


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(max_examples=100, deadline=None)
def test_cleaning_is_idempotent_and_keeps_something(mask: np.ndarray):
    before = mask.copy()
    cleaned = clean_mask(mask)
    assert np.array_equal(mask, before)
    assert cleaned.any() == mask.any()
    assert np.array_equal(clean_mask(cleaned), cleaned)
