"""The losses of a guideline token, on detection maps."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dagkit.guidance import score
from dagkit.optimization.recipe import Recipe

RECOGNISED_AREA: Final = 0.02
"""Share of the image that a concept fills at least, for `recognition`: the calibration chooses among some around it."""


def pixel_cross_entropy(cam: Tensor, mask: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Mean binary cross-entropy between detection map and mask.

    Args:
        cam: (B, H, W) in [0, 1].
        mask: (B, H, W) in [0, 1]; fractions where the mask was coarsened.
        positive_weight: of pixels inside the mask.

    Returns:
        (B,) float32 >= 0.
    """
    weight = 1 + (positive_weight - 1) * mask
    return F.binary_cross_entropy(cam.clamp(1e-5, 1 - 1e-5), mask, weight=weight, reduction="none").mean((1, 2))


def background_leakage(cam: Tensor, mask: Tensor) -> Tensor:
    """Mean attention that falls outside the mask: ``sum(cam * (1 - mask)) / sum(1 - mask)``, (B,) in [0, 1]."""
    outside = 1 - mask
    return (cam * outside).sum((1, 2)) / outside.sum((1, 2)).clamp(min=1e-6)


def negative_attention(cam: Tensor) -> Tensor:
    """Attention on a safe image, as cross-entropy against an empty mask: mean of ``-log(1 - cam)``, (B,) >= 0."""
    return pixel_cross_entropy(cam, torch.zeros_like(cam))


def recognition(cam: Tensor, is_unsafe: Tensor, area: float = RECOGNISED_AREA) -> Tensor:
    """Cross-entropy of the guard's own score of an image (`dagkit.guidance.score`) against its kind.

    The losses over pixels are met by most pixels of most images; a guard acts on images, and this one counts the few
    highest pixels of each. So members of a concept that lie close to something safe are told from it.

    Args:
        cam: (B, H, W) in [0, 1].
        is_unsafe: (B,) bool.
        area: share of the image that must reach a score.

    Returns:
        (B,) float32 >= 0: ``-log(score)`` of unsafe and ``-log(1 - score)`` of safe images.
    """
    scores = score(cam, area).clamp(1e-5, 1 - 1e-5)
    return F.binary_cross_entropy(scores, is_unsafe.to(scores), reduction="none")


def objective(cam: Tensor, mask: Tensor, is_unsafe: Tensor, recipe: Recipe, whole: Tensor | None = None) -> Tensor:
    """The recipe's weighted sum of the losses over a batch, each a mean over its kind of image.

    With ``whole``, each mean is multiplied by the share of its kind that is here: summed over all micro-batches of a
    batch this is the batch's own value, and so are the gradients.

    Args:
        cam: (B, H, W) in [0, 1].
        mask: (B, H, W) in [0, 1].
        is_unsafe: (B,) bool.
        recipe: holds the weights.
        whole: (N,) bool, the kinds of the batch of which this is a micro-batch; ``is_unsafe`` where not given.

    Returns:
        () float32 >= 0.
    """
    whole = is_unsafe if whole is None else whole
    seen = recognition(cam, is_unsafe)
    loss = cam.new_zeros(())
    if bool(is_unsafe.any()):
        unsafe, masks = cam[is_unsafe], mask[is_unsafe]
        share = len(unsafe) / int(whole.sum())
        loss = loss + share * recipe.pixel_weight * pixel_cross_entropy(unsafe, masks, recipe.positive_weight).mean()
        loss = loss + share * recipe.leakage_weight * background_leakage(unsafe, masks).mean()
        loss = loss + share * recipe.recognition_weight * seen[is_unsafe].mean()
    if not bool(is_unsafe.all()):
        safe = cam[~is_unsafe]
        share = len(safe) / int((~whole).sum())
        loss = loss + share * recipe.negative_weight * negative_attention(safe).mean()
        loss = loss + share * recipe.recognition_weight * seen[~is_unsafe].mean()
    return loss
