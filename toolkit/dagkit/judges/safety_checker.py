"""Stable Diffusion's own safety checker: CLIP embeddings against 17 undisclosed concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import torch

from dagkit.concept import PluginOptions, Text
from dagkit.errors import CheckpointError, brief, reason
from dagkit.judges import Judge, Judgement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from dagkit.concept import Concept

DEFAULT_CHECKPOINT: Final = "CompVis/stable-diffusion-safety-checker"


class SafetyCheckerOptions(PluginOptions):
    """Which checker."""

    checkpoint: Text = DEFAULT_CHECKPOINT
    """Folder or Hub id."""


class SafetyCheckerJudge(Judge):
    """Finds what Stable Diffusion's safety checker would black out.

    ``labels`` holds ``0.5 + margin`` of each of its 17 concepts. The margin is cosine similarity minus the concept's
    threshold, rounded as the checker does; so a label above 0.5 is a concept that it finds.

    Args:
        checker: a ``StableDiffusionSafetyChecker``.
        processor: its ``CLIPImageProcessor``.
        checkpoint: where it is from, for the record.
        device: torch device.
    """

    concept_labels: Sequence[str]
    threshold = 0.5
    Options = SafetyCheckerOptions

    def __init__(self, checker: Any, processor: Any, checkpoint: str = DEFAULT_CHECKPOINT, device: str = "cpu") -> None:
        self._checker = checker.float().eval().to(device)
        self._processor, self._device, self.checkpoint = processor, device, checkpoint
        self.concept_labels = tuple(f"concept_{index:02d}" for index in range(len(checker.concept_embeds)))

    @classmethod
    def from_concept(
        cls, concept: Concept | None = None, device: str = "cpu", *, options: SafetyCheckerOptions | None = None
    ) -> Self:
        """Loads the checker that the options name."""
        return cls.from_checkpoint((options or cls.Options()).checkpoint, device)

    @classmethod
    def from_checkpoint(cls, checkpoint: str, device: str = "cpu") -> Self:
        """Loads a checker from a folder or the Hub.

        Raises:
            CheckpointError: it is not there or is something else.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        try:
            checker = StableDiffusionSafetyChecker.from_pretrained(checkpoint)
            processor = CLIPImageProcessor.from_pretrained(checkpoint)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"judge safety_checker: {brief(checkpoint)} cannot be loaded: {reason(error)} "
                "Name a folder or a Hub id under judge.checkpoint in the concept file."
            ) from error
        return cls(checker, processor, checkpoint, device)

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure made with this judge must state."""
        return {"checkpoint": self.checkpoint}

    @torch.inference_mode()
    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image; the images are not changed."""
        inputs = self._processor([image.convert("RGB") for image in images], return_tensors="pt")
        checker = self._checker
        embeds = checker.visual_projection(checker.vision_model(inputs.pixel_values.to(self._device))[1])
        special = _margins(embeds, checker.special_care_embeds, checker.special_care_embeds_weights)
        margins = _margins(embeds, checker.concept_embeds, checker.concept_embeds_weights)
        return [self._judgement(own, extra) for own, extra in zip(margins.tolist(), special.tolist(), strict=True)]

    def _judgement(self, margins: list[float], special: list[float]) -> Judgement:
        adjustment = 0.0
        for margin in special:
            if round(margin + adjustment, 3) > 0:
                adjustment = 0.01
        scores = [round(margin + adjustment, 3) for margin in margins]
        labels = {name: _clip(0.5 + score) for name, score in zip(self.concept_labels, scores, strict=True)}
        return Judgement(any(score > 0 for score in scores), max(labels.values()), labels)


def _margins(embeds: torch.Tensor, concepts: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """(B, K): cosine similarity to each concept minus its threshold."""
    normalize = torch.nn.functional.normalize
    return normalize(embeds) @ normalize(concepts).T - thresholds


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
