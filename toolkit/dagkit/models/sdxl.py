"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dagkit.models.base import PLAIN, Encoding
from dagkit.models.calls import Condition
from dagkit.models.unet import UNetFamily, encode_with


class SDXL(UNetFamily):
    """Two CLIP text encoders, a pooled embedding and size conditions beside the hidden states."""

    name = "sdxl"
    pipelines = frozenset(
        {
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
        }
    )

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """(B, L, d) penultimate hidden states of both encoders side by side; ``text_embeds`` (B, p) pooled."""
        hidden, _, pooled, _ = encode_with(pipe, prompts, how)
        return Condition(hidden, {"text_embeds": pooled})

    def neutral_conditions(self, pipe: Any, how: Encoding = PLAIN) -> list[Condition]:
        """Zeros, which SDXL takes where no negative prompt is given, and the empty prompt."""
        empty = self.encode_prompt(pipe, [""], how)
        if not getattr(pipe.config, "force_zeros_for_empty_prompt", False):
            return [empty]
        zeros = {name: torch.zeros_like(value) for name, value in empty.added.items()}
        return [Condition(torch.zeros_like(empty.hidden_states), zeros), empty]

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """Both encoders, or the second alone in a refiner."""
        return [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Pooled embedding and ``time_ids`` of an uncropped image of the latent's own size."""
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=latents.dtype, device=latents.device)
        return {"text_embeds": condition.added["text_embeds"], "time_ids": ids.expand(len(latents), -1)}
