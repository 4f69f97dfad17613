"""How much of an image a guard changes, where, and how alike the rest stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

EDIT_TOLERANCE: Final = 16 / 255
"""Mean channel difference from which a pixel counts as edited; below it the eye sees little."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a guard did to one image.

    Attributes:
        is_untouched: every byte is equal.
        edited_share: share of pixels whose mean channel difference exceeds the tolerance, in [0, 1].
        inside: mean absolute difference inside the mask, in [0, 1]; ``None`` without mask or with an empty one.
        outside: the same outside the mask: what should be 0; over the whole image where the mask is empty.
        ssim: structural similarity of the images, in [-1, 1].
    """

    is_untouched: bool
    edited_share: float
    inside: float | None
    outside: float | None
    ssim: float


def difference(
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    mask: NDArray[np.bool_] | None = None,
    tolerance: float = EDIT_TOLERANCE,
) -> Difference:
    """Compares an unguarded image with the guarded one of the same prompt and seed.

    Args:
        before: (H, W, 3) uint8, unguarded.
        after: (H, W, 3) uint8, guarded.
        mask: (H, W) bool, where the concept is; ``None`` leaves ``inside`` and ``outside`` empty.
        tolerance: in [0, 1], see `EDIT_TOLERANCE`.

    Raises:
        ValueError: shapes differ.
    """
    if before.shape != after.shape or (mask is not None and mask.shape != before.shape[:2]):
        shapes = f"{before.shape}, {after.shape}" + ("" if mask is None else f" and a mask {mask.shape}")
        raise ValueError(f"difference: images and mask must share height and width, but got {shapes}.")
    distance = np.abs(before.astype(np.float32) - after.astype(np.float32)).mean(-1) / 255
    return Difference(
        is_untouched=bool(np.array_equal(before, after)),
        edited_share=float((distance > tolerance).mean()),
        inside=float(distance[mask].mean()) if mask is not None and mask.any() else None,
        outside=float(distance[~mask].mean()) if mask is not None and not mask.all() else None,
        ssim=ssim(before, after),
    )


def ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of sigma 1.5 cut at 3.5 sigma, K1 0.01, K2 0.03, L 255.

    Sample covariances are the population's, channels are averaged, and a border of 5 pixels is left out, as in the
    original; images smaller than 11 pixels a side have no such interior and raise.

    Args:
        first: (H, W, C) uint8.
        second: (H, W, C) uint8.

    Raises:
        ValueError: shapes differ or are too small.
    """
    from scipy.ndimage import gaussian_filter

    if first.shape != second.shape or min(first.shape[:2]) < 11:
        raise ValueError(
            f"ssim: expected one shape of at least 11 x 11 pixels, but got {first.shape} and {second.shape}."
        )
    x, y = first.astype(np.float64), second.astype(np.float64)

    def blur(array: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gaussian_filter(array, sigma=(1.5, 1.5, 0), truncate=3.5, mode="reflect"))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(values[5:-5, 5:-5].mean())
