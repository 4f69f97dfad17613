"""Body parts that NudeNet finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import AfterValidator, BeforeValidator

from dagkit.concept import Label, PluginOptions, Share
from dagkit.concept.fields import as_list
from dagkit.nudenet import BODY_PARTS, BodyPart, detect, load_detector, package_version
from dagkit.proposers import Proposal, Proposer, suppress_overlaps

if TYPE_CHECKING:
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel

EXPOSED: Final[list[BodyPart]] = [
    part for part in BODY_PARTS if part.endswith("EXPOSED") and not part.startswith(("ARMPITS", "FEET"))
]


def _each_once(classes: dict[str, list[BodyPart]]) -> dict[str, list[BodyPart]]:
    owners: dict[str, str] = {}
    for label, parts in classes.items():
        for part in parts:
            if part in owners:
                raise ValueError(f"{part} is mapped to {owners[part]!r} and to {label!r}. Keep one.")
            owners[part] = label
    return classes


BodyParts = Annotated[list[BodyPart], BeforeValidator(as_list, json_schema_input_type=BodyPart | list[BodyPart])]


class NudeNetOptions(PluginOptions):
    """Which body parts mean which label."""

    classes: Annotated[dict[Label, BodyParts], AfterValidator(_each_once)] | None = None
    """Labels with NudeNet's classes. By default EXPOSED ones (no armpits, no feet), and faces for a label ``face``."""
    threshold: Share = 0.25
    """Proposals with a smaller score are dropped; NudeNet itself never reports less than 0.25."""


class NudeNetProposer(Proposer):
    """Boxes of the body parts that a concept maps to its labels.

    Args:
        classes: NudeNet's class -> (label, whether it is positive).
        threshold: proposals with a smaller score are dropped, in [0, 1].
    """

    name = "nudenet"
    Options = NudeNetOptions

    def __init__(self, classes: Mapping[str, tuple[str, bool]], threshold: float) -> None:
        self._classes, self._threshold = dict(classes), threshold
        self._detector, self.version = load_detector(), package_version()

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,
        device: str = "cpu",
        *,
        options: NudeNetOptions | None = None,
    ) -> Self:
        """Without ``classes``, exposed body is the first positive label, and faces are the negative label ``face``."""
        options, labels = options or cls.Options(), concept.labels
        classes = options.classes
        if classes is None:
            faces: dict[str, list[BodyPart]] = {"face": ["FACE_FEMALE", "FACE_MALE"]}
            classes = {labels.positive[0]: EXPOSED, **(faces if "face" in labels.negative else {})}
        mapped: dict[str, tuple[str, bool]]
        mapped = {part: (label, labels.is_positive(label)) for label, parts in classes.items() for part in parts}
        return cls(mapped, options.threshold)

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Boxes of all mapped classes; prompt and seed do not matter."""
        del prompt, seed
        found = []
        for part, score, box in detect(self._detector, image):
            target = self._classes.get(part)
            if target and score >= self._threshold and box[2] > box[0] and box[3] > box[1]:
                label, is_positive = target
                found.append(Proposal(box, min(score, 1.0), label, is_positive))
        return suppress_overlaps(found)
