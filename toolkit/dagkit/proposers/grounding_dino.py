"""Grounding DINO (Liu et al., 2023) from transformers: a detector that is prompted with phrases."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from pydantic import Field

from dagkit.concept import Label, OneOrMoreTexts, PluginOptions, Share, Text
from dagkit.errors import CheckpointError
from dagkit.proposers import Proposal, Proposer, suppress_overlaps

if TYPE_CHECKING:
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel

DEFAULT_MODEL: Final = "IDEA-Research/grounding-dino-tiny"


class GroundingDinoOptions(PluginOptions):
    """What to look for, with which weights."""

    model: Text = DEFAULT_MODEL
    """Folder or Hub id."""
    phrases: dict[Label, OneOrMoreTexts] = Field({})
    """Labels, positive or negative, with phrases that mean them; else the concept's words, and its negative labels."""
    threshold: Share = 0.3
    """Boxes with a smaller score are dropped."""


class GroundingDinoProposer(Proposer):
    """Boxes of phrases; one pass a label, so that every box belongs to one label for sure.

    Args:
        model: ``GroundingDinoForObjectDetection``.
        processor: what belongs to it.
        phrases: label -> phrases that mean it.
        positive: which of these labels are positive.
        source: where the model is from, for `version`.
        threshold: boxes with a smaller score are dropped, in [0, 1].
        device: torch device.
    """

    name = "grounding_dino"
    Options = GroundingDinoOptions

    def __init__(
        self,
        model: Any,
        processor: Any,
        phrases: Mapping[str, list[str]],
        positive: frozenset[str],
        *,
        source: str,
        threshold: float,
        device: str = "cpu",
    ) -> None:
        self._model, self._processor, self._device = model.to(device).eval(), processor, device
        self._phrases, self._positive, self._threshold = dict(phrases), positive, threshold
        self.version = f"{source.rstrip('/').rpartition('/')[2]}-1"

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,
        device: str = "cpu",
        *,
        options: GroundingDinoOptions | None = None,
    ) -> Self:
        """Without phrases, ``concept.words`` mean the first positive label, and each negative label means its name."""
        options = options or cls.Options()
        phrases = options.phrases or {
            concept.labels.positive[0]: list(concept.words),
            **{label: [label.replace("_", " ")] for label in concept.labels.negative},
        }
        positive = frozenset(label for label in phrases if concept.labels.is_positive(label))
        model, processor = _load(options.model)
        return cls(
            model, processor, phrases, positive, source=options.model, threshold=options.threshold, device=device
        )

    @torch.no_grad()
    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Boxes of all phrases; the image's prompt and the seed do not matter."""
        del prompt, seed
        found: list[Proposal] = []
        for label, phrases in self._phrases.items():
            text = " ".join(f"{phrase.lower().strip(' .')}." for phrase in phrases)
            inputs = self._processor(images=image.convert("RGB"), text=text, return_tensors="pt").to(self._device)
            (result,) = self._processor.post_process_grounded_object_detection(
                self._model(**inputs),
                inputs["input_ids"],
                self._threshold,  # of boxes, by a name that transformers 4.51 changed
                text_threshold=self._threshold,
                target_sizes=[(image.height, image.width)],
            )
            for score, box in zip(result["scores"].tolist(), result["boxes"].tolist(), strict=True):
                x0, x1 = (min(max(side, 0.0), float(image.width)) for side in (box[0], box[2]))
                y0, y1 = (min(max(side, 0.0), float(image.height)) for side in (box[1], box[3]))
                if x1 - x0 >= 1 and y1 - y0 >= 1:
                    found.append(Proposal((x0, y0, x1, y1), min(score, 1.0), label, label in self._positive))
        return suppress_overlaps(found)


def _load(source: str) -> tuple[Any, Any]:
    transformers: Any = import_module("transformers")
    try:
        processor = transformers.AutoProcessor.from_pretrained(source)
        return transformers.GroundingDinoForObjectDetection.from_pretrained(source), processor
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{source}: Grounding DINO cannot be loaded ({reason}). Get it with:\n"
            f"  hf download {DEFAULT_MODEL}\nor give a folder as the proposer's option model."
        ) from error
