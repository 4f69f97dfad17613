"""SAM and SAM 2 from transformers, by Hub id or folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from dagkit.concept import PluginOptions, Text
from dagkit.errors import CheckpointError
from dagkit.segmenters import Mask, Segmenter
from dagkit.segmenters.cleaning import clean_mask
from dagkit.segmenters.sam import stability

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.proposers import Proposal

DEFAULT_MODEL: Final = "facebook/sam2.1-hiera-small"
_BOXES_AT_ONCE: Final = 32


class SamHfOptions(PluginOptions):
    """Which model, and how it is prompted."""

    model: Text = DEFAULT_MODEL
    """Folder or Hub id."""
    use_points: bool = True
    """Prompt with the proposals' points beside their boxes."""


class SamHfSegmenter(Segmenter):
    """A mask-generation model of transformers, prompted with boxes and, where the proposer knows one, a point.

    Args:
        model: ``SamModel`` or ``Sam2Model``.
        processor: what belongs to it.
        source: where the model is from, for `version`.
        device: torch device.
        use_points: prompt with the proposals' points beside their boxes.
    """

    name = "sam_hf"
    Options = SamHfOptions

    def __init__(
        self, model: Any, processor: Any, *, source: str, device: str = "cpu", use_points: bool = True
    ) -> None:
        self._model, self._processor, self._device = model.to(device).eval(), processor, device
        self._use_points = use_points
        self.version = f"{source.rstrip('/').rpartition('/')[2]}-1"

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        device: str = "cpu",
        checkpoint: Path | None = None,
        *,
        options: SamHfOptions | None = None,
    ) -> Self:
        """Loads the model that ``checkpoint`` or the options name."""
        options = options or cls.Options()
        source = str(checkpoint or options.model)
        model, processor = _load(source)
        return cls(model, processor, source=source, device=device, use_points=options.use_points)

    @torch.no_grad()
    def segment(self, image: Image.Image, proposals: Sequence[Proposal]) -> list[Mask]:
        """One cleaned mask a proposal; its score is the predicted IoU times the stability, in [0, 1]."""
        if not proposals:
            return []
        rgb, masks, embeddings = image.convert("RGB"), [], None
        for start in range(0, len(proposals), _BOXES_AT_ONCE):
            part = proposals[start : start + _BOXES_AT_ONCE]
            inputs = self._inputs(rgb, part)
            if embeddings is None:
                embeddings = self._model.get_image_embeddings(inputs["pixel_values"])
            prompts = {name: inputs[name] for name in ("input_boxes", "input_points", "input_labels") if name in inputs}
            outputs = self._model(image_embeddings=embeddings, multimask_output=False, **prompts)
            sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
            (logits,) = self._processor.post_process_masks(outputs.pred_masks.cpu(), *sizes, binarize=False)
            trust = outputs.iou_scores[0, :, 0].float().cpu().clamp(0, 1) * stability(logits[:, 0], 0.0)
            masks += [
                Mask(clean_mask(outline), float(score), proposal.label, proposal.is_positive, proposal.box)
                for outline, score, proposal in zip((logits[:, 0] > 0).numpy(), trust, part, strict=True)
            ]
        return masks

    def _inputs(self, image: Image.Image, proposals: Sequence[Proposal]) -> Any:
        """What the model takes; boxes without a point get a padding point, as SAM itself pads."""
        prompts: dict[str, Any] = {"input_boxes": [[list(proposal.box) for proposal in proposals]]}
        if self._use_points and any(proposal.point for proposal in proposals):
            prompts["input_points"] = [[[list(proposal.point or (0.0, 0.0))] for proposal in proposals]]
            prompts["input_labels"] = [[[1 if proposal.point else -1] for proposal in proposals]]
        return self._processor(images=image, return_tensors="pt", **prompts).to(self._device, torch.float32)


def _load(source: str) -> tuple[Any, Any]:
    transformers: Any = import_module("transformers")
    try:
        processor = transformers.AutoProcessor.from_pretrained(source)
        return transformers.AutoModelForMaskGeneration.from_pretrained(source), processor
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{source}: SAM cannot be loaded by transformers ({reason}). Get it with:\n"
            f"  hf download {DEFAULT_MODEL}\nor give a folder with --checkpoint or segmenter.model."
        ) from error
