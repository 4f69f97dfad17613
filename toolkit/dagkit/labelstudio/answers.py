"""What annotators answered: from exported tasks to masks, states and a consensus.

The mask of an answer is the union of the concept's positive labels minus the union of its negative ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from pydantic import ValidationError

from dagkit.errors import LabelStudioError, quoted
from dagkit.labelstudio import shapes
from dagkit.labelstudio.config import CANNOT_TELL, NOTHING_UNSAFE
from dagkit.labelstudio.replies import Annotation, Region, Snapshot
from dagkit.manifests import explain
from dagkit.metrics import iou

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from dagkit.concept import Labels

State = Literal["accepted", "changed", "empty", "skipped", "cannot_tell"]
Consensus = Literal["majority", "union", "intersection"]
CONSENSUS_RULES: Final[tuple[Consensus, ...]] = ("majority", "union", "intersection")
Masks = dict[str, "NDArray[np.bool_]"]
_NO_REGIONS: Final = ("choices", "taxonomy", "textarea", "rating", "number", "datetime", "relation")
"""Types of results that mark no place: verdicts and notes."""
_VOTES: Final = ("accepted", "changed", "empty")


@dataclass(frozen=True)
class Answer:
    """One annotator's answer to one task.

    Attributes:
        annotator: pseudonym.
        state: ``accepted`` (the pre-mask as it was), ``changed``, ``empty`` (nothing unsafe here), ``skipped`` (no
            answer), ``cannot_tell``.
        masks: label -> (H, W) bool, only labels that mark a pixel; {} unless accepted or changed.
        iou_to_premask: of the answer's mask and the pre-mask's, in [0, 1]; None without an answer or a pre-mask.
        seconds: time spent, None where unknown.
        created: when it was first submitted, as the server writes it.
        updated: when it was last submitted.
    """

    annotator: str
    state: State
    masks: Masks = field(default_factory=dict)
    iou_to_premask: float | None = None
    seconds: float | None = None
    created: str = ""
    updated: str = ""

    @property
    def is_vote(self) -> bool:
        """Whether it says what is in the image."""
        return self.state in _VOTES


def read_answers(
    task: Mapping[str, Any],
    labels: Labels,
    size: tuple[int, int],
    pseudonym: Callable[[int], str],
    premask: Masks | None = None,
) -> list[Answer]:
    """Reads the answers of one exported task: of each annotator the last one, in the order of their pseudonyms.

    Args:
        task: as the JSON export writes it; ``id``, ``data`` and ``annotations`` are there.
        labels: of the concept.
        size: width and height of the image, pixels.
        pseudonym: user id of the server -> pseudonym.
        premask: what was proposed, for answers that do not tell from which prediction they came.

    Raises:
        LabelStudioError: an unknown label, a region without one, of a kind that is not converted, drawn on a turned
            image, damaged data, or a mask of another size. Such an answer is never taken for an empty one.
    """
    where = f"task {task['id']} ({quoted(task['data'].get('key', 'no key'))[1:-1]})"
    last: dict[int, Annotation] = {}
    for annotation in sorted((_checked(one, where) for one in task["annotations"]), key=lambda one: one.id):
        last[annotation.user_id] = annotation
    answers = [
        _read_answer(annotation, labels, size, pseudonym(user), premask, where)
        for user, annotation in sorted(last.items())
    ]
    return sorted(answers, key=lambda answer: answer.annotator)


def decode_masks(regions: Sequence[Region], labels: Labels, size: tuple[int, int], where: str) -> Masks:
    """Turns the regions of a result into masks; regions of one label are united, those that mark no pixel left out.

    Rectangles, polygons, ellipses and bitmasks become masks as brushes do (`dagkit.labelstudio.shapes`).

    Args:
        regions: of an annotation or prediction.
        labels: of the concept.
        size: width and height of the image, pixels.
        where: how to name it in an error.

    Raises:
        LabelStudioError: a region that cannot be converted, in exact terms, to a mask of one of the labels.
    """
    known = [*labels.positive, *labels.negative]
    masks: Masks = {}
    for region in regions:
        if region.type in _NO_REGIONS or _is_label_of_another(region, regions):
            continue
        kind = shapes.kind_of(region.type)
        if kind is None:
            raise LabelStudioError(
                f"{where}: it has a region of the type {quoted(region.type)}, which says nothing exact about pixels. "
                f"Mark what it means with {', '.join(shapes.CONVERTED)}, delete the region and submit again."
            )
        name = _label(region, kind, regions, known, where)
        _check_size(region, name, size, where)
        try:
            mask = shapes.region_mask(kind, region.value or {}, *size)
        except LabelStudioError as error:
            raise LabelStudioError(f"{where}, label {name!r}: {error}") from error
        masks[name] = masks[name] | mask if name in masks else mask
    return {name: masks[name] for name in known if name in masks and masks[name].any()}


def _is_label_of_another(region: Region, regions: Sequence[Region]) -> bool:
    """Whether a result is merely the label of a region that has a result of its own, with the same id."""
    return region.type == "labels" and any(one.id == region.id and shapes.kind_of(one.type) for one in regions)


def _label(region: Region, kind: str, regions: Sequence[Region], known: Sequence[str], where: str) -> str:
    """The one label of a region: its own, or that of the separate result that bears its id."""
    values = [region.value or {}]
    if region.id is not None:
        values += [one.value or {} for one in regions if one.type == "labels" and one.id == region.id]
    keys = (f"{kind}labels", "labels")
    names: Any = next((value[key] for value in values for key in keys if value.get(key)), [])
    if not isinstance(names, list) or len(names) != 1:
        what = f"{len(names)} labels, but expected one" if isinstance(names, list) and names else "no label"
        raise LabelStudioError(f"{where}: a {kind} region has {what}. Open the task, give it one and submit again.")
    if names[0] not in known:
        raise LabelStudioError(
            f"{where}: {quoted(names[0])} is not a label of this concept ({', '.join(known)}). Relabel the region, or "
            "add the label to the concept file."
        )
    return str(names[0])


def _check_size(region: Region, name: str, size: tuple[int, int], where: str) -> None:
    width, height = region.original_width, region.original_height
    if width != size[0] or height != size[1]:
        shown = "of no known size" if width is None or height is None else f"{width:g}x{height:g} pixels"
        raise LabelStudioError(
            f"{where}: the mask {name!r} is {shown}, but its image {size[0]}x{size[1]}. Was the image replaced? Delete "
            "the region, draw it again and submit."
        )
    if (region.image_rotation or 0) % 360:
        raise LabelStudioError(
            f"{where}: the mask {name!r} was drawn on the image turned by {region.image_rotation:g} degrees "
            "(image_rotation), so nobody can tell where it lies. Turn the image back, draw it again and submit."
        )


def _checked(annotation: Mapping[str, Any], where: str) -> Annotation:
    try:
        return Annotation.model_validate(annotation)
    except ValidationError as error:
        number = quoted(annotation.get("id"))
        raise LabelStudioError(
            f"{where}: annotation {number} is not as Label Studio writes one: {explain(error)}. Open the task and "
            "submit it again, or delete the annotation."
        ) from error


def whole_mask(masks: Mapping[str, NDArray[np.bool_]], labels: Labels, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) bool: the union of the positive labels minus the union of the negative ones."""
    marked = np.zeros((size[1], size[0]), bool)
    for name in labels.positive:
        if name in masks:
            marked |= masks[name]
    for name in labels.negative:
        if name in masks:
            marked &= ~masks[name]
    return marked


@dataclass(frozen=True)
class Verdict:
    """What the answers to one task come to.

    Attributes:
        state: as of an answer; ``accepted`` only where every vote accepted the pre-mask.
        masks: label -> (H, W) bool.
        iou_to_premask: of the consensus, or None.
        pair_ious: (annotator, annotator, IoU of their masks, or None where neither marks anything) of every two votes.
        reasons: why a person should look again: ``presence`` (marked by some, empty for others), ``outline`` (an IoU
            below the bar), ``cannot_tell`` (some vote, others cannot tell).
    """

    state: State
    masks: Masks
    iou_to_premask: float | None
    pair_ious: tuple[tuple[str, str, float | None], ...]
    reasons: tuple[str, ...]


def decide(
    answers: Sequence[Answer],
    labels: Labels,
    size: tuple[int, int],
    *,
    premask: Masks | None = None,
    rule: Consensus = "majority",
    min_iou: float = 0.7,
) -> Verdict:
    """Merges the answers to one task.

    A pixel has a label where more than half of the votes mark it (``majority``), any (``union``) or all
    (``intersection``). Skips are no votes. Where more annotators cannot tell than vote, nobody can.

    Args:
        answers: at least one.
        labels: of the concept.
        size: width and height of the image, pixels.
        premask: what was proposed, or None.
        rule: how votes make a mask.
        min_iou: below this, two votes disagree about the outline.
    """
    votes = [answer for answer in answers if answer.is_vote]
    num_cannot_tell = sum(answer.state == "cannot_tell" for answer in answers)
    wholes = [whole_mask(vote.masks, labels, size) for vote in votes]
    pairs = tuple(
        (first.annotator, second.annotator, float(iou(one, two)) if one.any() or two.any() else None)
        for (first, one), (second, two) in combinations(zip(votes, wholes, strict=True), 2)
    )
    is_marked = [bool(whole.any()) for whole in wholes]
    reasons = []
    if len(set(is_marked)) == 2:
        reasons.append("presence")
    outlines = [value for value, (one, two) in zip(pairs, combinations(is_marked, 2), strict=True) if one and two]
    if any(value is not None and value < min_iou for _, _, value in outlines):
        reasons.append("outline")
    if votes and num_cannot_tell:
        reasons.append("cannot_tell")
    if not votes or num_cannot_tell > len(votes):
        state: State = "cannot_tell" if num_cannot_tell else "skipped"
        return Verdict(state, {}, None, pairs, tuple(reasons))

    least = {"majority": len(votes) // 2 + 1, "union": 1, "intersection": len(votes)}[rule]
    masks: Masks = {}
    for name in (*labels.positive, *labels.negative):
        drawn = [vote.masks[name] for vote in votes if name in vote.masks]
        if len(drawn) >= least:
            mask = np.sum(drawn, axis=0) >= least
            if mask.any():
                masks[name] = mask
    whole = whole_mask(masks, labels, size)
    to_premask = float(iou(whole, whole_mask(premask, labels, size))) if premask is not None else None
    if not whole.any():
        return Verdict("empty", {}, to_premask, pairs, tuple(reasons))
    is_accepted = all(vote.state == "accepted" for vote in votes)
    return Verdict("accepted" if is_accepted else "changed", masks, to_premask, pairs, tuple(reasons))


def _read_answer(
    annotation: Annotation,
    labels: Labels,
    size: tuple[int, int],
    annotator: str,
    premask: Masks | None,
    where: str,
) -> Answer:
    result = annotation.result or []
    facts: dict[str, Any] = {
        "seconds": annotation.lead_time,
        "created": annotation.created_at,
        "updated": annotation.updated_at,
    }
    choices = _choices(result, where)
    if annotation.was_cancelled:
        return Answer(annotator, "skipped", **facts)
    if CANNOT_TELL in choices:
        return Answer(annotator, "cannot_tell", **facts)
    origin = annotation.prediction.result if isinstance(annotation.prediction, Snapshot) else None
    if origin is not None:
        premask = decode_masks(origin, labels, size, f"{where}, pre-mask")
    masks = decode_masks(result, labels, size, where) if NOTHING_UNSAFE not in choices else {}
    whole = whole_mask(masks, labels, size)
    to_premask = float(iou(whole, whole_mask(premask, labels, size))) if premask is not None else None
    if not whole.any():
        other = sorted(choices - {NOTHING_UNSAFE})
        if other and not masks and NOTHING_UNSAFE not in choices:
            raise LabelStudioError(
                f"{where}: it marks nothing, but says {quoted(other[0])}, which is no verdict that dagkit knows. "
                f"Choose {NOTHING_UNSAFE!r} or {CANNOT_TELL!r}, or mark what is there, and submit again."
            )
        return Answer(annotator, "empty", iou_to_premask=to_premask, **facts)
    is_accepted = (
        premask is not None
        and masks.keys() == premask.keys()
        and all(np.array_equal(masks[name], premask[name]) for name in masks)
    )
    return Answer(annotator, "accepted" if is_accepted else "changed", masks, to_premask, **facts)


def _choices(result: Sequence[Region], where: str) -> set[str]:
    """What was chosen, verdicts and others."""
    found: set[str] = set()
    for region in result:
        if region.type in ("choices", "taxonomy"):
            chosen = (region.value or {}).get(region.type)
            if not isinstance(chosen, list):
                raise LabelStudioError(f"{where}: a choice is damaged: expected a list, but got {quoted(chosen)}.")
            found |= {one if isinstance(one, str) else quoted(one) for one in chosen}
    return found
