"""Makes rendered scenes resemble generated ones, for the training of the judge and of the small SAM."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def encode(autoencoder: Any, images: np.ndarray[Any, Any]) -> Tensor:
    """(B, 64, 64, 3) uint8 to scaled latents (B, 4, 16, 16) float32, the mode of the encoder's distribution."""
    pixels = to_pixels(images).to(autoencoder.device)
    latents: Tensor = autoencoder.encode(pixels).latent_dist.mode() * autoencoder.config.scaling_factor
    return latents


def to_pixels(images: np.ndarray[Any, Any]) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def reconstruct(
    images: np.ndarray[Any, Any], autoencoder: Any, rng: np.random.Generator, share: float, noise: float
) -> Tensor:
    """Pixels of a batch, whose first images have been through the autoencoder with noise on their latents.

    Args:
        images: (B, 64, 64, 3) uint8.
        autoencoder: AutoencoderKL.
        rng: source of the noise.
        share: of the images that are reconstructed, in [0, 1].
        noise: largest standard deviation of the noise; the scaled latents have 1.

    Returns:
        (B, 3, 64, 64) float32 in [-1, 1].
    """
    pixels = to_pixels(images)
    count = int(len(images) * share)
    if count:
        latents = encode(autoencoder, images[:count])
        scale = torch.from_numpy(rng.uniform(0, noise, (count, 1, 1, 1))).float()
        latents = latents + scale * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        pixels[:count] = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample.clamp(-1, 1)
    return pixels


def degrade(image: Tensor, rng: np.random.Generator, cover_probability: float = 0.3) -> Tensor:
    """At random: a covered patch, blur, noise. (3, H, W) in [-1, 1] to the same."""
    height, width = image.shape[1:]
    if rng.random() < cover_probability:
        side = int(rng.integers(4, 11))
        y, x = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
        image = image.clone()
        window = image[:, y : y + side, x : x + side]
        window.copy_(window.mean((1, 2), keepdim=True).expand_as(window))
    if rng.random() < 0.3:
        image = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    if rng.random() < 0.5:
        image = image + float(rng.uniform(0, 0.3)) * torch.from_numpy(rng.standard_normal(image.shape, np.float32))
    return image.clamp(-1, 1)
