"""The family protocol and the loaded base model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dagkit import plugins
from dagkit.attention import QueryTap
from dagkit.errors import ModelError


@dataclass(frozen=True)
class Condition:
    """What a denoiser is conditioned on.

    Attributes:
        hidden_states: (B, L, d) text-encoder output, the denoiser's ``encoder_hidden_states``.
        added: further conditions by name, e.g. SDXL's ``text_embeds`` (B, p); empty for SD 1.x/2.x.
    """

    hidden_states: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, index: Any) -> Condition:
        return Condition(self.hidden_states[index], {name: value[index] for name, value in self.added.items()})


class Encoding(NamedTuple):
    """How a pipeline encodes the prompts of one run; None where it leaves it to the text encoder.

    Attributes:
        clip_skip: last layers of the text encoder that are left out.
        lora_scale: factor of all LoRA layers of the text encoder.
    """

    clip_skip: int | None = None
    lora_scale: float | None = None


PLAIN: Final = Encoding()


class Family(Protocol):
    """What differs between base models. One file each; registered in ``dagkit.plugins`` as kind ``families``."""

    name: str

    def matches(self, pipe: Any) -> bool:
        """Whether this family knows the pipeline's denoiser, text encoder and batch layout."""

    def denoiser(self, pipe: Any) -> Any:
        """The module that predicts noise."""

    def cross_attention(self, pipe: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Name -> attention module: the family's own choice, or exactly ``names`` (ModelError if one is missing)."""

    def num_positions(self, pipe: Any, names: Iterable[str], latent_size: tuple[int, int]) -> dict[str, int]:
        """Name -> image positions of a cross-attention layer, for latents of a size (h, w)."""

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """Text-encoder output of each prompt, without classifier-free guidance."""

    def neutral_conditions(self, pipe: Any, how: Encoding = PLAIN) -> list[Condition]:
        """Conditions of one row each that ask for nothing in particular; the model's own unconditional one first."""

    def latents(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, h, w) latents of RGB images of one size, scaled as the denoiser expects them."""

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One forward pass of the denoiser without guidance: (B, C, h, w)."""

    def before_condition(self, pipe: Any) -> Sequence[nn.Module]:
        """Modules of the denoiser whose output depends on latents and timestep alone; empty where nobody can be sure.

        Each is called once in a forward pass and returns one tensor, rows first. Guards run them once for a denoiser
        call and its safety forwards.
        """

    def fingerprints(self, pipe: Any, layers: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Sketches of ``text_encoder`` and ``key_projections``; compare them with ``sketch.difference``."""


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model, ready for capture and sampling.

    Attributes:
        pipe: the diffusers pipeline in evaluation mode, gradients and progress bar off.
        family: what knows its parts.
        source: folder or Hub id that it was loaded from.
        fingerprint: ``sha256:...`` over the safetensors files of denoiser and text encoders.
    """

    pipe: Any
    family: Family
    source: str
    fingerprint: str

    @property
    def layers(self) -> dict[str, Any]:
        """Name -> cross-attention module, the family's own choice."""
        return self.family.cross_attention(self.pipe)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = next(self.family.denoiser(self.pipe).parameters()).device
        return device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text-encoder output of each prompt."""
        return self.family.encode_prompt(self.pipe, list(prompts))

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, C, h, w) latents of RGB images of one size."""
        return self.family.latents(self.pipe, images)

    @torch.no_grad()
    def noise(self, latents: Tensor, timesteps: Tensor, seed: int) -> Tensor:
        """Noised latents ``sqrt(a_t) z + sqrt(1 - a_t) e``; the noise depends on ``seed`` only, not on the device.

        Args:
            latents: (B, C, h, w).
            timesteps: (B,) int64 in [0, 1000).
            seed: of the noise.
        """
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        alpha: Tensor = self.pipe.scheduler.alphas_cumprod.to(latents)[timesteps.to(latents.device)][
            :, None, None, None
        ]
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    @torch.no_grad()
    def queries(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        *,
        seed: int,
        layers: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Noises latents, runs the denoiser once, and returns the queries of the layers.

        Args:
            latents: (B, C, h, w).
            timesteps: (B,) int64.
            condition: of B prompts.
            seed: of the noise.
            layers: name -> attention module; the family's own choice where not given.

        Returns:
            Name -> (B, positions, heads*d_head), in the denoiser's dtype.
        """
        layers = layers or self.layers
        size = (latents.shape[-2], latents.shape[-1])
        with QueryTap(layers) as tap:
            tap.start()
            self.family.predict(self.pipe, self.noise(latents, timesteps, seed), timesteps, condition)
            return tap.stop(len(latents), self.family.num_positions(self.pipe, layers, size))


def match(pipe: Any) -> Family:
    """Finds the family of a pipeline.

    Raises:
        ModelError: no registered family knows it.
    """
    for name in plugins.names("families"):
        family: Family = plugins.load("families", name)()
        if family.matches(pipe):
            return family
    denoiser = type(getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)).__name__
    raise ModelError(
        f"no family knows {type(pipe).__name__} with denoiser {denoiser}. Available families: "
        f"{', '.join(plugins.names('families'))}. Add one as described in dagkit/models."
    )


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1] from RGB images of one size."""
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ModelError(f"images of one batch must have one size, but got {sorted(sizes)}.")
    stack = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1
