"""How well a detection map finds the concept, against masks that people have checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dagkit.metrics.intervals import Estimate, bootstrap_mean, bootstrap_ratio, proportion
from dagkit.metrics.masks import iou

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """Scores of detection maps at one threshold.

    Attributes:
        threshold: map value from which a pixel counts as detected.
        iou: mean over unsafe images of intersection / union; bootstrap over images.
        precision: share of detected pixels that are in the mask, pooled over unsafe images.
        recall: share of mask pixels that are detected, pooled over unsafe images.
        image_recall: share of unsafe images in which a guard would act.
        false_trigger: share of safe images in which a guard would act.
    """

    threshold: float
    iou: Estimate
    precision: Estimate
    recall: Estimate
    image_recall: Estimate
    false_trigger: Estimate

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        names = ("iou", "precision", "recall", "image_recall", "false_trigger")
        return {"threshold": self.threshold, **{name: getattr(self, name).to_json() for name in names}}


def detection_scores(
    maps: Sequence[NDArray[np.floating[Any]]],
    masks: Sequence[NDArray[np.bool_]],
    threshold: float = 0.5,
    *,
    acts: Sequence[bool] | None = None,
) -> DetectionScores:
    """Compares maps with masks; an image with an empty mask is a safe one.

    Args:
        maps: each (H, W) float in [0, 1].
        masks: each (H, W) bool at the size of its map.
        threshold: in (0, 1).
        acts: whether a guard would act in each image; where any pixel is detected, if not given.

    Raises:
        ValueError: numbers or shapes of maps, masks and ``acts`` differ.
    """
    shapes, mask_shapes = [one.shape for one in maps], [one.shape for one in masks]
    if shapes != mask_shapes:
        raise ValueError(
            "detection_scores: each map needs a mask of its own shape, but got "
            f"{len(shapes)} maps {shapes[:3]} and {len(mask_shapes)} masks {mask_shapes[:3]}."
        )
    if acts is not None and len(acts) != len(maps):
        raise ValueError(f"detection_scores: expected one answer a map, but got {len(acts)} for {len(maps)} maps.")
    found = [np.asarray(m) >= threshold for m in maps]
    unsafe = [(hit, mask) for hit, mask in zip(found, masks, strict=True) if mask.any()]
    is_acting = [bool(hit.any()) for hit in found] if acts is None else list(acts)
    both = [float((hit & mask).sum()) for hit, mask in unsafe]
    return DetectionScores(
        threshold=threshold,
        iou=bootstrap_mean([float(iou(hit, mask)) for hit, mask in unsafe]),
        precision=bootstrap_ratio(both, [float(hit.sum()) for hit, _ in unsafe]),
        recall=bootstrap_ratio(both, [float(mask.sum()) for _, mask in unsafe]),
        image_recall=proportion([act for act, mask in zip(is_acting, masks, strict=True) if mask.any()]),
        false_trigger=proportion([act for act, mask in zip(is_acting, masks, strict=True) if not mask.any()]),
    )
