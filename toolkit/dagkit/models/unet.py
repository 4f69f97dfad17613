"""What SD 1.x/2.x and SDXL share: U-Net layers, latents and fingerprints."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dagkit.errors import ModelError
from dagkit.models.base import PLAIN, Condition, Encoding, pixels
from dagkit.models.sketch import sketch

MIN_SIDE, MAX_SIDE = 16, 32
"""Layers whose grid at the model's own size has sides in this range carry most of the semantics (DAG)."""


class UNetFamily(ABC):
    """Base of families whose denoiser is diffusers' ``UNet2DConditionModel``."""

    name: ClassVar[str]
    pipelines: ClassVar[frozenset[str]]
    """Pipeline classes whose batch is ``[unconditional; conditional]``."""

    def matches(self, pipe: Any) -> bool:
        """Whether the class, or one that it derives from, is one of ``pipelines``, and the denoiser a U-Net."""
        return any(cls.__name__ in self.pipelines for cls in type(pipe).__mro__) and hasattr(
            self.denoiser(pipe), "up_blocks"
        )

    def denoiser(self, pipe: Any) -> Any:
        """The U-Net."""
        return pipe.unet

    def cross_attention(self, pipe: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Layers of 16 to 32 cells a side at the model's own size, the finest where none is; or exactly ``names``."""
        unet = self.denoiser(pipe)
        layers = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
        layers = {name.removeprefix("_orig_mod."): module for name, module in layers.items()}
        if names is not None:
            missing = [name for name in names if name not in layers]
            if missing:
                raise ModelError(
                    f"the denoiser has no cross-attention layer {missing[0]} ({len(missing)} of {len(names)} are "
                    f"missing); it has {len(layers)}, e.g. {next(iter(layers), 'none')}. The token was made for "
                    "another architecture."
                )
            return {name: layers[name] for name in names}
        if not layers:
            raise ModelError(
                "the denoiser has no cross-attention layer (attn2), so there is nothing to read a concept from."
            )
        size = unet.config.sample_size
        side = min(size) if isinstance(size, (list, tuple)) else int(size)
        levels = {name: _level(name, len(unet.up_blocks)) for name in layers}
        chosen = [name for name in layers if MIN_SIDE <= side / 2 ** levels[name] <= MAX_SIDE]
        chosen = chosen or [name for name in layers if levels[name] == min(levels.values())]
        return {name: layers[name] for name in chosen}

    def num_positions(self, pipe: Any, names: Iterable[str], latent_size: tuple[int, int]) -> dict[str, int]:
        """Cells of each layer's level; a level halves both sides of the latent, rounding up."""
        count = len(self.denoiser(pipe).up_blocks)
        return {name: math.prod(math.ceil(side / 2 ** _level(name, count)) for side in latent_size) for name in names}

    def latents(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        """(B, 4, h, w): mode of the VAE's posterior times its scaling factor, in the VAE's dtype.

        A VAE with ``force_upcast`` (SDXL's overflows in float16) encodes in float32, as in diffusers' img2img.

        Raises:
            ModelError: a latent is not finite.
        """
        vae = pipe.vae
        dtype = vae.dtype
        is_upcast = bool(getattr(vae.config, "force_upcast", False)) and dtype != torch.float32
        image = pixels(images)
        try:
            if is_upcast:
                vae.to(torch.float32)
            latents: Tensor = vae.encode(image.to(vae.device, vae.dtype)).latent_dist.mode()
        finally:
            if is_upcast:
                vae.to(dtype)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled: Tensor = ((latents - shift) * vae.config.scaling_factor).to(dtype)
        if not bool(torch.isfinite(scaled).all()):
            raise ModelError(
                f"the VAE gives latents that are not finite in {str(dtype).removeprefix('torch.')}. Load the model in "
                "float32, or with a VAE that is made for half precision (SDXL: sdxl-vae-fp16-fix)."
            )
        return scaled

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One plain forward pass of the U-Net."""
        unet = self.denoiser(pipe)
        channels = unet.config.in_channels
        if latents.shape[1] != channels:
            raise ModelError(
                f"the denoiser takes {channels} channels, but latents have {latents.shape[1]}; optimise on the "
                "text-to-image model of this family."
            )
        prediction: Tensor = unet(
            latents.to(unet.dtype),
            timesteps.to(latents.device),
            encoder_hidden_states=condition.hidden_states,
            added_cond_kwargs=self.added_conditions(pipe, latents, condition),
            return_dict=False,
        )[0]
        return prediction

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """``added_cond_kwargs`` of a plain forward pass; None where the architecture has none."""
        return None

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

    @abstractmethod
    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """What the denoiser gets for each prompt."""

    def neutral_conditions(self, pipe: Any, how: Encoding = PLAIN) -> list[Condition]:
        """That of the empty prompt."""
        return [self.encode_prompt(pipe, [""], how)]

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """The text encoders whose outputs make ``encoder_hidden_states``."""
        return [pipe.text_encoder]

    def fingerprints(self, pipe: Any, layers: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Sketches of the text encoders' and the layers' ``to_k`` weights, without a LoRA that is loaded on them."""
        layers = layers or self.cross_attention(pipe)
        encoders = [
            p for encoder in self.text_encoders(pipe) for n, p in sorted(encoder.named_parameters()) if "lora_" not in n
        ]
        keys = [getattr(layer.to_k, "base_layer", layer.to_k).weight for layer in layers.values()]
        if any(tensor.is_meta for tensor in [*encoders, *keys]):
            raise ModelError(
                "some weights are on the meta device (sequential offload). Attach the guard first, then enable "
                "offloading."
            )
        return {"text_encoder": sketch(encoders), "key_projections": sketch(keys)}


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


def encode_with(pipe: Any, prompts: list[str], how: Encoding) -> tuple[Tensor, ...]:
    """Calls the pipeline's own ``encode_prompt`` for prompts without guidance."""
    options = {name: value for name, value in how._asdict().items() if value is not None}
    result: tuple[Tensor, ...] = pipe.encode_prompt(
        prompts, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False, **options
    )
    return result
