"""Builds the untrained networks of the bundled base models, their tokenizer and scheduler."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dagkit.demo import world
from dagkit.demo.vocabulary import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from dagkit.demo.recipe import AutoencoderRecipe, BaseRecipe, JointRecipe

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz,"


def build_tokenizer(max_tokens: int = 16) -> Any:
    """A CLIPTokenizer in which every word of the world is one token, and other words fall into letters or parts."""
    merges = learn_merges(VOCABULARY)
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    tokens += [token for token in map("".join, merges) if token not in tokens]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs: Any = merges
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=max_tokens)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one token: the commonest pair first, ties in alphabetical order."""
    spelled = {(*word[:-1], f"{word[-1]}</w>") for word in words}
    merges = []
    while pairs := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {_merge(symbols, best) for symbols in spelled}
    return merges


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def build_text_encoder(recipe: BaseRecipe, vocabulary_size: int) -> Any:
    """CLIPTextModel with random weights."""
    return CLIPTextModel(
        _text_config(recipe.text_width, recipe.num_text_layers, recipe.num_heads, recipe.max_tokens, vocabulary_size)
    )


def _text_config(width: int, num_layers: int, num_heads: int, max_tokens: int, vocabulary_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=width,
    )


def build_unet(recipe: BaseRecipe) -> Any:
    """UNet2DConditionModel with random weights and cross-attention in every block."""
    num_blocks = len(recipe.channels)
    return UNet2DConditionModel(
        sample_size=world.SIZE_PX // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.num_heads,  # diffusers reads it as the number of heads
        norm_num_groups=recipe.norm_num_groups,
        down_block_types=("CrossAttnDownBlock2D",) * num_blocks,
        up_block_types=("CrossAttnUpBlock2D",) * num_blocks,
    )


def build_denoiser(recipe: BaseRecipe) -> tuple[Any, Any, Any]:
    """Text encoder, tokenizer and UNet with random weights."""
    tokenizer = build_tokenizer(recipe.max_tokens)
    return build_text_encoder(recipe, len(tokenizer)), tokenizer, build_unet(recipe)


def load_denoiser(folder: Path) -> tuple[Any, Any, Any]:
    """Text encoder, tokenizer and UNet of a model that exists, in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    return pipeline.text_encoder, pipeline.tokenizer, pipeline.unet


def build_joint(recipe: JointRecipe, vocabulary_size: int, known: Any = None) -> tuple[Any, Any, Any]:
    """Two CLIPTextModelWithProjection and an SD3Transformer2DModel with random weights.

    Args:
        recipe: sizes.
        vocabulary_size: of the tokenizer.
        known: CLIPTextModel of the same width and one layer less, whose weights the first text encoder starts from.
    """
    encoders = [
        CLIPTextModelWithProjection(_text_config(width, recipe.num_text_layers, 4, recipe.max_tokens, vocabulary_size))
        for width in (recipe.text_width, recipe.second_width)
    ]
    if known is not None:
        lacking, surplus = encoders[0].load_state_dict(_as_projecting(known, encoders[0]), strict=False)
        last = f"layers.{recipe.num_text_layers - 1}."
        unexpected = [key for key in lacking if last not in key and "text_projection" not in key] + surplus
        if unexpected:
            raise ValueError(
                f"the text encoder to start from does not fit: {unexpected[0]} and {len(unexpected)} more."
            )
    joint_width = recipe.text_width + recipe.second_width
    transformer = SD3Transformer2DModel(
        sample_size=world.SIZE_PX // 4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=recipe.num_layers,
        attention_head_dim=recipe.width // recipe.num_heads,
        num_attention_heads=recipe.num_heads,
        joint_attention_dim=joint_width,
        caption_projection_dim=recipe.width,
        pooled_projection_dim=joint_width,
        pos_embed_max_size=world.SIZE_PX // 4,
        qk_norm="rms_norm",
    )
    return (*encoders, transformer)


def _as_projecting(known: Any, wanted: nn.Module) -> dict[str, Any]:
    """Weights of a CLIPTextModel under the names of one with a projection, whatever either version calls them."""
    tail = {key.removeprefix("text_model."): key for key in wanted.state_dict()}
    return {
        tail[key.removeprefix("text_model.")]: value
        for key, value in known.state_dict().items()
        if key.removeprefix("text_model.") in tail
    }


def build_autoencoder(recipe: AutoencoderRecipe) -> Any:
    """AutoencoderKL with random weights, almost deterministic at first (standard deviation of the latents 0.03)."""
    num_blocks = len(recipe.channels)
    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        norm_num_groups=recipe.norm_num_groups,
        sample_size=world.SIZE_PX,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
    )
    with torch.no_grad():
        autoencoder.quant_conv.weight[4:] = 0
        autoencoder.quant_conv.bias[4:] = -7.0
    return autoencoder


def build_scheduler() -> Any:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def is_growable(unet: Any, recipe: BaseRecipe) -> bool:
    """Whether the recipe wants the layers that `grow_unet` adds and the UNet has none of them yet."""
    return unet.config.layers_per_block == 1 and recipe.layers_per_block == (2, *[1] * (len(recipe.channels) - 1))


def grow_unet(unet: Any) -> Any:
    """The same function with one more resnet and attention in the first block, each way, ready to be trained on.

    The new layers start as the identity: copies of their neighbours, whose last convolution and projection are zero.
    In the first down block the new layer comes last. The last up block then meets that layer's output where it met
    the old one's; its new layer stands second, and its shortcut takes the hidden half and ignores the skip half.

    Args:
        unet: UNet2DConditionModel whose blocks have one layer each.

    Returns:
        UNet2DConditionModel with ``layers_per_block`` [2, 1, ...].
    """
    num_blocks = len(unet.config.block_out_channels)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    grown = UNet2DConditionModel.from_config({**config, "layers_per_block": [2, *[1] * (num_blocks - 1)]})
    last = num_blocks - 1
    source, target = unet.state_dict(), grown.state_dict()
    for key in target:
        origin = key
        for kind in ("resnets", "attentions"):
            origin = origin.replace(f"down_blocks.0.{kind}.1.", f"down_blocks.0.{kind}.0.")
            origin = origin.replace(f"up_blocks.{last}.{kind}.2.", f"up_blocks.{last}.{kind}.1.")
        target[key] = source[origin].clone()
    width = unet.config.block_out_channels[0]
    for block in ("down_blocks.0.{}.1.", f"up_blocks.{last}.{{}}.1."):
        for name in ("conv2.weight", "conv2.bias"):
            target[block.format("resnets") + name].zero_()
        for name in ("proj_out.weight", "proj_out.bias"):
            target[block.format("attentions") + name].zero_()
    shortcut = f"up_blocks.{last}.resnets.1.conv_shortcut."
    target[shortcut + "weight"].zero_()[:, :width, 0, 0] = torch.eye(width)
    target[shortcut + "bias"].zero_()
    grown.load_state_dict(target)
    return grown


def save_joint_pipeline(
    folder: Path, autoencoder: nn.Module, text_encoders: Sequence[nn.Module], tokenizer: Any, transformer: nn.Module
) -> None:
    """Writes a folder for `StableDiffusion3Pipeline.from_pretrained`, as `save_pipeline` does."""
    first, second = (deepcopy(encoder).cpu().half() for encoder in text_encoders)
    vae: Any = deepcopy(autoencoder).cpu().half()
    vae.register_to_config(shift_factor=0.0)
    StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=deepcopy(transformer).cpu().half(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.backend_tokenizer.model.save(str(folder / name))  # as transformers before 5.0 reads it
    _clean(folder)


def save_pipeline(
    folder: Path, autoencoder: nn.Module, text_encoder: nn.Module, tokenizer: Any, unet: nn.Module
) -> None:
    """Writes a folder for `StableDiffusionPipeline.from_pretrained`: float16, without any path of this machine."""
    StableDiffusionPipeline(
        vae=deepcopy(autoencoder).cpu().half(),
        text_encoder=deepcopy(text_encoder).cpu().half(),
        tokenizer=tokenizer,
        unet=deepcopy(unet).cpu().half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # as transformers before 5.0 reads it
    _clean(folder)


def _clean(folder: Path) -> None:
    """Weights that everyone may read, configurations without this machine's paths."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
