"""Tiny pipelines with joint attention, of the exact architectures with random weights, and a plain guarded loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

import tiny_pipelines
from dagkit import models
from dagkit.models.noise import noise_schedule
from dagkit.token import GuidelineToken

STEPS = 6


def vae(channels: int = 4) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def sd3_transformer(**changes: Any) -> Any:
    """As in SD3.5: norms of queries and keys; in the medium one ``dual_attention_layers`` as well."""
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
        **changes,
    }
    transformer = SD3Transformer2DModel(**settings)
    with torch.no_grad():  # diffusers begins with a last layer of zeros
        for weight in transformer.parameters():
            if not bool(weight.any()):
                weight.normal_(0, 0.05)
    return transformer


def sd3(cls: Any = StableDiffusion3Pipeline, *, seed: int = 0, **parts: Any) -> Any:
    """A pipeline of SD3's shape, without T5."""
    torch.manual_seed(seed)
    own = {
        "vae": vae(),
        "text_encoder": tiny_pipelines.text_encoder(16, is_projecting=True),
        "tokenizer": tiny_pipelines.tokenizer(),
        "text_encoder_2": tiny_pipelines.text_encoder(16, is_projecting=True),
        "tokenizer_2": tiny_pipelines.tokenizer(),
        "text_encoder_3": None,
        "tokenizer_3": None,
        "transformer": sd3_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return tiny_pipelines.finish(cls(**{**own, **parts}))


class _Plain:
    """Joint attention written plainly; keeps what comes out for the image."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        def heads(x: Tensor, norm: Any) -> Tensor:
            split = x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)
            return split if norm is None else norm(split)

        query = [heads(attn.to_q(hidden_states), attn.norm_q)]
        key = [heads(attn.to_k(hidden_states), attn.norm_k)]
        value = [heads(attn.to_v(hidden_states), None)]
        if encoder_hidden_states is not None:
            query.append(heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q))
            key.append(heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k))
            value.append(heads(attn.add_v_proj(encoder_hidden_states), None))
        q, k, v = (torch.cat(part, 2) for part in (query, key, value))
        out = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        self.kept[self.name] = image.float()
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


@contextmanager
def plain_attention(transformer: Any) -> Iterator[dict[str, Tensor]]:
    """Layer -> what joint attention gave out for the image in the last forward pass."""
    kept: dict[str, Tensor] = {}
    before = dict(transformer.attn_processors)
    transformer.set_attn_processor({name: _Plain(kept, name.removesuffix(".processor")) for name in before})
    try:
        yield kept
    finally:
        transformer.set_attn_processor(before)


def cams(token: GuidelineToken, kept: dict[str, Tensor], heads: int, size: Sequence[int], patch: int) -> Tensor:
    """(B, H, W): softmax over the rows of every head, weighted, summed."""
    maps, first_row, first_head = [], 0, 0
    for name in token.record.layers:
        found = kept[name]
        found = found / found.pow(2).mean(-1, keepdim=True).sqrt()
        rows = token.sequence[:, first_row : first_row + found.shape[-1]]
        first_row += found.shape[-1]
        image, row = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (found, rows))
        share = (image @ row.transpose(-1, -2) / image.shape[-1] ** 0.5).softmax(-1)[..., -token.num_tokens :].sum(-1)
        share = share.unflatten(-1, (size[0] // patch, size[1] // patch))
        assert token.head_weights is not None
        weights = token.head_weights[first_head : first_head + heads]
        first_head += heads
        pooled = torch.einsum("bhyx,h->byx", share, weights)
        maps.append(F.interpolate(pooled[:, None], tuple(size), mode="bilinear")[:, 0])
    return torch.stack(maps).sum(0)


def reference_sd3(
    pipe: Any,
    token: GuidelineToken,
    prompts: Sequence[str],
    guidance_scale: float,
    length: int,
    negative: Sequence[str] = ("", ""),
) -> Tensor:
    """(B, 4, 16, 16) guarded latents by an Euler loop of our own: no pipeline, no scheduler's step, no hook."""
    family = models.match(pipe)
    how = models.Encoding(max_sequence_length=length)
    conditional, against = (family.encode_prompt(pipe, list(texts), how) for texts in (prompts, negative))
    empty, safety = (family.encode_prompt(pipe, [text] * len(prompts), how) for text in ("", "a weapon"))
    latents = torch.cat([torch.randn((1, 4, 16, 16), generator=one) for one in tiny_pipelines.generators(len(prompts))])
    pipe.scheduler.set_timesteps(STEPS)
    sigmas, state = pipe.scheduler.sigmas.tolist(), {}
    with plain_attention(pipe.transformer) as kept:
        for now, then in pairwise(sigmas):
            step = torch.full((len(prompts),), 1000 * now)

            def predict(condition: models.Condition, step: Tensor = step) -> Tensor:
                return pipe.transformer(
                    hidden_states=latents,  # noqa: B023
                    timestep=step,
                    encoder_hidden_states=condition.hidden_states,
                    pooled_projections=condition.added["pooled_projections"],
                ).sample

            eps_u, eps_0, eps_cs, eps_p = predict(against), predict(empty), predict(safety), predict(conditional)
            found = cams(token, kept, 2, latents.shape[-2:], 2)
            time = 1000 * noise_schedule(pipe.scheduler).level(1000 * now)
            eps = []
            for i in range(len(prompts)):
                gate, push = tiny_pipelines._guide(token, state, i, time, found[i], eps_0[i], eps_p[i], eps_cs[i])
                guided = eps_p[i] - gate * (eps_p[i] - eps_0[i]) - push * max(1, 5 / guidance_scale)
                eps.append(eps_u[i] + guidance_scale * (guided - eps_u[i]))
            latents = latents + (then - now) * torch.stack(eps)
    return latents
