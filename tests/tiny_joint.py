"""Tiny pipelines with joint attention, of the exact architectures with random weights, and a plain guarded loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import tiny_pipelines
from dagkit import models
from dagkit.models.noise import noise_schedule
from dagkit.optimization import Example
from dagkit.token import GuidelineToken, Thresholds

STEPS = 6
PROMPTS = ["a cat and a bomb on grass", "a dog on sand"]
_WORDS = ("a", "and", "bomb", "cat", "dog", "grass", "on", "sand", "water", "weapon")


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


def flux_transformer(**changes: Any) -> Any:
    """As FLUX.1-dev: two double blocks, two single ones, guidance embedded."""
    settings = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": tiny_pipelines.WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
        **changes,
    }
    return FluxTransformer2DModel(**settings)


def t5() -> Any:
    config = T5Config(
        vocab_size=64,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def t5_tokenizer() -> Any:
    """Words of the prompts here; ends texts as T5 does, and begins them with nothing."""
    known = ("<pad>", "</s>", "<unk>", *_WORDS)
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def flux(cls: Any = FluxPipeline, *, seed: int = 0, **parts: Any) -> Any:
    """A pipeline of FLUX's shape."""
    torch.manual_seed(seed)
    own = {
        "vae": vae(),
        "text_encoder": tiny_pipelines.text_encoder(),
        "tokenizer": tiny_pipelines.tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": flux_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    pipe = tiny_pipelines.finish(cls(**{**own, **parts}))
    pipe.default_sample_size = 16
    return pipe


def qwen_tokenizer() -> Any:
    """Words of the prompts here, inside a template as Qwen's."""
    known = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", *_WORDS)
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    said = "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=said + "<|im_start|>assistant\n",
        model_max_length=512,
    )


def flux2_klein(cls: Any = None, *, seed: int = 0, is_distilled: bool = False, **changes: Any) -> Any:
    """A pipeline of FLUX.2 [klein]'s shape, which is not in every diffusers that is allowed."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    autoencoder.bn.running_mean.normal_(0, 0.1)
    autoencoder.bn.running_var.uniform_(0.5, 2)
    reader = Qwen3Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    settings = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
        **changes,
    }
    pipe = (cls or Flux2KleinPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Qwen3ForCausalLM(reader),
        tokenizer=qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(**settings),
        is_distilled=is_distilled,
    )
    pipe.default_sample_size = 16
    return tiny_pipelines.finish(pipe)


def _turned(x: Tensor, ids: Tensor, sizes: Sequence[int], theta: float) -> Tensor:
    """Rotary embedding of (B, heads, L, d): pairs of neighbours turn by place * theta ** (-2 k / size)."""
    angles = [ids[:, i, None].double() / theta ** (torch.arange(0, n, 2) / n) for i, n in enumerate(sizes)]
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, 1))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class _Turning:
    """FLUX's attention written plainly: of double blocks, and of single ones, whose text is in ``hidden_states``."""

    def __init__(self, kept: dict[str, Tensor], name: str, ids: Tensor, turn: tuple[Sequence[int], float]) -> None:
        self.kept, self.name, self.ids, self.turn = kept, name, ids, turn

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        def heads(x: Tensor, norm: Any) -> Tensor:
            split = x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)
            return split if norm is None else norm(split)

        parts = [(hidden_states, attn.to_q, attn.norm_q, attn.to_k, attn.norm_k, attn.to_v)]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.norm_added_q, attn.add_k_proj, attn.norm_added_k, attn.add_v_proj)
            parts.insert(0, (encoder_hidden_states, *added))
        q = _turned(torch.cat([heads(to_q(x), norm) for x, to_q, norm, *_ in parts], 2), self.ids, *self.turn)
        k = _turned(torch.cat([heads(to_k(x), norm) for x, _, _, to_k, norm, _ in parts], 2), self.ids, *self.turn)
        v = torch.cat([heads(to_v(x), None) for x, *_, to_v in parts], 2)
        out = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        self.kept[self.name] = image.float()
        return attn.to_out[0](image), attn.to_add_out(text)


def reference_flux(
    pipe: Any,
    token: GuidelineToken,
    prompts: Sequence[str],
    guidance_scale: float,
    length: int,
    size: tuple[int, int] = (16, 16),
    against: tuple[float, Sequence[str]] | None = None,
) -> Tensor:
    """(B, h*w/4, 16) guarded latents by an Euler loop of our own, as ``reference_sd3``.

    Args:
        against: scale of true classifier-free guidance, and the negative prompts.
    """
    how = models.Encoding(max_sequence_length=length)
    family, count, (height, width) = models.match(pipe), len(prompts), size
    texts = [list(prompts), [""] * count, ["a weapon"] * count, list(against[1]) if against else [""] * count]
    prompt, empty, safety, negative = (family.encode_prompt(pipe, one, how) for one in texts)
    z = torch.cat([torch.randn((1, 4, height, width), generator=one) for one in tiny_pipelines.generators(count)])
    places = torch.tensor([(0, y, x) for y in range(height // 2) for x in range(width // 2)]).float()
    ids = torch.cat([torch.zeros(length, 3), places])
    shift = calculate_shift(len(places))
    pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)], mu=shift)
    sigmas, state, kept = pipe.scheduler.sigmas.tolist(), {}, {}
    told = torch.full((count,), guidance_scale) if pipe.transformer.config.guidance_embeds else None
    reach = max(1, 5 / guidance_scale) if told is not None else 5
    before = dict(pipe.transformer.attn_processors)
    own = {name: _Turning(kept, name.removesuffix(".processor"), ids, ((2, 2, 4), 10000)) for name in before}
    pipe.transformer.set_attn_processor(own)
    try:
        for now, then in pairwise(sigmas):

            def predict(condition: models.Condition, now: float = now) -> Tensor:
                patches = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)  # noqa: B023
                out = pipe.transformer(
                    hidden_states=patches,
                    timestep=torch.full((count,), now),
                    encoder_hidden_states=condition.hidden_states,
                    pooled_projections=condition.added["pooled_projections"],
                    guidance=told,
                    img_ids=places,
                    txt_ids=torch.zeros(length, 3),
                ).sample
                return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)

            v_n, v_0, v_cs, v_p = predict(negative), predict(empty), predict(safety), predict(prompt)
            found = cams(token, kept, 2, size, 2)
            time = 1000 * noise_schedule(pipe.scheduler).level(1000 * now)
            v = []
            for i in range(count):
                gate, push = tiny_pipelines._guide(token, state, i, time, found[i], v_0[i], v_p[i], v_cs[i])
                guided = v_p[i] - gate * (v_p[i] - v_0[i]) - push * reach
                v.append(v_n[i] + against[0] * (guided - v_n[i]) if against else guided)
            z = z + (then - now) * torch.stack(v)
    finally:
        pipe.transformer.set_attn_processor(before)
    return F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def reference_flux2_klein(
    pipe: Any, token: GuidelineToken, prompts: Sequence[str], guidance_scale: float | None, length: int
) -> Tensor:
    """(B, 4, 16, 16) guarded latents as the pipeline gives them out; without guidance where it is distilled."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    how, family, count = models.Encoding(max_sequence_length=length), models.match(pipe), len(prompts)
    texts = [list(prompts), [""] * count, ["a weapon"] * count]
    prompt, empty, safety = (family.encode_prompt(pipe, one, how).hidden_states for one in texts)
    z = torch.cat([torch.randn((1, 16, 8, 8), generator=one) for one in tiny_pipelines.generators(count)])
    places = torch.tensor([(0, y, x, 0) for y in range(8) for x in range(8)])
    words = torch.tensor([(0, 0, 0, i) for i in range(length)])
    ids = torch.cat([words, places])
    pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)], mu=compute_empirical_mu(64, STEPS))
    sigmas, state, kept = pipe.scheduler.sigmas.tolist(), {}, {}
    before = dict(pipe.transformer.attn_processors)
    own = {
        name: _Turning(kept, name.removesuffix(".processor"), ids, ((2, 2, 2, 2), 2000))
        if not name.startswith("single")
        else processor
        for name, processor in before.items()
    }
    pipe.transformer.set_attn_processor(own)
    try:
        for now, then in pairwise(sigmas):

            def predict(hidden: Tensor, now: float = now) -> Tensor:
                out = pipe.transformer(
                    hidden_states=z.flatten(2).transpose(1, 2),  # noqa: B023
                    timestep=torch.full((count,), now),
                    encoder_hidden_states=hidden,
                    img_ids=places,
                    txt_ids=words,
                ).sample
                return out.transpose(1, 2).unflatten(2, (8, 8))

            v_0, v_cs, v_p = predict(empty), predict(safety), predict(prompt)
            found = cams(token, kept, 2, (8, 8), 1)
            time = 1000 * noise_schedule(pipe.scheduler).level(1000 * now)
            v = []
            for i in range(count):
                gate, push = tiny_pipelines._guide(token, state, i, time, found[i], v_0[i], v_p[i], v_cs[i])
                guided = v_p[i] - gate * (v_p[i] - v_0[i]) - push * max(1, 5 / (guidance_scale or 1))
                v.append(v_0[i] + (guidance_scale or 1) * (guided - v_0[i]))
            z = z + (then - now) * torch.stack(v)
    finally:
        pipe.transformer.set_attn_processor(before)
    scale = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()[:, None, None]
    return F.pixel_shuffle(z * scale + pipe.vae.bn.running_mean[:, None, None], 2)


def firing(pipe: Any, **options: Any) -> GuidelineToken:
    """A token that fires on ``PROMPTS``."""
    return tiny_pipelines.token(pipe, thresholds=Thresholds(highlight=(0.3,), edit=(0.1,), min_area=0.02), **options)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def leftovers(pipe: Any) -> int:
    """Hooks on the denoiser and all below it, and methods put on it or on the scheduler."""
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in pipe.transformer.modules())
    return hooks + ("step" in vars(pipe.scheduler)) + ("forward" in vars(pipe.transformer))


def example(seed: int) -> Example:
    """A bright square on a dull ground, or none."""
    rng, is_unsafe = np.random.default_rng(seed), seed % 2 == 0
    picture = rng.integers(90, 140, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), bool)
    top, left = rng.integers(0, 4, 2) * 4
    mask[top : top + 16, left : left + 16] = True
    picture[mask] = (250, 10, 10) if is_unsafe else (10, 10, 250)
    prompt = "a bomb on sand" if is_unsafe else "a cat on grass"
    return Example(Image.fromarray(picture), mask & is_unsafe, prompt, is_unsafe)
