"""Proposers: where in an image the concept may be. They suggest boxes; segmenters outline them and people correct them.

A proposer is one file with one class, registered in `dagkit.plugins`. A concept may name several: all propose, and
`suppress_overlaps` keeps the best of each group of boxes that mean the same thing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dagkit.concept import PluginOptions, find_plugin
from dagkit.errors import ConceptError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Proposal:
    """One region that may show something.

    Attributes:
        box: (x0, y0, x1, y1) in pixels, exclusive at the end, inside the image.
        score: how surely it is there, in [0, 1]; comparable within one proposer only.
        label: a positive or negative label of the concept.
        is_positive: False where the region is to be cut out of the mask.
        point: (x, y) in pixels that surely lies on the thing, where the proposer knows one.
    """

    box: Box
    score: float
    label: str
    is_positive: bool = True
    point: Point | None = None


class Proposer(ABC):
    """Suggests regions of one image.

    Attributes:
        name: as registered.
        version: changes when its proposals do.
        Options: what a concept file may say beside the plugin's name.
        needs_base_model: whether it looks through the eyes of the model that drew the images.
    """

    name: ClassVar[str]
    version: str
    Options: ClassVar[type[PluginOptions]] = PluginOptions
    needs_base_model: ClassVar[bool] = False

    @classmethod
    def from_concept(
        cls, concept: Concept, base_model: BaseModel | None = None, device: str = "cpu", *, options: Any = None
    ) -> Self:
        """Builds the proposer for a concept; `build_proposers` reads the options.

        Args:
            concept: whose labels and words to look for.
            base_model: the model that drew the images.
            device: torch device, for proposers with a model of their own.
            options: an instance of ``Options``; its defaults where None.

        Raises:
            ConceptError: there is no base model, but it needs one.
            CheckpointError: weights are missing; the message says where to get them.
            PluginError: a package is missing; the message says how to install it.
        """
        return cls()

    @abstractmethod
    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Regions of one RGB image, best first.

        Args:
            image: any size.
            prompt: what the image was drawn from; may be empty.
            seed: same seed, same proposals.
        """


def build_proposers(concept: Concept, base_model: BaseModel | None = None, device: str = "cpu") -> list[Proposer]:
    """All proposers that a concept names, in its order.

    Raises:
        PluginError: an unknown name, or a package is missing.
        ConceptError: wrong options, or there is no base model, but a proposer needs one.
        CheckpointError: weights are missing.
    """
    named = [find_plugin("proposers", plugin, concept) for plugin in concept.proposers]
    return [found.from_concept(concept, base_model, device, options=options) for found, options in named]


def require_base_model(concept: Concept, name: str, base_model: BaseModel | None) -> BaseModel:
    """The base model that a proposer needs.

    Raises:
        ConceptError: there is none.
    """
    if base_model is None:
        raise ConceptError(f"concept {concept.name!r}: the proposer {name!r} needs the base model, but none was given.")
    return base_model


def propose_all(
    proposers: Iterable[Proposer], image: Image.Image, prompt: str, seed: int, *, iou_threshold: float = 0.5
) -> list[Proposal]:
    """Proposals of several proposers without near-copies, best first."""
    found = [proposal for proposer in proposers for proposal in proposer.propose(image, prompt, seed)]
    return suppress_overlaps(found, iou_threshold)


def suppress_overlaps(proposals: Iterable[Proposal], iou_threshold: float = 0.5) -> list[Proposal]:
    """Non-maximum suppression: of boxes with one label that overlap, the one with the best score stays.

    A box that lies inside a better one is a part of the same thing. A kept box that has no point takes that of the
    first suppressed one whose point lies inside it.

    Args:
        proposals: of one image, in any order.
        iou_threshold: boxes of one label with a larger IoU are one thing, in (0, 1].

    Returns:
        The kept ones, best first; among equal scores the earlier one first.
    """
    import torch
    from torchvision.ops import box_iou

    ranked = sorted(proposals, key=lambda proposal: -proposal.score)
    boxes = torch.tensor([proposal.box for proposal in ranked], dtype=torch.float64).reshape(-1, 4)
    overlaps = (box_iou(boxes, boxes) > iou_threshold).tolist()
    kept: dict[int, Proposal] = {}
    # Not torchvision.ops.nms: it knows neither a box inside another nor whose point to keep.
    for rank, proposal in enumerate(ranked):
        same = ((index, other) for index, other in kept.items() if other.label == proposal.label)
        twin = next((i for i, other in same if overlaps[i][rank] or _lies_inside(proposal.box, other.box)), None)
        if twin is None:
            kept[rank] = proposal
        elif kept[twin].point is None and proposal.point is not None and _holds(kept[twin].box, proposal.point):
            kept[twin] = replace(kept[twin], point=proposal.point)
    return list(kept.values())


def _lies_inside(part: Box, whole: Box) -> bool:
    return part[0] >= whole[0] and part[1] >= whole[1] and part[2] <= whole[2] and part[3] <= whole[3]


def _holds(box: Box, point: Point) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]
