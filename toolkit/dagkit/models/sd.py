"""Stable Diffusion 1.x and 2.x, and everything of their shape."""

from __future__ import annotations

from typing import Any

from dagkit.models.base import PLAIN, Encoding
from dagkit.models.calls import Condition
from dagkit.models.unet import UNetFamily, encode_with


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

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """(B, L, d) hidden state after the final layer norm, of the last layer but for ``clip_skip``."""
        return Condition(encode_with(pipe, prompts, how)[0])
