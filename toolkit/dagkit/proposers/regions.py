"""From a heat map to boxes: connected components above a share of the peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dagkit.proposers import Box, Point


@dataclass(frozen=True, slots=True)
class Region:
    """One connected component of a heat map.

    Attributes:
        box: (x0, y0, x1, y1) in pixels, exclusive at the end.
        peak: its largest value.
        point: centre of the pixel with that value, (x, y).
        area: share of the image that it covers, in [0, 1].
    """

    box: Box
    peak: float
    point: Point
    area: float


def find_regions(
    heat: NDArray[np.floating[Any]],
    *,
    threshold: float,
    min_peak: float,
    max_regions: int = 8,
    min_area: float = 0.0005,
) -> list[Region]:
    """Cuts a heat map into regions, strongest first.

    Args:
        heat: (H, W), >= 0; only its shape counts, not its scale.
        threshold: a pixel belongs to a region where it reaches this share of the map's peak, in (0, 1].
        min_peak: a region is dropped unless its own peak reaches this share of the map's peak, in [0, 1].
        max_regions: at most so many.
        min_area: smaller regions, as a share of the image, are dropped.

    Returns:
        8-connected components; none where the map is all zero.
    """
    peak = float(heat.max(initial=0.0))
    if peak <= 0:
        return []
    labels, count = ndimage.label(heat >= threshold * peak, structure=np.ones((3, 3)))
    index = np.arange(1, count + 1)
    peaks = np.atleast_1d(ndimage.maximum(heat, labels, index))
    areas = np.atleast_1d(ndimage.sum_labels(np.ones_like(heat), labels, index)) / heat.size
    places = ndimage.maximum_position(heat, labels, index)
    slices = ndimage.find_objects(labels)
    regions = [
        Region(
            (float(x.start), float(y.start), float(x.stop), float(y.stop)),
            float(peaks[i]),
            (float(places[i][1]) + 0.5, float(places[i][0]) + 0.5),
            float(areas[i]),
        )
        for i, (y, x) in enumerate(slices)
        if peaks[i] >= min_peak * peak and areas[i] >= min_area
    ]
    return sorted(regions, key=lambda region: -region.peak)[:max_regions]
