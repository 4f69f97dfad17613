"""Proposers: where in an image the concept may be. They suggest boxes; segmenters outline them and people correct them.

A proposer is one file with one class, registered in `dagkit.plugins`. A concept may name several: all propose, and
`suppress_overlaps` keeps the best of each group of boxes that mean the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from dagkit import plugins
from dagkit.errors import ConceptError, brief, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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


@runtime_checkable
class Proposer(Protocol):
    """Suggests regions of one image.

    Attributes:
        name: as registered.
        version: changes when its proposals do.
        needs_base_model: whether `from_concept` refuses to go without one.
    """

    name: str
    version: str
    needs_base_model: bool

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,
        device: str = "cpu",
        *,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Builds the proposer for a concept.

        Args:
            concept: whose labels and words to look for.
            base_model: the model that drew the images, for proposers that look through its eyes.
            device: torch device, for proposers with a model of their own.
            options: what the concept file says beside the plugin's name.

        Raises:
            ConceptError: an unknown option, or one that names a label which the concept does not have.
            CheckpointError: weights are missing; the message says where to get them.
        """
        ...

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Regions of one RGB image, best first.

        Args:
            image: any size.
            prompt: what the image was drawn from; may be empty.
            seed: same seed, same proposals.
        """
        ...


def build_proposers(concept: Concept, base_model: BaseModel | None = None, device: str = "cpu") -> list[Proposer]:
    """All proposers that a concept names, in its order.

    Raises:
        PluginError: an unknown name.
        ConceptError: wrong options.
        CheckpointError: weights are missing.
    """
    return [
        plugins.load("proposers", plugin.name).from_concept(concept, base_model, device, options=plugin.options)
        for plugin in concept.proposers
    ]


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
    kept: list[Proposal] = []
    for proposal in sorted(proposals, key=lambda proposal: -proposal.score):
        twin = next(
            (
                index
                for index, other in enumerate(kept)
                if other.label == proposal.label
                and (box_iou(other.box, proposal.box) > iou_threshold or _lies_inside(proposal.box, other.box))
            ),
            None,
        )
        if twin is None:
            kept.append(proposal)
        elif kept[twin].point is None and proposal.point is not None and _holds(kept[twin].box, proposal.point):
            best = kept[twin]
            kept[twin] = Proposal(best.box, best.score, best.label, best.is_positive, proposal.point)
    return kept


def _lies_inside(part: Box, whole: Box) -> bool:
    return part[0] >= whole[0] and part[1] >= whole[1] and part[2] <= whole[2] and part[3] <= whole[3]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), in [0, 1]; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def check_options(concept: Concept, plugin: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuses options that a plugin does not have.

    Raises:
        ConceptError: an unknown option.
    """
    for key in options:
        if key not in allowed:
            raise ConceptError(
                f"concept {concept.name!r}: {plugin!r} has no option {quoted(key, 60)}. "
                f"Available: {', '.join(allowed) or 'none'}."
            )


def checked_number(concept: Concept, plugin: str, options: Mapping[str, Any], key: str, default: float) -> float:
    """An option that is a number in [0, 1].

    Raises:
        ConceptError: it is something else.
    """
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConceptError(
            f"concept {concept.name!r}: {plugin}.{key} must be a number in [0, 1], but got {quoted(value)}."
        )
    return float(value)


def checked_text(concept: Concept, plugin: str, options: Mapping[str, Any], key: str, default: str) -> str:
    """An option that is a text.

    Raises:
        ConceptError: it is something else.
    """
    value = options.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise ConceptError(f"concept {concept.name!r}: {plugin}.{key} must be a text, but got {quoted(value)}.")
    return value


def checked_flag(concept: Concept, plugin: str, options: Mapping[str, Any], key: str, default: bool) -> bool:
    """An option that is true or false.

    Raises:
        ConceptError: it is something else.
    """
    value = options.get(key, default)
    if not isinstance(value, bool):
        raise ConceptError(f"concept {concept.name!r}: {plugin}.{key} must be true or false, but got {quoted(value)}.")
    return value


def label_phrases(concept: Concept, plugin: str, options: Mapping[str, Any], key: str) -> dict[str, list[str]]:
    """An option that maps labels of the concept to a word or a list of words.

    Returns:
        Label -> its words; empty where the option is not given.

    Raises:
        ConceptError: a label that the concept does not have, or words that are no text.
    """
    given = options.get(key, {})
    where = f"concept {concept.name!r}: {plugin}.{key}"
    if not isinstance(given, dict):
        raise ConceptError(
            f"{where} must map labels to words, like {{{concept.labels.positive[0]}: [word]}}, but got {quoted(given)}."
        )
    phrases: dict[str, list[str]] = {}
    for label, words in given.items():
        check_label(concept, where, label)
        listed = [words] if isinstance(words, str) else words
        if not isinstance(listed, list) or not listed or not all(isinstance(word, str) and word for word in listed):
            raise ConceptError(f"{where}.{label} must be a word or a list of words, but got {quoted(words)}.")
        phrases[label] = listed
    return phrases


def check_label(concept: Concept, where: str, label: str) -> bool:
    """Whether a label is a positive one.

    Raises:
        ConceptError: the concept has no such label.
    """
    known = [*concept.labels.positive, *concept.labels.negative]
    if label not in known:
        raise ConceptError(
            f"{where}: {quoted(label, 60)} is not a label of the concept ({brief(', '.join(known))}). "
            "Add it under labels."
        )
    return label in concept.labels.positive


def _holds(box: Box, point: Point) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]
