"""Judges: does an image show the concept? They measure what a guard achieves; they never steer it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from dagkit.concept import Options, checked_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says about one image.

    Attributes:
        is_present: whether the concept is there, by the judge's own threshold.
        score: how surely it is there, in [0, 1].
        labels: probability in [0, 1] of each thing that the judge knows by name.
    """

    is_present: bool
    score: float
    labels: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Judge(Protocol):
    """Decides for whole images whether a concept is present."""

    @classmethod
    def from_concept(cls, concept: object | None, device: str = "cpu") -> Self:
        """Builds the judge for a concept; ``None`` stands for the judge's own default."""
        ...

    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image, in order; RGB images of any size."""
        ...


def options_for(concept: object | None, name: str, schema: type[Options]) -> Options:
    """What a concept file says beside the judge's name; the defaults where it names another judge.

    Args:
        concept: a `dagkit.concept.Concept`, or anything without a ``judge``.
        name: of the judge.
        schema: of its options.

    Raises:
        ConceptError: an unknown option, or a wrong value.
    """
    plugin = getattr(concept, "judge", None)
    given = plugin.options if plugin is not None and plugin.name == name else {}
    return checked_options(f"judge {name}", given, schema)
