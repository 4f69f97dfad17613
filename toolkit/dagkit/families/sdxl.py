"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dagkit.families.base import Condition
from dagkit.families.unet import UNetFamily, encode_with


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

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> Condition:
        """(B, L, d) penultimate hidden states of both encoders side by side; ``text_embeds`` (B, p) pooled."""
        hidden, _, pooled, _ = encode_with(pipe, prompts)
        return Condition(hidden, {"text_embeds": pooled})

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """Both encoders, or the second alone in a refiner."""
        return [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Pooled embedding and ``time_ids`` of an uncropped image of the latent's own size."""
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=latents.dtype, device=latents.device)
        return {"text_embeds": condition.added["text_embeds"], "time_ids": ids.expand(len(latents), -1)}
