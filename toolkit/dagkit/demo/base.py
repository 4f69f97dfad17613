"""Trains the base model: text encoder and UNet together, on scenes drawn as they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Batch(NamedTuple):
    """What one step sees, on the CPU.

    Attributes:
        images: (B, 64, 64, 3) uint8.
        covered: (B, 64, 64) bool, where an object is.
        ids: (B, tokens) int64.
        timesteps: (B,) int64.
        noise: (B, 4, 16, 16) float32.
    """

    images: NDArray[np.uint8]
    covered: NDArray[np.bool_]
    ids: NDArray[np.int64]
    timesteps: NDArray[np.int64]
    noise: NDArray[np.float32]


@dataclass(frozen=True)
class SceneBatches:
    """Draws the batches of `DenoisingLoss`; may be called in other processes.

    Attributes:
        tokenizer: CLIPTokenizer.
        recipe: size and make-up of a batch.
        num_timesteps: of the noise schedule.
    """

    tokenizer: Any
    recipe: BaseRecipe
    num_timesteps: int = 1000

    def __call__(self, rng: np.random.Generator) -> Batch:
        """One batch; see `draw_timesteps`."""
        size = self.recipe.schedule.batch_size
        examples = [draw_example(rng, self.recipe) for _ in range(size)]
        cells = world.SIZE_PX // 4
        noise = rng.standard_normal((size, 4, cells, cells), np.float32)
        timesteps = draw_timesteps(rng, size, self.recipe.high_noise_share, self.num_timesteps)
        ids = np.array(self.tokenizer([text for _, text in examples], padding="max_length").input_ids)
        images = np.stack([scene.image for scene, _ in examples])
        return Batch(images, np.stack([scene.labels > 0 for scene, _ in examples]), ids, timesteps, noise)


class DenoisingLoss:
    """Weighted error of the predicted noise.

    Args:
        denoiser: what is trained.
        autoencoder: AutoencoderKL on the same device; its encoder is frozen.
        recipe: weights.
    """

    def __init__(self, denoiser: Denoiser, autoencoder: Any, recipe: BaseRecipe) -> None:
        self._denoiser, self._autoencoder, self._recipe = denoiser, autoencoder, recipe
        self._scheduler = build_scheduler()
        self._device = next(denoiser.parameters()).device
        self._alphas_bar: Tensor = self._scheduler.alphas_cumprod.to(self._device)

    def __call__(self, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        covered, ids, timesteps, noise = (torch.from_numpy(part).to(self._device) for part in batch[1:])
        latents = encode(self._autoencoder, batch.images)
        noisy = self._scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        predicted = self._denoiser.unet(noisy, timesteps, self._denoiser.text_encoder(ids)[0]).sample
        weights = self._weights(timesteps, F.avg_pool2d(covered.float()[:, None], world.SIZE_PX // latents.shape[-1]))
        error: Tensor = (weights * (predicted - noise) ** 2).mean()
        return error

    def _weights(self, timesteps: Tensor, covered: Tensor) -> Tensor:
        alphas_bar = self._alphas_bar[timesteps].view(-1, 1, 1, 1)
        snr = alphas_bar / (1 - alphas_bar)
        spatial = 1 + (self._recipe.object_weight - 1) * alphas_bar * covered
        return snr.clamp(max=self._recipe.min_snr_gamma) / snr * spatial / spatial.mean((2, 3), keepdim=True)
