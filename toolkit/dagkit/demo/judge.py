"""Trains the judge on rendered scenes: clean, noisy, blurred, partly covered, and as the autoencoder returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dagkit.demo import world
from dagkit.demo.degrade import degrade, reconstruct
from dagkit.judges import demo as judges

if TYPE_CHECKING:
    from dagkit.demo.recipe import JudgeRecipe

assert judges.OBJECTS == world.CLASSES
assert judges.BACKGROUNDS == world.BACKGROUNDS


def draw_example(rng: np.random.Generator) -> world.Scene:
    """An ordinary scene, one in which objects repeat, or an empty one."""
    kind = rng.random()
    if kind < 0.55:
        return world.render_scene(rng, object_px=(20, 32))
    return world.render_scene(rng, world.draw_repeats(rng) if kind < 0.95 else (), object_px=(18, 30))


class JudgeLoss:
    """Focal loss of the heat maps, cross-entropy of each object's presence and of the background.

    Args:
        network: what is trained.
        autoencoder: AutoencoderKL of the base model.
        recipe: weights and data.
    """

    def __init__(self, network: judges.JudgeNetwork, autoencoder: Any, recipe: JudgeRecipe) -> None:
        self._network, self._autoencoder, self._recipe = network, autoencoder, recipe

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Scalar loss of one batch."""
        recipe = self._recipe
        scenes = [draw_example(rng) for _ in range(recipe.schedule.batch_size)]
        images = np.stack([scene.image for scene in scenes])
        pixels = reconstruct(images, self._autoencoder, rng, recipe.reconstructed_share, recipe.latent_noise)
        pixels = torch.stack([degrade(image, rng) for image in pixels])
        heat, background = self._network(pixels)
        target = torch.stack([heat_target(scene, heat.shape[-1]) for scene in scenes])
        is_present = target.amax((2, 3)).eq(1).float()
        background_ids = torch.tensor([world.BACKGROUNDS.index(scene.background) for scene in scenes])
        presence = F.binary_cross_entropy_with_logits(heat.amax((2, 3)), is_present)
        return (
            focal_loss(heat, target)
            + recipe.presence_weight * presence
            + recipe.background_weight * F.cross_entropy(background, background_ids)
        )


def heat_target(scene: world.Scene, num_cells: int) -> Tensor:
    """(20, cells, cells) float32: 1 at the cell of each object's centre, falling off as a Gaussian of one cell."""
    target = torch.zeros(len(world.CLASSES), num_cells, num_cells)
    cells = torch.arange(num_cells)
    for name, (x0, y0, x1, y1) in zip(scene.classes, scene.boxes, strict=True):
        column, row = (int((a + b) / 2 * num_cells / world.SIZE_PX) for a, b in ((x0, x1), (y0, y1)))
        distance = (cells[:, None] - row) ** 2 + (cells[None] - column) ** 2
        index = world.CLASSES.index(name)
        target[index] = torch.maximum(target[index], torch.exp(-distance / 2))
    return target


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of centre heat maps (CenterNet, arXiv 1904.07850, equation 1), per object."""
    probability = logits.sigmoid()
    positive = target.eq(1)
    hit = (1 - probability) ** 2 * F.logsigmoid(logits)
    miss = (1 - target) ** 4 * probability**2 * F.logsigmoid(-logits)
    return -torch.where(positive, hit, miss).sum() / positive.sum().clamp(min=1)
