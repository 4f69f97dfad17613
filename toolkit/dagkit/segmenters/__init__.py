"""Segmenters: from a box to the outline of what is in it.

A segmenter is one file with one class, registered in `dagkit.plugins`. It looks at an image once, however many boxes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from dagkit.concept import PluginOptions, find_plugin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.proposers import Box, Proposal


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The outline of one thing.

    Attributes:
        mask: (H, W) bool, as large as the image.
        score: the segmenter's own trust in the outline, in [0, 1].
        label: the label of the proposal that it came from.
        is_positive: False where it is to be cut out.
        box: the box that it was made from.
    """

    mask: NDArray[np.bool_]
    score: float
    label: str
    is_positive: bool
    box: Box


class Segmenter(ABC):
    """Outlines proposals in one image.

    Attributes:
        name: as registered.
        version: changes when its masks do.
        Options: what a concept file may say beside the plugin's name.
    """

    name: ClassVar[str]
    version: str
    Options: ClassVar[type[PluginOptions]] = PluginOptions

    @classmethod
    def from_concept(
        cls, concept: Concept, device: str = "cpu", checkpoint: Path | None = None, *, options: Any = None
    ) -> Self:
        """Builds the segmenter for a concept; `build_segmenter` reads the options.

        Args:
            concept: whose file names it.
            device: torch device.
            checkpoint: weights; overrides the options.
            options: an instance of ``Options``; its defaults where None.

        Raises:
            CheckpointError: weights are missing or damaged; the message says where to get them and where to put them.
        """
        return cls()

    @abstractmethod
    def segment(self, image: Image.Image, proposals: Sequence[Proposal]) -> list[Mask]:
        """One mask a proposal, in order; an empty mask where nothing was found. RGB images of any size."""


def build_segmenter(concept: Concept, device: str = "cpu", checkpoint: Path | None = None) -> Segmenter:
    """The segmenter that a concept names.

    Raises:
        PluginError: an unknown name.
        ConceptError: wrong options.
        CheckpointError: weights are missing or damaged.
    """
    found, options = find_plugin("segmenters", concept.segmenter, concept)
    segmenter: Segmenter = found.from_concept(concept, device, checkpoint, options=options)
    return segmenter


def union_by_label(masks: Iterable[Mask]) -> dict[str, tuple[NDArray[np.bool_], float]]:
    """Label -> (union of its masks, score); labels without a single pixel are left out.

    The score is the mean of the masks' scores, weighted by their areas.
    """
    groups: dict[str, list[Mask]] = {}
    for mask in masks:
        if mask.mask.any():
            groups.setdefault(mask.label, []).append(mask)
    merged = {}
    for label, group in groups.items():
        areas = [int(mask.mask.sum()) for mask in group]
        score = float(np.average([mask.score for mask in group], weights=areas))
        merged[label] = (np.logical_or.reduce([mask.mask for mask in group]), score)
    return merged


def combine(
    masks: Mapping[str, NDArray[np.bool_]], negative: Iterable[str], shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """The mask of a concept: union of its positive labels minus union of its negative ones.

    Args:
        masks: label -> (H, W) bool.
        negative: names of the negative labels; all others are positive.
        shape: (H, W).

    Returns:
        (H, W) bool; all False where no positive label has a mask.
    """
    cut = set(negative)
    result = np.zeros(shape, dtype=np.bool_)
    for label, mask in masks.items():
        if label not in cut:
            result |= mask
    for label, mask in masks.items():
        if label in cut:
            result &= ~mask
    return result
