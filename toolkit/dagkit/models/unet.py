"""What SD 1.x/2.x and SDXL share: their U-Net."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from dagkit.errors import ModelError
from dagkit.models.base import Encoding, Family
from dagkit.models.calls import Condition
from dagkit.models.cross_attention import CrossAttention, layers_of
from dagkit.models.sites import Sites

MIN_SIDE, MAX_SIDE = 16, 32
"""Layers whose grid at the model's own size has sides in this range carry most of the semantics (DAG)."""


class UNetFamily(Family):
    """Base of families whose denoiser is diffusers' ``UNet2DConditionModel``."""

    pipelines: ClassVar[frozenset[str]]
    """Pipeline classes whose batch is ``[unconditional; conditional]``."""

    def matches(self, pipe: Any) -> bool:
        """Whether the class, or one that it derives from, is one of ``pipelines``, and the denoiser a U-Net."""
        return any(cls.__name__ in self.pipelines for cls in type(pipe).__mro__) and hasattr(
            self.denoiser(pipe), "up_blocks"
        )

    def sites(self, pipe: Any, names: Sequence[str] | None = None) -> Sites:
        """Layers of 16 to 32 cells a side at the model's own size, the finest where none is; or exactly ``names``."""
        unet = self.denoiser(pipe)
        layers = layers_of(unet, names)
        if names is not None:
            return self._sites(unet, layers, names)
        size = unet.config.sample_size
        side = min(size) if isinstance(size, (list, tuple)) else int(size)
        levels = {name: _level(name, len(unet.up_blocks)) for name in layers}
        chosen = [name for name in layers if MIN_SIDE <= side / 2 ** levels[name] <= MAX_SIDE]
        chosen = chosen or [name for name in layers if levels[name] == min(levels.values())]
        return self._sites(unet, layers, chosen)

    def _sites(self, unet: Any, layers: Mapping[str, Any], names: Sequence[str]) -> Sites:
        levels = {name: _level(name, len(unet.up_blocks)) for name in names}
        return Sites(CrossAttention(name, layers[name], partial(_halved, levels[name])) for name in names)

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One plain forward pass of the U-Net."""
        channels = self.denoiser(pipe).config.in_channels
        if latents.shape[1] != channels:
            raise ModelError(
                f"the denoiser takes {channels} channels, but latents have {latents.shape[1]}; optimise on the "
                "text-to-image model of this family."
            )
        return super().predict(pipe, latents, timesteps, condition)

    def side_multiple(self, pipe: Any) -> int:
        """What every level of autoencoder and U-Net can halve exactly."""
        return super().side_multiple(pipe) * int(2 ** (len(self.denoiser(pipe).config.block_out_channels) - 1))

    def before_condition(self, pipe: Any) -> list[nn.Module]:
        """The first ResNet block and self-attention of a U-Net whose first block attends to the text.

        Empty where the condition also enters by the time embedding (SDXL), and where a module on the way is compiled,
        hooked, patched or not diffusers' own: what such code does with its input, nobody knows.
        """
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel
        from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        unet = self.denoiser(pipe)
        if type(unet) is not UNet2DConditionModel or unet.config.addition_embed_type is not None:
            return []
        down = unet.down_blocks[0]
        if type(down) is not CrossAttnDownBlock2D or type(down.attentions[0]) is not Transformer2DModel:
            return []
        resnet, block = down.resnets[0], down.attentions[0].transformer_blocks[0]
        if type(resnet) is not ResnetBlock2D or type(block) is not BasicTransformerBlock or block.only_cross_attention:
            return []
        if type(block.attn1) is not Attention:
            return []
        way = (unet.conv_in, down, resnet, down.attentions[0], block, block.attn1)
        return [] if any(map(_is_altered, way)) else [resnet, block.attn1]


def _is_altered(module: nn.Module) -> bool:
    """Whether a call does anything but the class's own ``forward``."""
    return bool(
        module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
    )


def _level(name: str, num_levels: int) -> int:
    """How often the latent was halved before a layer: from its name in a ``UNet2DConditionModel``."""
    if name.startswith("mid_block"):
        return num_levels - 1
    side, index = re.match(r"(down|up)_blocks\.(\d+)\.", name).groups()  # type: ignore[union-attr]
    return int(index) if side == "down" else num_levels - 1 - int(index)


def _halved(times: int, size: tuple[int, int]) -> tuple[int, int]:
    """The sides of a level: a level halves both, rounding up."""
    height, width = (math.ceil(side / 2**times) for side in size)
    return height, width


def encode_with(pipe: Any, prompts: list[str], how: Encoding) -> tuple[Tensor, ...]:
    """Calls the pipeline's own ``encode_prompt`` for prompts without guidance."""
    result: tuple[Tensor, ...] = pipe.encode_prompt(
        prompts,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **how.options,
    )
    return result
