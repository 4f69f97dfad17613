"""Trains the small SAM on rendered scenes: each object from a loose box and from one point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dagkit.demo import world
from dagkit.demo.degrade import degrade, reconstruct
from dagkit.demo.judge import draw_example
from dagkit.segmenters.sam_tiny import IMAGE_PX

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from segment_anything.modeling import Sam

    from dagkit.demo.recipe import SamRecipe


def object_masks(scene: world.Scene) -> NDArray[np.bool_]:
    """(N, 64, 64) bool: the mask of each object drawn, repeats apart."""
    masks = np.zeros((len(scene.classes), world.SIZE_PX, world.SIZE_PX), np.bool_)
    for mask, name, (x0, y0, x1, y1) in zip(masks, scene.classes, scene.boxes, strict=True):
        mask[y0:y1, x0:x1] = scene.mask(name)[y0:y1, x0:x1]
    return masks


def loose_box(box: tuple[int, int, int, int], rng: np.random.Generator, slack: float) -> NDArray[np.float32]:
    """(4,) float32 x0, y0, x1, y1: each side moved by up to ``slack`` of the box's size, kept inside the image."""
    size = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    moved = np.array(box) + rng.uniform(-slack, slack, 4) * size
    return np.asarray(moved.clip(0, world.SIZE_PX), np.float32)


def random_point(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
    """(2,) float32 x, y of a random pixel of the mask."""
    pixels = np.argwhere(mask)
    return pixels[int(rng.integers(len(pixels))), ::-1].astype(np.float32)


class SamLoss:
    """Focal and Dice loss of the masks, squared error of the predicted IoU (Segment Anything, appendix A).

    Args:
        sam: what is trained.
        autoencoder: AutoencoderKL of the base model.
        recipe: weights and data.
    """

    def __init__(self, sam: Sam, autoencoder: Any, recipe: SamRecipe) -> None:
        self._sam, self._autoencoder, self._recipe = sam, autoencoder, recipe

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Scalar loss of one batch."""
        recipe = self._recipe
        scenes = [scene for scene in (draw_example(rng) for _ in range(recipe.schedule.batch_size)) if scene.classes]
        images = np.stack([scene.image for scene in scenes])
        pixels = reconstruct(images, self._autoencoder, rng, recipe.reconstructed_share, recipe.latent_noise)
        pixels = torch.stack([degrade(image, rng, cover_probability=0.0) for image in pixels])
        resized = F.interpolate(pixels, (IMAGE_PX, IMAGE_PX), mode="bilinear", align_corners=False)
        embeddings = self._sam.image_encoder(self._sam.preprocess((resized + 1) * 127.5))
        losses = [self._scene_loss(e[None], scene, rng) for e, scene in zip(embeddings, scenes, strict=True)]
        return torch.cat(losses).mean()

    def _scene_loss(self, embedding: Tensor, scene: world.Scene, rng: np.random.Generator) -> Tensor:
        """(2 N,) float32: the loss of each object from its box, then from its point."""
        masks = object_masks(scene)
        scale = IMAGE_PX / world.SIZE_PX
        boxes = torch.from_numpy(np.stack([loose_box(box, rng, self._recipe.box_slack) for box in scene.boxes]))
        points = torch.from_numpy(np.stack([random_point(mask, rng) for mask in masks]))[:, None]
        target = torch.from_numpy(masks).float()[:, None]
        encoder = self._sam.prompt_encoder
        from_boxes, dense = encoder(points=None, boxes=boxes * scale, masks=None)
        from_points, _ = encoder(points=(points * scale, torch.ones(len(masks), 1)), boxes=None, masks=None)
        sparse = torch.cat([from_boxes, from_points])  # two tokens each: corners, or a point and its padding
        logits, quality = self._sam.mask_decoder.predict_masks(
            embedding, encoder.get_dense_pe(), sparse, torch.cat([dense, dense])
        )
        return mask_loss(logits, quality, torch.cat([target, target]))


def mask_loss(logits: Tensor, quality: Tensor, target: Tensor) -> Tensor:
    """Loss of the single mask, of the best of the three others, and of all predicted IoUs.

    Args:
        logits: (N, 4, H, W), the first of them the single mask.
        quality: (N, 4), predicted IoU.
        target: (N, 1, H, W), 0 or 1.

    Returns:
        (N,) float.
    """
    target = target.expand_as(logits)
    probability = logits.sigmoid()
    error = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = ((target - probability).abs() ** 2 * error).mean((2, 3))
    overlap, total = (probability * target).sum((2, 3)), (probability + target).sum((2, 3))
    each = 20 * focal + 1 - (2 * overlap + 1) / (total + 1)
    with torch.no_grad():
        predicted, truth = logits > 0, target > 0.5
        iou = (predicted & truth).sum((2, 3)) / (predicted | truth).sum((2, 3)).clamp(min=1)
    return each[:, 0] + each[:, 1:].amin(1) + ((quality - iou) ** 2).mean(1)
