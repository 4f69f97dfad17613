"""NudeNet (notAI tech): an ONNX detector of body parts, whose weights come with the package ``nudenet``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from dagkit.errors import CheckpointError, ConceptError, quoted
from dagkit.proposers import Proposal, check_label, check_options, checked_number, suppress_overlaps

if TYPE_CHECKING:
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel

CLASSES: Final = (
    "ANUS_COVERED", "ANUS_EXPOSED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "BELLY_COVERED", "BELLY_EXPOSED",
    "BUTTOCKS_COVERED", "BUTTOCKS_EXPOSED", "FACE_FEMALE", "FACE_MALE", "FEET_COVERED", "FEET_EXPOSED",
    "FEMALE_BREAST_COVERED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_COVERED", "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED",
)  # fmt: skip


class NudeNetProposer:
    """Boxes of the body parts that a concept maps to its labels.

    Args:
        classes: NudeNet's class -> (label, whether it is positive).
        threshold: proposals with a smaller score are dropped, in [0, 1]; NudeNet itself never reports less than 0.2.
    """

    name = "nudenet"
    option_names = ("classes", "threshold")
    needs_base_model = False

    def __init__(self, classes: Mapping[str, tuple[str, bool]], threshold: float = 0.25) -> None:
        self._classes, self._threshold = dict(classes), threshold
        self._detector, self.version = _detector()

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,  # noqa: ARG003
        device: str = "cpu",  # noqa: ARG003
        *,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Options: ``classes`` maps labels to NudeNet's classes; ``threshold`` in [0, 1].

        Without ``classes``, EXPOSED classes (armpits and feet aside) are the first positive label, and faces are the
        negative label ``face``, if there is one.
        """
        options = options or {}
        check_options(concept, cls.name, options, cls.option_names)
        threshold = checked_number(concept, cls.name, options, "threshold", 0.25)
        return cls(_class_map(concept, options.get("classes")), threshold)

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Boxes of all mapped classes; prompt and seed do not matter."""
        del prompt, seed
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        found = []
        for detection in self._detector.detect(bgr):
            target = self._classes.get(detection["class"])
            x, y, width, height = detection["box"]
            if target and detection["score"] >= self._threshold and width > 0 and height > 0:
                label, is_positive = target
                box = (float(x), float(y), float(x + width), float(y + height))
                found.append(Proposal(box, min(float(detection["score"]), 1.0), label, is_positive))
        return suppress_overlaps(found)


def _class_map(concept: Concept, given: Any) -> dict[str, tuple[str, bool]]:
    where = f"concept {concept.name!r}: nudenet.classes"
    if given is None:
        exposed = [name for name in CLASSES if name.endswith("EXPOSED") and not name.startswith(("ARMPITS", "FEET"))]
        given = {concept.labels.positive[0]: exposed}
        if "face" in concept.labels.negative:
            given["face"] = ["FACE_FEMALE", "FACE_MALE"]
    if not isinstance(given, dict):
        raise ConceptError(f"{where} must map labels to NudeNet's classes, but got {quoted(given)}.")
    mapped: dict[str, tuple[str, bool]] = {}
    for label, names in given.items():
        is_positive = check_label(concept, where, label)
        for name in names if isinstance(names, list) else [names]:
            if name not in CLASSES:
                raise ConceptError(
                    f"{where}.{label}: {quoted(name)} is not one of NudeNet's classes: {', '.join(CLASSES)}."
                )
            if name in mapped:
                raise ConceptError(f"{where}: {name} is mapped to {mapped[name][0]!r} and to {label!r}. Keep one.")
            mapped[name] = (label, is_positive)
    return mapped


@cache
def _detector() -> tuple[Any, str]:
    """The detector and its version; loaded once."""
    try:
        detector = import_module("nudenet").NudeDetector()
    except ImportError as error:
        raise CheckpointError(
            "the proposer 'nudenet' needs the package nudenet, which brings its weights. "
            'Install it with: pip install "dagkit[nudenet]"'
        ) from error
    return detector, version("nudenet")
