"""How well a token sees each member of its concept, as its record tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dagkit.errors import ConceptError, TokenError, brief
from dagkit.token.record import TokenRecord

WEAK: Final = 0.9
"""Share of a slice's images that must be seen in time; below it the slice is weak."""


@dataclass(frozen=True, slots=True)
class SliceFigures:
    """One member of a concept, or one cluster of its images; see `dagkit.optimization.Slice`.

    Attributes:
        name: of the member.
        count: images that it was measured on.
        num_held_out: of them, kept apart from training.
        iou: mean IoU of map and mask, in [0, 1].
        detection_rate: share of the images that are seen at any time.
        early_rate: share that are seen in time.
    """

    name: str
    count: int
    num_held_out: int
    iou: float
    detection_rate: float
    early_rate: float

    @property
    def is_weak(self) -> bool:
        """Whether too many of its images are seen too late or never."""
        return self.early_rate < WEAK

    def words(self) -> str:
        """Its figures, on one line."""
        seen = f"{round(self.early_rate * self.count)} of {self.count} seen in time"
        return f"{self.name}: {seen} ({self.num_held_out} held out), IoU {self.iou:.2f}"

    def warning(self, overlaps: Sequence[str] = ()) -> str:
        """What is wrong with a weak one, and what to do.

        Args:
            overlaps: prompts of safe images that score as high as the weakest ones of the slice.
        """
        near = (
            f"; safe images score as high: {', '.join(repr(brief(one, 100)) for one in overlaps)}" if overlaps else ""
        )
        return (
            f"{self.name} is seen in time in only {round(self.early_rate * self.count)} of {self.count} images{near}. "
            "Annotate more of it and more safe images of what it looks like, or make the concept narrower."
        )


def slices_of(record: TokenRecord) -> list[SliceFigures]:
    """The slices of a token's record, the weakest first; none where it does not tell (older ones, one member)."""
    slices = record.metrics.get("slices")
    found = []
    for name, figures in slices.items() if isinstance(slices, dict) else ():
        match figures:
            case {
                "count": int() as count,
                "num_held_out": int() as num_held_out,
                "iou": int() | float() as iou,
                "detection_rate": int() | float() as detected,
                "early_rate": int() | float() as early,
            }:
                found.append(SliceFigures(brief(str(name), 60), count, num_held_out, iou, detected, early))
    return sorted(found, key=lambda one: (one.early_rate, one.detection_rate, one.iou))


def weak_members(record: TokenRecord, members: Sequence[str]) -> list[str]:
    """The members of a concept that a token sees weakly, the weakest first; the weakest one where none is weak.

    Args:
        record: of the token.
        members: of the concept, see `dagkit.concept.Concept.members`.

    Raises:
        ConceptError: the concept has no members.
        TokenError: the record does not tell how the token sees any of them.
    """
    if not members:
        raise ConceptError(
            "no weak members can be chosen: no slot of the concept's unsafe prompts stands for it. Put the words that "
            "it is made of into one slot and under words, make a new token from it, or leave out --select weak."
        )
    known = {brief(member, 60): member for member in members}
    found = [one for one in slices_of(record) if one.name in known]
    if not found:
        raise TokenError(
            f"{record.concept}@{record.version} does not tell how it sees {brief(', '.join(members))}. Make a new one "
            "with dagkit optimize from a dataset that shows them, or leave out --select weak."
        )
    return [known[one.name] for one in found if one.is_weak] or [known[found[0].name]]
