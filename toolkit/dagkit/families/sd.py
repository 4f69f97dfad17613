"""Stable Diffusion 1.x and 2.x, and everything of their shape."""

from __future__ import annotations

from typing import Any

from dagkit.families.base import Condition
from dagkit.families.unet import UNetFamily, encode_with


class SD(UNetFamily):
    """One CLIP text encoder, U-Net at an eighth of the image's size."""

    name = "sd"
    pipelines = frozenset(
        {
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionAdapterPipeline",
        }
    )

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> Condition:
        """(B, L, d) last hidden state after the final layer norm."""
        return Condition(encode_with(pipe, prompts)[0])
