"""Trains the autoencoder on rendered scenes; afterwards its decoder alone, so that the latents stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dagkit.demo import world
from dagkit.demo.degrade import encode, to_pixels

if TYPE_CHECKING:
    from dagkit.demo.recipe import AutoencoderRecipe


class AutoencoderLoss:
    """Absolute error of pixels and of their differences, objects weighted, and a small KL term.

    Args:
        autoencoder: AutoencoderKL in training.
        recipe: weights and data.
        is_decoder_only: train on noisy modes of the encoder's distribution instead of its samples, without the KL term.
    """

    def __init__(self, autoencoder: Any, recipe: AutoencoderRecipe, is_decoder_only: bool = False) -> None:
        self._autoencoder, self._recipe, self._is_decoder_only = autoencoder, recipe, is_decoder_only
        self._batch_size = (recipe.decoder_schedule if is_decoder_only else recipe.schedule).batch_size

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Scalar loss of one batch."""
        recipe = self._recipe
        scenes = [world.render_scene(rng) for _ in range(self._batch_size)]
        pixels = to_pixels(np.stack([scene.image for scene in scenes]))
        is_object = torch.from_numpy(np.stack([scene.labels > 0 for scene in scenes]))[:, None]
        weights = 1 + (recipe.object_weight - 1) * is_object
        kl: Tensor | float = 0.0
        if self._is_decoder_only:
            latents = encode(self._autoencoder, np.stack([scene.image for scene in scenes]))
            noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
            latents = (latents + recipe.decoder_latent_noise * noise) / self._autoencoder.config.scaling_factor
        else:
            distribution = self._autoencoder.encode(pixels).latent_dist
            noise = torch.from_numpy(rng.standard_normal(distribution.mean.shape, np.float32))
            latents = distribution.mean + distribution.std * noise
            kl = distribution.kl().mean() / latents[0].numel()
        error = self._autoencoder.decode(latents).sample - pixels
        across = (weights[..., 1:] * error.diff(dim=-1).abs()).mean()
        down = (weights[..., 1:, :] * error.diff(dim=-2).abs()).mean()
        loss: Tensor = (weights * error.abs()).mean() + recipe.gradient_loss_weight * (across + down)
        return loss + recipe.kl_weight * kl


def scaling_factor(autoencoder: Any, num_scenes: int = 512, seed: int = 0) -> float:
    """The inverse of the latents' standard deviation, as Stable Diffusion scales them."""
    rng = np.random.default_rng(seed)
    images = np.stack([world.render_scene(rng).image for _ in range(num_scenes)])
    latents = encode(autoencoder, images) / autoencoder.config.scaling_factor
    return 1 / float(latents.std())


def psnr_db(autoencoder: Any, num_scenes: int = 128, seed: int = 1) -> float:
    """Peak signal-to-noise ratio of reconstructions of fresh scenes, in dB."""
    rng = np.random.default_rng(seed)
    images = np.stack([world.render_scene(rng).image for _ in range(num_scenes)])
    with torch.no_grad():
        latents = encode(autoencoder, images) / autoencoder.config.scaling_factor
        error = (autoencoder.decode(latents).sample.clamp(-1, 1) - to_pixels(images)) / 2
    return float(-10 * error.square().mean().log10())
