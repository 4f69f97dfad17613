"""Trains the joint-attention model of the bundled world: flow matching on a bank of scenes whose latents are cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dagkit.demo import world
from dagkit.demo.base import draw_example
from dagkit.demo.degrade import encode
from dagkit.demo.measure import NUM_PADDING
from dagkit.demo.training import save_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dagkit.demo.recipe import BaseRecipe, JointRecipe, Schedule

_BATCH: Final = 64
_CELL_PX: Final = 4


class Bank(NamedTuple):
    """Scenes as they are trained on, on the CPU.

    Attributes:
        latents: (N, 4, 16, 16) float16, scaled.
        covered: (N, 16, 16) float16 in [0, 1], how much of a cell objects cover.
        classes: (N, 16, 16) uint8: 0 is background, k the object ``world.CLASSES[k - 1]`` that covers most of a cell.
        ids: (N, tokens) int16.
    """

    latents: Tensor
    covered: Tensor
    classes: Tensor
    ids: Tensor


def load_bank(path: Path, recipe: JointRecipe, scenes: BaseRecipe, autoencoder: Any, tokenizer: Any) -> Bank:
    """The bank in a file; drawn and written where there is none.

    Args:
        path: safetensors.
        recipe: number and seed of its scenes.
        scenes: what they hold, and their captions.
        autoencoder: AutoencoderKL.
        tokenizer: CLIPTokenizer.
    """
    if not path.exists():
        save_tensors(_draw_bank(recipe, scenes, autoencoder, tokenizer)._asdict(), path)
    with safe_open(path, framework="pt") as file:
        return Bank(*(file.get_tensor(name) for name in Bank._fields))


def _draw_bank(recipe: JointRecipe, scenes: BaseRecipe, autoencoder: Any, tokenizer: Any) -> Bank:
    parts = []
    for start in range(0, recipe.num_scenes, _BATCH):
        indices = range(start, min(start + _BATCH, recipe.num_scenes))
        examples = [draw_example(np.random.default_rng((recipe.bank_seed, i)), scenes) for i in indices]
        labels = np.stack([scene.labels for scene, _ in examples])
        parts.append(
            Bank(
                encode(autoencoder, np.stack([scene.image for scene, _ in examples])).half().cpu(),
                F.avg_pool2d(torch.from_numpy(labels > 0).float(), _CELL_PX).half(),
                _commonest(torch.from_numpy(labels)),
                torch.tensor(tokenizer([text for _, text in examples], padding="max_length").input_ids).short(),
            )
        )
    return Bank(*(torch.cat(part).contiguous() for part in zip(*parts, strict=True)))


def _commonest(labels: Tensor) -> Tensor:
    """(B, 64, 64) uint8 to (B, 16, 16): the label of most pixels of a cell."""
    shares = F.avg_pool2d(F.one_hot(labels.long()).permute(0, 3, 1, 2).float(), _CELL_PX)
    return shares.argmax(1).to(torch.uint8)


class JointDenoiser(nn.Module):
    """Text encoders, transformer and the head of the class loss under one name, as they are trained."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module, transformer: Any, class_layer: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.transformer = text_encoder, text_encoder_2, transformer
        self.head = nn.Linear(transformer.inner_dim, len(world.CLASSES) + 1)
        self._class_layer = class_layer

    def condition(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, tokens + `NUM_PADDING`, d) and (B, d): captions as Stable Diffusion 3 encodes them without T5."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        hidden = F.pad(torch.cat([output.hidden_states[-2] for output in outputs], -1), (0, 0, 0, NUM_PADDING))
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        return hidden, pooled

    def forward(self, noisy: Tensor, levels: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (B, K, 4) and logits (B, K, classes) of what covers a cell, at some cells that alone are looked at.

        Args:
            noisy: (B, 4, 16, 16).
            levels: (B,) noise levels in [0, 1].
            ids: (B, tokens) of the captions.
            kept: (B, K) int64 in [0, 256).
        """
        text, pooled = self.condition(ids)
        model = self.transformer
        image, text = at(model.pos_embed(noisy), kept), model.context_embedder(text)
        time = model.time_text_embed(1000 * levels, pooled)
        for number, block in enumerate(model.transformer_blocks):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            if number == self._class_layer:
                seen = self.head(image)
        velocity: Tensor = model.proj_out(model.norm_out(image, time))
        return velocity, seen


def at(cells: Tensor, kept: Tensor) -> Tensor:
    """(B, N, d) at (B, K) positions: (B, K, d)."""
    return cells.gather(1, kept[..., None].expand(-1, -1, cells.shape[-1]))


class VelocityLoss:
    """Weighted error of the velocity, and at first of what covers a cell.

    Args:
        denoiser: what is trained.
        bank: scenes.
        recipe: weights.
        step: tells how many steps are done.
    """

    def __init__(self, denoiser: JointDenoiser, bank: Bank, recipe: JointRecipe, step: Callable[[], int]) -> None:
        self._denoiser, self._bank, self._recipe, self._step = denoiser, bank, recipe, step
        self._device = next(denoiser.parameters()).device

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Scalar loss of a batch that is drawn here."""
        recipe, size = self._recipe, self._recipe.schedule.batch_size
        chosen = torch.from_numpy(rng.integers(len(self._bank.latents), size=size))
        latents, covered, classes, ids = (part[chosen].to(self._device) for part in self._bank)
        logits = recipe.noise_mean + recipe.noise_deviation * rng.standard_normal(size, np.float32)
        levels = torch.from_numpy(logits).to(self._device).sigmoid()
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32)).to(self._device)
        clean, level = latents.float(), levels.view(-1, 1, 1, 1)
        kept = self._draw_kept(rng, size).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            velocity, seen = self._denoiser((1 - level) * clean + level * noise, levels, ids.long(), kept)
        weights = at(1 + (recipe.object_weight - 1) * covered.float().flatten(1)[..., None] * (1 - level[:, 0]), kept)
        weights = weights / weights.mean(1, keepdim=True)
        target = at((noise - clean).flatten(2).transpose(1, 2), kept)
        error: Tensor = (weights * (velocity.float() - target) ** 2).mean()
        share = class_weight(self._step(), recipe.schedule, recipe.class_share) * recipe.class_weight
        if share == 0:
            return error
        told: Tensor = F.cross_entropy(seen.float().flatten(0, 1), classes.long().flatten(1).gather(1, kept).flatten())
        return error + share * told

    def _draw_kept(self, rng: np.random.Generator, size: int) -> Tensor:
        """(B, K) cells that are looked at, in the order of the grid: some at first, then all."""
        recipe, num_cells = self._recipe, (world.SIZE_PX // _CELL_PX) ** 2
        is_early = self._step() < recipe.kept_until * recipe.schedule.num_steps
        count = round(recipe.kept_share * num_cells) if is_early else num_cells
        return torch.from_numpy(np.sort(rng.random((size, num_cells)).argsort(1)[:, :count], 1))


def class_weight(step: int, schedule: Schedule, share: float) -> float:
    """Share of the class loss that is left at a step: 1 at first, 0 after the first ``share`` of the steps."""
    return max(0.0, 1 - step / (share * schedule.num_steps))
