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
    """Removes small islands, then fills small holes.

    Args:
        mask: (H, W) bool.
        island_share: 8-connected components smaller than this share of the largest go, in [0, 1].
        hole_share: 4-connected gaps that do not touch the border and are smaller than this share of what is left are
            filled, in [0, 1].

    Returns:
        (H, W) bool, a new array.
    """
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return mask.copy()
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = (areas >= island_share * areas.max()) & (areas > 0)
    result: NDArray[np.bool_] = kept[labels]

    gaps, count = ndimage.label(~result)
    if count:
        sizes = np.bincount(gaps.ravel(), minlength=count + 1)
        is_hole = sizes < hole_share * result.sum()
        is_hole[0] = False
        border = np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]])
        is_hole[border] = False
        result |= is_hole[gaps]
    return result
