"""Trains the base model: text encoder and UNet together, on scenes drawn as they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagkit.demo import world
from dagkit.demo.degrade import encode
from dagkit.demo.networks import build_scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dagkit.demo.recipe import BaseRecipe


class Denoiser(nn.Module):
    """Text encoder and UNet under one name, as they are trained."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def draw_example(rng: np.random.Generator, recipe: BaseRecipe) -> tuple[world.Scene, str]:
    """A scene and its caption, which is empty with probability ``caption_dropout``."""
    if rng.random() < recipe.caption_dropout:
        if rng.random() < recipe.repeat_share:
            return world.render_scene(rng, world.draw_repeats(rng)), ""
        return world.render_scene(rng, _draw_classes(rng, recipe)), ""
    scene = world.render_scene(rng, _draw_classes(rng, recipe))
    modes: Sequence[world.CaptionMode] = ("named", "class", "hinted")
    mode = modes[int(rng.choice(3, p=recipe.caption_weights))]
    return scene, world.caption(scene.classes, scene.background, rng, mode)


def _draw_classes(rng: np.random.Generator, recipe: BaseRecipe) -> tuple[str, ...]:
    count = 1 + int(rng.choice(3, p=recipe.num_objects_weights))
    names = world.draw_classes(rng, count, recipe.weapon_probability)
    if any(name in world.WEAPONS or name in world.LOOK_ALIKES for name in names):
        return names
    if rng.random() < recipe.look_alike_probability:
        return (*names[:-1], world.LOOK_ALIKES[int(rng.integers(len(world.LOOK_ALIKES)))])
    return names


def draw_timesteps(
    rng: np.random.Generator, size: int, high_noise_share: float, num_timesteps: int
) -> NDArray[np.int64]:
    """(size,) int64 in [0, num_timesteps): part uniform, part from the last 40 %, each stratified, in random order."""
    num_high = round(size * high_noise_share)
    low = (np.arange(size - num_high) + rng.random(size - num_high)) / max(size - num_high, 1)
    high = 0.6 + 0.4 * (np.arange(num_high) + rng.random(num_high)) / max(num_high, 1)
    return rng.permutation((np.concatenate([low, high]) * num_timesteps).astype(np.int64))


class DenoisingLoss:
    """Weighted error of the predicted noise on freshly drawn scenes.

    Args:
        denoiser: what is trained.
        autoencoder: AutoencoderKL; its encoder is frozen.
        tokenizer: CLIPTokenizer.
        recipe: weights and data.
    """

    def __init__(self, denoiser: Denoiser, autoencoder: Any, tokenizer: Any, recipe: BaseRecipe) -> None:
        self._denoiser, self._autoencoder, self._tokenizer, self._recipe = denoiser, autoencoder, tokenizer, recipe
        self._scheduler = build_scheduler()
        self._alphas_bar: Tensor = self._scheduler.alphas_cumprod

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Scalar loss of one batch; see `draw_timesteps`."""
        recipe, size = self._recipe, self._recipe.schedule.batch_size
        examples = [draw_example(rng, recipe) for _ in range(size)]
        latents = encode(self._autoencoder, np.stack([scene.image for scene, _ in examples]))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        timesteps = torch.from_numpy(draw_timesteps(rng, size, recipe.high_noise_share, len(self._alphas_bar)))
        noisy = self._scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        ids = torch.tensor(self._tokenizer([text for _, text in examples], padding="max_length").input_ids)
        predicted = self._denoiser.unet(noisy, timesteps, self._denoiser.text_encoder(ids)[0]).sample
        covered = torch.from_numpy(np.stack([scene.labels > 0 for scene, _ in examples])).float()[:, None]
        weights = self._weights(timesteps, F.avg_pool2d(covered, world.SIZE_PX // latents.shape[-1]))
        error: Tensor = (weights * (predicted - noise) ** 2).mean()
        return error

    def _weights(self, timesteps: Tensor, covered: Tensor) -> Tensor:
        alphas_bar = self._alphas_bar[timesteps].view(-1, 1, 1, 1)
        snr = alphas_bar / (1 - alphas_bar)
        spatial = 1 + (self._recipe.object_weight - 1) * alphas_bar * covered
        return snr.clamp(max=self._recipe.min_snr_gamma) / snr * spatial / spatial.mean((2, 3), keepdim=True)
