"""PixArt and Sana with small random weights, and Detect-and-Guide on them written a second time, plainly."""

from __future__ import annotations

import copy
import inspect
import string
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, T5Config, T5EncoderModel, T5Tokenizer

import tiny_pipelines as tiny
from dagkit import models
from dagkit.models.noise import noise_schedule
from dagkit.token import GuidelineToken

WIDTH = 24
WORDS = ("a", "cat", "on", "grass", "bomb", "and", "dog", "sand", "weapon", "red", "green", "square")
SCALE = 4.5
INSTRUCTION = ["Describe it well.", "User Prompt: "]


def t5() -> dict[str, Any]:
    """Text encoder and a tokenizer of `WORDS` and single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS] + [(letter, -8.0) for letter in string.ascii_lowercase + ","]
    config = T5Config(
        vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.normal_()
    return {"text_encoder": encoder, "tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0)}


def gemma() -> dict[str, Any]:
    """Text encoder and a tokenizer of characters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation, "\n"]
    vocab = {piece: number for number, piece in enumerate([*special, *characters])}
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=1024,
    )
    return {
        "text_encoder": Gemma2Model(config),
        "tokenizer": GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True),
    }


def _lively(transformer: Any) -> Any:
    """Random weights that let the text be heard: as they are made, cross-attention says next to nothing."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".attn2." in name and weight.dim() > 1:
                weight.mul_(3)
    return transformer


def pixart(cls: Any = PixArtAlphaPipeline, *, seed: int = 0, sample_size: int = 16, **changes: Any) -> Any:
    """Patches of 2 by 2, learned variances."""
    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": sample_size,
        "patch_size": 2,
        "caption_channels": WIDTH,
    }
    transformer = _lively(PixArtTransformer2DModel(**{**settings, **changes}))
    scheduler = DPMSolverMultistepScheduler()  # betas from 0.0001 to 0.02, linear, as the published ones have
    vae = tiny.vae()
    vae.register_to_config(scaling_factor=4.0)  # its latents are small
    return tiny.finish(cls(vae=vae, transformer=transformer, scheduler=scheduler, **t5()))


def sana(*, seed: int = 0, sample_size: int = 16, scheduler: Any = None, **changes: Any) -> Any:
    """Cells of the autoencoder's, flow matching."""
    torch.manual_seed(seed)
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": WIDTH,
        "sample_size": sample_size,
    }
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.3,
    )
    flow = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    transformer = _lively(SanaTransformer2DModel(**{**settings, **changes}))
    return tiny.finish(SanaPipeline(vae=vae, transformer=transformer, scheduler=scheduler or flow, **gemma()))


def sana_normed(**options: Any) -> Any:
    """Sana 1.5: queries and keys are normalised over all heads."""
    pipe = sana(qk_norm="rms_norm_across_heads", **options)
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            for norm in (block.attn2.norm_q, block.attn2.norm_k):
                norm.weight.uniform_(0.5, 1.5)
    return pipe


MODELS = {
    "alpha": pixart,
    "alpha-1024": lambda **options: pixart(sample_size=128, **options),
    "sigma": lambda **options: pixart(PixArtSigmaPipeline, **options),
    "sana": sana,
    "sana-1.5": sana_normed,
}


def draw(pipe: Any, prompts: Sequence[str] = tiny.PROMPTS, **changes: Any) -> Tensor:
    """(2, 4, 16, 16) latents of two prompts, always from the same noise."""
    settings = {
        "num_inference_steps": tiny.STEPS,
        "guidance_scale": SCALE,
        "height": 16 * pipe.vae_scale_factor,
        "width": 16 * pipe.vae_scale_factor,
        "output_type": "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
        "generator": tiny.generators(len(prompts)),
    }
    if isinstance(pipe, SanaPipeline):
        settings["complex_human_instruction"] = INSTRUCTION
    latents: Tensor = pipe(list(prompts), **{**settings, **changes}).images
    return latents


def encode(pipe: Any, texts: Sequence[str], length: int, instruction: str = "") -> tuple[Tensor, Tensor]:
    """Rows and mask of some texts, by tokenizer and text encoder alone."""
    texts = [instruction + text.lower().strip() for text in texts]
    whole = length if not instruction else len(pipe.tokenizer(instruction).input_ids) + length - 2
    pipe.tokenizer.padding_side = "right"
    ids = pipe.tokenizer(texts, padding="max_length", max_length=whole, truncation=True, return_tensors="pt")
    hidden = pipe.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0]
    kept = [0, *range(whole - length + 1, whole)]
    return hidden[:, kept], ids.attention_mask[:, kept]


def reference(
    pipe: Any,
    token: GuidelineToken,
    *,
    length: int | None = None,
    negative: Sequence[str] | None = None,
    scale: float = SCALE,
    num_steps: int = tiny.STEPS,
) -> Tensor:
    """(2, 4, 16, 16) guarded latents of ``tiny.PROMPTS`` by a loop of our own: no pipeline, no hook."""
    length = length or inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    instruction = "\n".join(INSTRUCTION) if isinstance(pipe, SanaPipeline) else ""
    transformer, scheduler = pipe.transformer, copy.deepcopy(pipe.scheduler)
    kept: dict[str, tuple[Tensor, list[Tensor]]] = {}
    caption = transformer.caption_projection(token.sequence)
    if hasattr(transformer, "caption_norm"):
        caption = transformer.caption_norm(caption)
    processors = dict(transformer.attn_processors)
    explicit = {
        name: _Explicit(caption, kept, name.removesuffix(".processor")) if ".attn2." in name else processor
        for name, processor in processors.items()
    }
    texts = {
        "p": encode(pipe, tiny.PROMPTS, length, instruction),
        "u": encode(pipe, negative or ["", ""], length),
        "0": encode(pipe, ["", ""], length),
        "s": tuple(
            part.flatten(0, 1).expand(2, -1, *part.shape[2:])
            for part in encode(pipe, token.record.pushed_away_from, length)
        ),
    }
    added = {}
    if getattr(transformer, "use_additional_conditions", False):
        side = 16.0 * pipe.vae_scale_factor
        added = {"resolution": torch.full((2, 2), side), "aspect_ratio": torch.ones(2, 1)}
    size = (16, 16)
    unit = getattr(transformer.config, "timestep_scale", 1)
    latents = torch.cat([torch.randn((1, 4, *size), generator=one) for one in tiny.generators()])
    scheduler.set_timesteps(num_steps)
    state: dict[Any, Any] = {}
    transformer.set_attn_processor(dict(explicit))
    try:
        for t in scheduler.timesteps:
            eps, features = {}, {}
            for name, (hidden, mask) in texts.items():
                further = {"added_cond_kwargs": added} if added else {}
                whole = transformer(
                    latents,
                    encoder_hidden_states=hidden,
                    encoder_attention_mask=mask,
                    timestep=t.expand(2) * unit,
                    **further,
                ).sample
                eps[name], features[name] = whole[:, :4], dict(kept)
            cams = _cams(pipe, token, features["p"], size)
            time = 1000 * noise_schedule(scheduler).level(float(t))
            guided = []
            for i in range(2):
                gate, push = tiny._guide(token, state, i, time, cams[i], eps["0"][i], eps["p"][i], eps["s"][i])
                push = push * max(1, 5 / scale)
                changed = eps["p"][i] - gate * (eps["p"][i] - eps["0"][i]) - push
                guided.append(eps["u"][i] + scale * (changed - eps["u"][i]))
            latents = scheduler.step(torch.stack(guided), t, latents).prev_sample
    finally:
        transformer.set_attn_processor(processors)
    return latents


class _Explicit:
    """Attention by its formula, which keeps the queries and the token's keys."""

    def __init__(self, caption: Tensor, kept: dict[str, tuple[Tensor, list[Tensor]]], name: str) -> None:
        self.caption, self.kept, self.name = caption, kept, name

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor, **_: Any
    ) -> Tensor:
        def heads(x: Tensor, norm: Any = None) -> Tensor:
            if norm is not None:
                x = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
            return x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        self.kept[self.name] = query, [heads(attn.to_k(self.caption[None]), attn.norm_k)[0]]
        scores = query @ heads(attn.to_k(encoder_hidden_states), attn.norm_k).transpose(-1, -2)
        scores = scores / query.shape[-1] ** 0.5
        share = scores.masked_fill(attention_mask[:, None] < 0, float("-inf")).softmax(-1)
        return attn.to_out[0]((share @ heads(attn.to_v(encoder_hidden_states))).transpose(1, 2).flatten(2))


def _cams(pipe: Any, token: GuidelineToken, kept: dict[str, Any], size: tuple[int, int]) -> Tensor:
    maps, first = [], 0
    for name in token.record.layers:
        query, (keys,) = kept[name]
        heads = query.shape[1]
        share = (query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)[..., -token.num_tokens :].sum(-1)
        side = round(share.shape[-1] ** 0.5)
        assert token.head_weights is not None
        pooled = torch.einsum("bhn,h->bn", share, token.head_weights[first : first + heads]).view(-1, 1, side, side)
        maps.append(F.interpolate(pooled, size, mode="bilinear")[:, 0])
        first += heads
    return torch.stack(maps).sum(0)


def base(pipe: Any) -> models.BaseModel:
    """The pipeline as a base model that was loaded from nowhere."""
    return models.BaseModel(pipe, models.match(pipe), "tiny", "sha256:0")
