"""A model family in one file: a ten-line denoiser with a layer that nothing else has, and a pipeline for it.

Its layer lets text rows compete by their distance from an image position. It is registered as a plugin, and everything
that dagkit does with a model must work with it, whatever the pipeline's way of calling its denoiser.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from dagkit import models
from dagkit.errors import ModelError
from dagkit.models.base import PLAIN, pixels
from dagkit.models.calls import Arguments, Batched, Condition, Paired, Single
from dagkit.models.sites import Site, Sites

SIDE = 16
WIDTH = 8
NAMES = Arguments(sample="picture", timestep="time", condition="words", mask=None, added=None)


class Denoiser(nn.Module):
    """Each position takes from the rows that are near to it; predicts the noise of a picture of small values."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read, self.tell = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.config, self.dtype = SimpleNamespace(), torch.float32

    def forward(self, picture: Tensor, time: Tensor, words: Tensor, return_dict: bool = True) -> Any:
        seen = self.look(picture.flatten(2).transpose(1, 2))
        near = (-torch.cdist(seen, self.read(words)).square()).softmax(-1)
        noise = picture + 0.5 * (near @ self.tell(words)).transpose(1, 2).unflatten(2, picture.shape[-2:])
        return SimpleOutput(sample=noise) if return_dict else (noise,)


class SimpleOutput(SimpleNamespace):
    sample: Tensor


class Nearness(Site):
    """The layer of `Denoiser`."""

    name = "look"
    num_heads, width = 1, WIDTH

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    @property
    def tapped(self) -> nn.Module:
        return self.denoiser.look

    @property
    def projection(self) -> nn.Module:
        return self.denoiser.read

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        return latent_size

    def project(self, rows: Tensor, lora_scale: float = 1.0) -> Tensor:
        return self.denoiser.read(rows)[None]

    def shares(self, features: Tensor, keys: Tensor) -> Tensor:
        return (-torch.cdist(features.float(), keys[0].float()).square()).softmax(-1)[:, None]


class Toy(models.Family):
    """What dagkit must know of it."""

    name = "toy"

    def matches(self, pipe: Any) -> bool:
        return isinstance(pipe, Pipeline)

    def sites(self, pipe: Any, names: Any = None) -> Sites:
        if list(names or ["look"]) != ["look"]:
            raise ModelError(f"expected the layer look, but got {names}.")
        return Sites([Nearness(pipe.transformer)])

    def calls(self, pipe: Any) -> Any:
        return {
            "batched": Batched(NAMES),
            "conditional first": Paired("conditional", NAMES),
            "unconditional first": Paired("unconditional", NAMES),
            "no guidance": Single(NAMES),
        }[pipe.layout]

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Any = PLAIN) -> Condition:
        return Condition(pipe.encode(prompts))

    def phrase_rows(self, pipe: Any, phrase: str, how: Any = PLAIN, seen: Any = None) -> Tensor:
        return pipe.encode([phrase])[0, 1 : 1 + len(phrase.split())]

    def latents(self, pipe: Any, images: Any) -> Tensor:
        small = F.adaptive_avg_pool2d(pixels(images), SIDE)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


class Pipeline:
    """Text to image, in any of four layouts."""

    def __init__(self, layout: str = "batched") -> None:
        torch.manual_seed(1)
        self.layout, self.transformer = layout, Denoiser().requires_grad_(False)
        self.text_encoder = nn.Embedding(64, WIDTH).requires_grad_(False)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        )
        self.config: dict[str, Any] = {}
        self.guidance_scale = 5.0
        self.do_classifier_free_guidance = layout != "no guidance"
        self.components = {"transformer": self.transformer, "text_encoder": self.text_encoder}

    def encode(self, prompts: list[str]) -> Tensor:
        words = [["<start>", *prompt.split(), *[""] * 6][:6] for prompt in prompts]
        return self.text_encoder(torch.tensor([[sum(map(ord, word)) % 64 for word in one] for one in words]))

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt: list[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        generator: list[torch.Generator],
        **_: Any,
    ) -> Any:
        self.guidance_scale = guidance_scale
        words = self.encode(prompt) if prompt_embeds is None else prompt_embeds
        nothing = negative_prompt_embeds
        if nothing is None:
            nothing = self.encode(negative_prompt or [""] * len(words))
        picture = torch.cat([torch.randn((1, 4, SIDE, SIDE), generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            noise = self._noise(picture, time, words, nothing)
            picture = self.scheduler.step(noise, time, picture).prev_sample
        shown = ((picture[:, :3].clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        return SimpleNamespace(images=[Image.fromarray(one).resize((64, 64)) for one in shown], latents=picture)

    def _noise(self, picture: Tensor, time: Tensor, words: Tensor, nothing: Tensor) -> Tensor:
        scale = self.guidance_scale
        if self.layout == "batched":
            eps_u, eps_p = self.transformer(picture.repeat(2, 1, 1, 1), time, torch.cat([nothing, words])).sample.chunk(
                2
            )
        elif self.layout == "conditional first":
            eps_p = self.transformer(picture, time, words=words).sample
            eps_u = self.transformer(picture, time, words=nothing).sample
        elif self.layout == "unconditional first":
            eps_u = self.transformer(picture, time, words=nothing, return_dict=False)[0]
            eps_p = self.transformer(picture, time, words=words, return_dict=False)[0]
        else:
            return self.transformer(picture, time, words).sample
        return eps_u + scale * (eps_p - eps_u)
