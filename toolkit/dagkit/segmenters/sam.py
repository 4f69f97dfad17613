"""Segment Anything (Kirillov et al., 2023) from its own package: vit_b, vit_l, vit_h, and the bundled small one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import torch

from dagkit.concept import PluginOptions, Text
from dagkit.errors import CheckpointError
from dagkit.segmenters import Mask, Segmenter
from dagkit.segmenters.checkpoints import TINY, find_sam
from dagkit.segmenters.cleaning import clean_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.proposers import Proposal

STABILITY_OFFSET: Final = 1.0
"""Logits by which the threshold is moved both ways to see how much a mask depends on it (as SAM does)."""

_BOXES_AT_ONCE: Final = 32


class SamOptions(PluginOptions):
    """Which SAM, and how it is prompted."""

    model_type: Literal["vit_b", "vit_l", "vit_h", "vit_tiny"] = "vit_h"
    """What kind of SAM; ``vit_tiny`` is the bundled one."""
    checkpoint: Text | None = None
    """File of its weights, or ``demo``; by default where ``dagkit doctor`` says."""
    use_points: bool = True
    """Prompt with the proposals' points beside their boxes."""


class SamSegmenter(Segmenter):
    """SAM prompted with boxes and, where the proposer knows one, a point.

    Args:
        sam: a model of the package ``segment_anything``.
        model_type: what kind of SAM it is.
        device: torch device.
        use_points: prompt with the proposals' points beside their boxes.
    """

    name = "sam"
    Options = SamOptions

    def __init__(self, sam: Any, model_type: str, device: str = "cpu", *, use_points: bool = True) -> None:
        from segment_anything import SamPredictor

        self._sam = sam.to(device).eval()
        self._predictor = SamPredictor(self._sam)
        self._use_points = use_points
        self.version = f"{model_type}-1"

    @classmethod
    def from_concept(
        cls, concept: Concept, device: str = "cpu", checkpoint: Path | None = None, *, options: SamOptions | None = None
    ) -> Self:
        """Reads the weights of the kind that the options name."""
        options = options or cls.Options()
        path = find_sam(options.model_type, checkpoint or options.checkpoint)
        sam = load_sam(options.model_type, path)
        return cls(sam, options.model_type, device, use_points=options.use_points)

    @torch.no_grad()
    def segment(self, image: Image.Image, proposals: Sequence[Proposal]) -> list[Mask]:
        """One cleaned mask a proposal; its score is the predicted IoU times the stability, in [0, 1]."""
        if not proposals:
            return []
        self._predictor.set_image(np.asarray(image.convert("RGB")))
        masks: list[Mask] = []
        for start in range(0, len(proposals), _BOXES_AT_ONCE):
            masks += self._outline(proposals[start : start + _BOXES_AT_ONCE], (image.height, image.width))
        self._predictor.reset_image()
        return masks

    def _outline(self, proposals: Sequence[Proposal], shape: tuple[int, int]) -> list[Mask]:
        """All boxes of one decoder pass; the image is embedded already. Boxes without a point get a padding point."""
        transform, device = self._predictor.transform, self._predictor.device
        boxes = torch.tensor([proposal.box for proposal in proposals], dtype=torch.float32)
        boxes = transform.apply_boxes_torch(boxes, shape).to(device)
        points = labels = None
        if self._use_points and any(proposal.point for proposal in proposals):
            places = torch.tensor([[proposal.point or (0.0, 0.0)] for proposal in proposals], dtype=torch.float32)
            points = transform.apply_coords_torch(places, shape).to(device)
            labels = torch.tensor([[1 if proposal.point else -1] for proposal in proposals], device=device)
        logits, predicted_iou, _ = self._predictor.predict_torch(
            points, labels, boxes, multimask_output=False, return_logits=True
        )
        trust = predicted_iou[:, 0].clamp(0, 1) * stability(logits[:, 0], self._sam.mask_threshold)
        outlines: NDArray[np.bool_] = (logits[:, 0] > self._sam.mask_threshold).cpu().numpy()
        return [
            Mask(clean_mask(outline), float(score), proposal.label, proposal.is_positive, proposal.box)
            for outline, score, proposal in zip(outlines, trust.cpu(), proposals, strict=True)
        ]


def stability(logits: torch.Tensor, threshold: float, offset: float = STABILITY_OFFSET) -> torch.Tensor:
    """How little a mask depends on its threshold: IoU of the masks at ``threshold`` plus and minus ``offset``.

    Args:
        logits: (N, H, W).
        threshold: logit from which a pixel belongs to the mask.
        offset: how far to move it both ways, > 0.

    Returns:
        (N,) float32 in [0, 1]; 0 where even the wider mask is empty.
    """
    from segment_anything.utils.amg import calculate_stability_score

    score: torch.Tensor = calculate_stability_score(logits, threshold, offset)
    return score.nan_to_num(0.0)


def load_sam(model_type: str, path: Path) -> Any:
    """Builds a SAM and reads its weights, never running code from the file.

    Args:
        model_type: ``vit_b``, ``vit_l``, ``vit_h`` or ``vit_tiny``.
        path: ``.pth`` as published, or safetensors.

    Raises:
        CheckpointError: the file is damaged or holds another network.
    """
    from safetensors import SafetensorError

    try:
        if model_type == TINY:
            from dagkit.segmenters.sam_tiny import build_sam_tiny

            return build_sam_tiny(path)
        from safetensors.torch import load_file
        from segment_anything import sam_model_registry

        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        sam = sam_model_registry[model_type]()
        sam.load_state_dict(weights)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path}: expected the weights of SAM {model_type}, but they cannot be read ({reason}). "
            "Check segmenter.model_type, or delete the file and get it again."
        ) from error
    return sam
