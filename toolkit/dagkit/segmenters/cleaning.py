"""Cleans masks: small islands go, small holes are filled."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

ISLAND_SHARE: Final = 0.1
"""Components smaller than this share of the largest one are islands."""

HOLE_SHARE: Final = 0.05
"""Enclosed gaps smaller than this share of the mask are holes; larger ones belong to the thing's shape."""


def clean_mask(
    mask: NDArray[np.bool_], *, island_share: float = ISLAND_SHARE, hole_share: float = HOLE_SHARE
) -> NDArray[np.bool_]:
    """Removes small islands and fills small holes, until none is left: a filled hole makes others small by comparison.

    Args:
        mask: (H, W) bool.
        island_share: 8-connected components smaller than this share of the largest go, in [0, 1].
        hole_share: 4-connected gaps that do not touch the border and are smaller than this share of what is left are
            filled, in [0, 1].

    Returns:
        (H, W) bool, a new array.
    """
    result = mask.copy()
    while True:  # ends, because each round that changes anything leaves fewer components and gaps
        before, result = result, _fill_holes(_drop_islands(result, island_share), hole_share)
        if np.array_equal(before, result):
            return result


def _drop_islands(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return mask
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    kept: NDArray[np.bool_] = ((areas >= share * areas.max()) & (areas > 0))[labels]
    return kept


def _fill_holes(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    gaps, count = ndimage.label(~mask)
    sizes = np.bincount(gaps.ravel(), minlength=count + 1)
    is_hole = sizes < share * mask.sum()
    is_hole[0] = False
    border = np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]])
    is_hole[border] = False
    filled: NDArray[np.bool_] = mask | is_hole[gaps]
    return filled
