"""CLIP zero-shot: is an image nearer to texts with the concept than to texts without it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import torch
from pydantic import Field

from dagkit.concept import OneOrMoreTexts, PluginOptions, Share, Text
from dagkit.errors import CheckpointError, ConceptError, brief, reason
from dagkit.judges import Judge, Judgement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from dagkit.concept import Concept

DEFAULT_CHECKPOINT: Final = "openai/clip-vit-large-patch14"


class ClipOptions(PluginOptions):
    """What to compare images with."""

    checkpoint: Text = DEFAULT_CHECKPOINT
    """Folder or Hub id of a CLIP."""
    present: OneOrMoreTexts | None = None
    """Texts that show the concept; by default its initial phrase."""
    absent: OneOrMoreTexts = Field(["a photo"])
    """Texts that do not."""
    objects: list[Text] | None = None
    """Other content to look for; by default what the concept's prompts ask to keep."""
    threshold: Share = 0.5
    """Score from which the concept counts as present."""


class ClipJudge(Judge):
    """Compares images with texts; needs no training and knows whatever CLIP knows.

    The score is the softmax share of the ``present`` texts among ``present`` and ``absent`` ones. Each of ``objects``
    gets the share of "a photo of X" against "a photo".

    Args:
        model: a ``CLIPModel``.
        processor: its ``CLIPProcessor``.
        present: texts that show the concept, at least one.
        absent: texts that do not, at least one.
        objects: other content to look for.
        threshold: score from which the concept counts as present, in [0, 1].
        checkpoint: where the model is from, for the record.
        device: torch device.
    """

    concept_labels = ("concept",)
    Options = ClipOptions
    threshold: float

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        present: Sequence[str],
        absent: Sequence[str] = ("a photo",),
        objects: Sequence[str] = (),
        threshold: float = 0.5,
        checkpoint: str = DEFAULT_CHECKPOINT,
        device: str = "cpu",
    ) -> None:
        if not present or not absent:
            raise ConceptError(
                "judge clip: present and absent need at least one text each. Add them to the concept file."
            )
        self._model, self._processor, self._device = model.float().eval().to(device), processor, device
        self.present, self.absent, self.objects = tuple(present), tuple(absent), tuple(objects)
        self.threshold, self.checkpoint = threshold, checkpoint
        self._texts = self._embed([*self.present, *self.absent, *(f"a photo of {name}" for name in objects), "a photo"])

    @classmethod
    def from_concept(
        cls, concept: Concept | None = None, device: str = "cpu", *, options: ClipOptions | None = None
    ) -> Self:
        """By default ``present`` is the concept's initial phrase, and ``objects`` what its prompts ask to keep."""
        options = options or cls.Options()
        present, objects = options.present, options.objects
        if concept is not None:
            kept = [value for slot in concept.prompts.keep for value in concept.prompts.slots[slot]]
            present = [concept.initial_phrase] if present is None else present
            objects = kept if objects is None else objects
        return cls.from_checkpoint(
            options.checkpoint,
            device=device,
            present=present or [],
            absent=options.absent,
            objects=objects or [],
            threshold=options.threshold,
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: str, *, device: str = "cpu", **options: Any) -> Self:
        """Loads CLIP from a folder or the Hub.

        Raises:
            CheckpointError: it is not there or is something else.
        """
        advice = "Name a folder or a Hub id under judge.checkpoint in the concept file."
        model, processor = load_clip(checkpoint, "judge clip", advice)
        return cls(model, processor, checkpoint=checkpoint, device=device, **options)

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure made with this judge must state."""
        own = {"checkpoint": self.checkpoint, "threshold": self.threshold}
        return {**own, "present": list(self.present), "absent": list(self.absent), "objects": list(self.objects)}

    @torch.inference_mode()
    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image; ``labels`` holds ``concept`` and every object."""
        embeds = torch.nn.functional.normalize(self.features(images), dim=-1)
        logits = self._model.logit_scale.exp() * embeds @ self._texts.T
        num_present = len(self.present)
        num_both = num_present + len(self.absent)
        scores = logits[:, :num_both].softmax(1)[:, :num_present].sum(1)
        objects = (logits[:, num_both:-1] - logits[:, -1:]).sigmoid()
        return [self._judgement(score, row) for score, row in zip(scores.tolist(), objects.tolist(), strict=True)]

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, d) float32 image embeddings as CLIP projects them, not normalised; for Fréchet distances."""
        inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return _pooled(self._model.get_image_features(inputs.pixel_values.to(self._device)))

    def _judgement(self, score: float, objects: list[float]) -> Judgement:
        labels = {"concept": score, **dict(zip(self.objects, objects, strict=True))}
        return Judgement(score >= self.threshold, score, labels)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self._device)
        features = self._model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return torch.nn.functional.normalize(_pooled(features), dim=-1)


def load_clip(checkpoint: str, asked_by: str, advice: str) -> tuple[Any, Any]:
    """A ``CLIPModel`` and its ``CLIPProcessor``, from a folder or the Hub.

    Args:
        checkpoint: which.
        asked_by: how the message of an error begins.
        advice: how it ends.

    Raises:
        CheckpointError: it is not there or is something else.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(checkpoint), CLIPProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{asked_by}: {brief(checkpoint)} cannot be loaded: {reason(error)} {advice}") from error


def _pooled(features: Any) -> torch.Tensor:
    """A tensor, from a tensor or transformers' output with pooled features."""
    tensor: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return tensor
