"""Pipelines of exact architectures with small random weights, and tokens that fire on some of their samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from scipy import ndimage
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dagkit import demo, families
from dagkit.token import BaseModelInfo, Guidance, GuidelineToken, Thresholds, TokenRecord

WIDTH = 32
STEPS = 3
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 32, "width": 32, "output_type": "latent"}
PROMPTS = ["a cat on grass", "a bomb and a dog on sand"]


def text_encoder(width: int = WIDTH, *, is_projecting: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if is_projecting else CLIPTextModel)(config)


def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(demo.model_path() / "tokenizer")


def unet(**changes: Any) -> Any:
    """Two levels; cross-attention at both and in the middle; latents of 16x16."""
    settings = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **changes})


def vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )


def scheduler(cls: Any = DDIMScheduler, **changes: Any) -> Any:
    """A scheduler with Stable Diffusion's noise, of any class."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if cls is DDIMScheduler:
        settings |= {"clip_sample": False, "set_alpha_to_one": False}
    return cls(**{**settings, **changes})


def finish(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def sd(cls: Any = StableDiffusionPipeline, *, seed: int = 0, is_checked: bool = True, **parts: Any) -> Any:
    """A pipeline of SD 1.x's shape, of any class that takes its parts."""
    torch.manual_seed(seed)
    own = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
    }
    if is_checked:
        own |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return finish(cls(**{**own, **parts}))


def sdxl(cls: Any = StableDiffusionXLPipeline, *, seed: int = 0, **parts: Any) -> Any:
    """A pipeline of SDXL's shape."""
    torch.manual_seed(seed)
    own = {
        "vae": vae(),
        "text_encoder": text_encoder(16),
        "text_encoder_2": text_encoder(16, is_projecting=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        "scheduler": scheduler(),
    }
    return finish(
        cls(**{**own, **parts}, add_watermarker=False) if "add_watermarker" not in parts else cls(**{**own, **parts})
    )


def controlnet(unet: Any) -> Any:
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():
        for parameter in net.controlnet_down_blocks.parameters():
            parameter.normal_(0, 0.05)
    return net.eval().requires_grad_(False)


def adapter() -> Any:
    return T2IAdapter(
        in_channels=3, channels=(32, 64), num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    ).eval()


def token(
    pipe: Any,
    *,
    form: str = "drop",
    thresholds: Thresholds | None = None,
    guidance: dict[str, Any] | None = None,
    is_learned: bool = True,
    seed: int = 5,
) -> GuidelineToken:
    """A token with random rows for a pipeline."""
    family = families.match(pipe)
    generator = torch.Generator().manual_seed(seed)
    layers = family.cross_attention(pipe)
    sequence = family.encode_prompt(pipe, ["a weapon"]).hidden_states[0].float()
    heads = sum(layer.heads for layer in layers.values())
    model = {"id": "tiny", "architecture": family.name, "fingerprint": "sha256:0"}
    record = TokenRecord(
        concept="weapon",
        version="1.0.0",
        base_model=BaseModelInfo(**model, **family.fingerprints(pipe, layers)),
        layers=tuple(layers),
        thresholds=thresholds or Thresholds(),
        guidance=Guidance(**{"form": form, "dilation": 1, "memory": 0.5, "reuse_steps": 1, **(guidance or {})}),
        safety_prompt="a weapon",
    )
    rows = torch.randn((8, sequence.shape[-1]), generator=generator) * 6
    weights = torch.rand(heads, generator=generator).softmax(0)
    return GuidelineToken(
        guideline=rows[:2],
        start_of_text=sequence[:1],
        background=rows[2:5] if is_learned else None,
        head_weights=weights if is_learned else None,
        record=record,
    )


def generators(count: int = 2) -> list[torch.Generator]:
    """One an image, always the same."""
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def half_firing(pipe: Any, run: Callable[[], Tensor], **options: Any) -> GuidelineToken:
    """A token with thresholds between the scores of a run's two samples: one fires, the other never does."""
    blind = token(pipe, thresholds=Thresholds(highlight=(1.0,), edit=(0.0,), min_area=0.02), **options)
    with blind.guard(mode="monitor").attach(pipe) as trace:
        run()
    peaks = sorted(trace.summary(sample)["score"] for sample in range(2))
    highlight = sum(peaks) / 2
    chosen = Thresholds(highlight=(highlight,), edit=(highlight * 0.95,), min_area=0.02)
    return replace(blind, record=blind.record.model_copy(update={"thresholds": chosen}))


class _Keep:
    """An attention processor that computes attention plainly and keeps its queries."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)

        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = heads(attn.to_q(hidden_states))
        self.kept[self.name] = query
        share = (query @ heads(attn.to_k(text)).transpose(-1, -2) * attn.scale).softmax(-1)
        mixed = (share @ heads(attn.to_v(text))).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


@contextmanager
def reference_guard(pipe: Any, token: GuidelineToken) -> Iterator[None]:
    """Detect-and-Guide written a second time, plainly: whole safety forwards, explicit softmax, loops over pixels."""
    unet, family, record = pipe.unet, families.match(pipe), token.record
    kept: dict[str, Tensor] = {}
    names = dict(unet.attn_processors)
    unet.set_attn_processor({name: _Keep(kept, name.removesuffix(".processor")) for name in names})
    safety = family.encode_prompt(pipe, [record.safety_prompt])
    plain = unet.forward
    state: dict[str, Any] = {}

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **others: Any) -> Any:
        def call(hidden: Tensor, **changed: Any) -> Tensor:
            own = {k: list(v) if isinstance(v, list) else v for k, v in {**others, **changed}.items()}
            return plain(sample, timestep, encoder_hidden_states=hidden, **{**own, "return_dict": False})[0]

        eps_u, eps_p = call(encoder_hidden_states).chunk(2)
        cam = _cam(token, family.cross_attention(pipe, record.layers), kept, sample)
        hidden = safety.hidden_states.expand(len(sample), -1, -1)
        added = {}
        if safety.added:
            pooled = safety.added["text_embeds"].expand(len(sample), -1)
            added = {"added_cond_kwargs": {**others["added_cond_kwargs"], "text_embeds": pooled}}
        eps_cs = call(hidden, **added).chunk(2)[1]
        guided = torch.stack(
            [_guide(token, state, i, *row) for i, row in enumerate(zip(cam, eps_u, eps_p, eps_cs, strict=True))]
        )
        return (torch.cat([eps_u, guided]),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
        unet.set_attn_processor(names)


def _cam(token: GuidelineToken, layers: dict[str, Any], kept: dict[str, Tensor], sample: Tensor) -> Tensor:
    size = tuple(sample.shape[-2:])
    maps, first = [], 0
    for name, layer in layers.items():
        query = kept[name].chunk(2)[1]
        key = layer.to_k(token.sequence).view(len(token.sequence), layer.heads, -1).permute(1, 2, 0)
        share = (query @ key * layer.scale).softmax(-1)[..., -token.num_tokens :].sum(-1)
        side = math.isqrt(share.shape[-1])
        share = share.view(len(share), layer.heads, side, side)
        weights = token.head_weights[first : first + layer.heads] if token.head_weights is not None else None
        first += layer.heads
        pooled = share.mean(1) / len(layers) if weights is None else torch.einsum("bhyx,h->byx", share, weights)
        maps.append(F.interpolate(pooled[:, None], size, mode="bilinear")[:, 0])
    return torch.stack(maps).sum(0)


def _guide(
    token: GuidelineToken, state: dict[str, Any], i: int, cam: Tensor, eps_u: Tensor, eps_p: Tensor, eps_cs: Tensor
) -> Tensor:
    limits, own = token.record.thresholds, token.record.guidance
    high, low = limits.highlight[0], limits.edit[0]
    height, width = cam.shape
    if own.form == "paper":
        gate = (cam >= low).float() if (cam >= low).float().mean() <= limits.max_area else torch.zeros_like(cam)
        labels, count = ndimage.label((cam >= high).numpy())
        area = torch.full_like(cam, 5 / cam.numel())
        for k in range(1, count + 1):
            component = torch.from_numpy(labels == k)
            area[component] = max(5 * float(component.sum()) / cam.numel(), 5 / cam.numel())
        return eps_p - own.strength * gate * area * (cam / low).clamp(max=5) * (eps_cs - eps_u)
    if int((cam >= high).sum()) >= math.ceil(limits.min_area * cam.numel()):
        state["sure", i] = True
    gate = torch.zeros_like(cam)
    if state.get(("sure", i)):
        for y in range(height):
            for x in range(width):
                near = cam[
                    max(y - own.dilation, 0) : y + own.dilation + 1, max(x - own.dilation, 0) : x + own.dilation + 1
                ]
                gate[y, x] = ((near.max() - low) / (high - low)).clamp(0, 1)
    gate = torch.maximum(gate, own.memory * state.get(("gate", i), torch.zeros_like(cam)))
    state["gate", i] = gate
    push = own.strength * (eps_cs - eps_u)
    return eps_p - gate * (eps_p - eps_u + push if own.form == "drop" else push)
