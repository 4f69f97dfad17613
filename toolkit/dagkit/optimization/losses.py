"""The losses of a guideline token, on detection maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dagkit.optimization.recipe import Recipe


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
    loss = cam.new_zeros(())
    if bool(is_unsafe.any()):
        unsafe, masks = cam[is_unsafe], mask[is_unsafe]
        share = len(unsafe) / int(whole.sum())
        loss = loss + share * recipe.pixel_weight * pixel_cross_entropy(unsafe, masks, recipe.positive_weight).mean()
        loss = loss + share * recipe.leakage_weight * background_leakage(unsafe, masks).mean()
    if not bool(is_unsafe.all()):
        safe = cam[~is_unsafe]
        share = len(safe) / int((~whole).sum())
        loss = loss + share * recipe.negative_weight * negative_attention(safe).mean()
    return loss
