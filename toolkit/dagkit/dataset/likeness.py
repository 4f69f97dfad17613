"""Perceptual hashes: images that look nearly the same have hashes that differ in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

MAX_DISTANCE: Final = 4
"""Images whose hashes differ in at most so many of 64 bits count as near-duplicates."""

_SIDE: Final = 32
_KEPT: Final = 8


def perceptual_hash(image: Image.Image) -> int:
    """64-bit hash of the signs of an image's lowest frequencies against their median (pHash, Zauner 2010).

    Args:
        image: any size and mode.
    """
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX if min(image.size) > _SIDE else None)
    low = dctn(np.asarray(grey, np.float64), norm="ortho")[:_KEPT, :_KEPT].ravel()
    low[0] = 0.0  # brightness alone makes no other image
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_twins(hashes: Mapping[str, int], max_distance: int = MAX_DISTANCE) -> dict[str, str]:
    """Near-duplicates among images.

    Args:
        hashes: key -> `perceptual_hash`, in the order of preference.
        max_distance: largest number of differing bits.

    Returns:
        Key of a near-duplicate -> the earlier key that it repeats. Keys that repeat nothing are not in it, and nothing
        repeats a key that is itself a repetition.
    """
    keys = list(hashes)
    codes = np.array([hashes[key] for key in keys], dtype=np.uint64)
    twins: dict[str, str] = {}
    originals = np.ones(len(keys), dtype=np.bool_)
    for index in range(1, len(keys)):
        near = originals[:index] & (_distances(codes[:index], codes[index]) <= max_distance)
        if near.any():
            twins[keys[index]] = keys[int(near.argmax())]
            originals[index] = False
    return twins


def drop_near_duplicates(
    images: Iterable[tuple[str, Image.Image]], max_distance: int = MAX_DISTANCE
) -> tuple[list[str], dict[str, str]]:
    """Keeps the first of each group of images that look the same.

    Args:
        images: (key, image) pairs; read one at a time.
        max_distance: as for `find_twins`.

    Returns:
        Kept keys in order, and dropped key -> the kept one that it repeats.
    """
    hashes = {key: perceptual_hash(image) for key, image in images}
    twins = find_twins(hashes, max_distance)
    return [key for key in hashes if key not in twins], twins


def _distances(codes: NDArray[np.uint64], code: np.uint64) -> NDArray[np.uint8]:
    distances: NDArray[np.uint8] = np.bitwise_count(codes ^ code)
    return distances
