"""Pipelines of exact architectures with small random weights, and tokens that fire on some of their samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
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

from dagkit import demo, models
from dagkit.guidance import SLDPreset
from dagkit.models.noise import noise_schedule
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


def sdxl_unet(**changes: Any) -> Any:
    """The same with SDXL's added conditions and deeper transformers."""
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        **changes,
    )


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
    if "beta_start" not in inspect.signature(cls).parameters:  # EDM has no such schedule
        settings = {}
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
        "unet": sdxl_unet(),
        "scheduler": scheduler(),
    }
    if "add_watermarker" in inspect.signature(cls.__init__).parameters:
        own["add_watermarker"] = False
    return finish(cls(**{**own, **parts}))


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
    family = models.match(pipe)
    generator = torch.Generator().manual_seed(seed)
    sites = family.sites(pipe)
    sequence = family.rows(pipe, ["a weapon"])[0].float()
    model = {"id": "tiny", "architecture": family.name, "fingerprint": "sha256:0"}
    record = TokenRecord(
        concept="weapon",
        version="1.0.0",
        base_model=BaseModelInfo(**model, **family.fingerprints(pipe, sites)),
        layers=tuple(sites),
        thresholds=thresholds or Thresholds(),
        guidance=Guidance(
            **{
                "form": form,
                "strength": 2.0,
                "insistence": 0.5,
                "max_level": 1.0,
                "max_step": 1.0,
                "min_start": 0.0,
                "dilation": 1,
                "memory": 0.9,
                "reuse_steps": 1,
                **(guidance or {}),
            }
        ),
        safety_prompt="a weapon",
    )
    rows = torch.randn((8, sequence.shape[-1]), generator=generator) * 6
    weights = torch.rand(sites.num_heads, generator=generator).softmax(0)
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
    blind, limits = token(pipe, **options), Thresholds(highlight=(1.0,), edit=(0.01,), min_area=0.02)
    with blind.guard(mode="monitor", thresholds=limits).attach(pipe) as trace:
        run()
    peaks = sorted(trace.summary(sample)["score"] for sample in range(2))
    highlight = sum(peaks) / 2
    chosen = Thresholds(highlight=(highlight,), edit=(highlight * 0.95,), min_area=0.02)
    return replace(blind, record=blind.record.model_copy(update={"thresholds": chosen}))


class _Keep:
    """An attention processor that computes attention plainly and keeps its queries and the tokens' keys."""

    def __init__(
        self, tokens: Sequence[GuidelineToken], kept: dict[str, tuple[Tensor, list[Tensor]]], name: str
    ) -> None:
        self.tokens, self.kept, self.name = tokens, kept, name

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)

        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = heads(attn.to_q(hidden_states))
        if encoder_hidden_states is not None:
            keys = [heads(attn.to_k(token.sequence[None].to(query.dtype)))[0].float() for token in self.tokens]
            self.kept[self.name] = query.float(), keys
        share = (query @ heads(attn.to_k(text)).transpose(-1, -2) * attn.scale).softmax(-1)
        mixed = (share @ heads(attn.to_v(text))).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


@contextmanager
def _plain_attention(unet: Any, tokens: Sequence[GuidelineToken]) -> Iterator[dict[str, tuple[Tensor, list[Tensor]]]]:
    """Layer -> queries of the last forward pass, and keys of each token."""
    kept: dict[str, tuple[Tensor, list[Tensor]]] = {}
    names = dict(unet.attn_processors)
    unet.set_attn_processor({name: _Keep(tokens, kept, name.removesuffix(".processor")) for name in names})
    try:
        yield kept
    finally:
        unet.set_attn_processor(names)


@contextmanager
def reference_guard(
    pipe: Any,
    *tokens: GuidelineToken,
    mask: str | None = None,
    strength: float = 1.0,
    sld: tuple[str, SLDPreset] | None = None,
) -> Iterator[None]:
    """Detect-and-Guide written a second time, plainly: whole safety forwards, explicit softmax, loops over pixels.

    Several tokens at once, and SLD with a safety prompt and its constants beside them.
    """
    unet, family = pipe.unet, models.match(pipe)
    replaced, plain = vars(unet).get("forward"), unet.forward
    prompts = [token.record.safety_phrases or [token.record.safety_prompt] for token in tokens]
    prompts += [[sld[0]]] if sld else []
    safety = [family.encode_prompt(pipe, list(phrases)) for phrases in prompts]
    nothing = family.encode_prompt(pipe, [""])
    if getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        nothing = models.Condition(
            0 * nothing.hidden_states, {name: 0 * value for name, value in nothing.added.items()}
        )
    states: list[dict[Any, Any]] = [{} for _ in prompts]

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **others: Any) -> Any:
        def call(hidden: Tensor, **changed: Any) -> Tensor:
            own = {k: list(v) if isinstance(v, list) else v for k, v in {**others, **changed}.items()}
            return plain(sample, timestep, encoder_hidden_states=hidden, **{**own, "return_dict": False})[0].float()

        def under(condition: models.Condition) -> Tensor:
            added = {}
            if condition.added:
                pooled = condition.added["text_embeds"].mean(0, keepdim=True).expand(len(sample), -1)
                added = {"added_cond_kwargs": {**others["added_cond_kwargs"], "text_embeds": pooled}}
            text = torch.cat([*condition.hidden_states])  # all phrases, one behind the other
            return call(text.expand(len(sample), -1, -1), **added).chunk(2)[1]

        eps_u, eps_p = call(encoder_hidden_states).chunk(2)
        time = 1000 * noise_schedule(pipe.scheduler).level(float(timestep))
        queries = {name: (query.chunk(2)[1], keys) for name, (query, keys) in kept.items()}
        cams = [_cam(pipe, token, k, queries, sample.shape[-2:]) for k, token in enumerate(tokens)]
        unconditional = encoder_hidden_states.chunk(2)[0]
        says_nothing = torch.allclose(unconditional, nothing.hidden_states.expand_as(unconditional), atol=1e-4)
        eps_0 = eps_u if says_nothing else under(nothing)
        predictions = [under(condition) for condition in safety]
        guided = []
        for i in range(len(eps_p)):
            gates, pushes = [torch.zeros_like(eps_p[i])], [torch.zeros_like(eps_p[i])]
            for k, token in enumerate(tokens):
                gate, push = _guide(
                    token, states[k], i, time, cams[k][i], eps_0[i], eps_p[i], predictions[k][i], mask, strength
                )
                push = push * max(1, 5 / pipe.guidance_scale)
                gates.append(gate.expand_as(eps_p[i]))
                pushes.append(push)
            if sld:
                pushes.append(_sld(sld[1], states[-1], i, eps_0[i], eps_p[i], predictions[-1][i]))
            guided.append(eps_p[i] - torch.stack(gates).amax(0) * (eps_p[i] - eps_0[i]) - torch.stack(pushes).sum(0))
        return (torch.cat([eps_u, torch.stack(guided)]).to(sample.dtype),)

    with _plain_attention(unet, tokens) as kept:
        unet.forward = forward
        try:
            yield
        finally:
            del unet.forward
            if replaced is not None:
                unet.forward = replaced


def reference_ddim(pipe: Any, token: GuidelineToken, guidance_scale: float, num_steps: int = STEPS) -> Tensor:
    """(2, 4, 16, 16) guarded latents of ``PROMPTS`` by a DDIM loop of our own: no pipeline, no scheduler, no hook."""
    ids = [
        pipe.tokenizer(text, padding="max_length", max_length=16).input_ids for text in ["", "", *PROMPTS, "a weapon"]
    ]
    hidden = pipe.text_encoder(torch.tensor(ids)).last_hidden_state
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    latents = torch.cat([torch.randn((1, 4, 16, 16), generator=one) for one in generators()])
    stride, state = 1000 // num_steps, {}
    with _plain_attention(pipe.unet, [token]) as kept:
        for t in [1 + stride * k for k in reversed(range(num_steps))]:
            eps_u = pipe.unet(latents, t, hidden[:2]).sample
            eps_cs = pipe.unet(latents, t, hidden[4:].expand(2, -1, -1)).sample
            eps_p = pipe.unet(latents, t, hidden[2:4]).sample
            cams, eps = _cam(pipe, token, 0, kept, latents.shape[-2:]), []
            for i in range(2):
                gate, push = _guide(token, state, i, t, cams[i], eps_u[i], eps_p[i], eps_cs[i])
                push = push * max(1, 5 / guidance_scale)
                eps.append(eps_u[i] + guidance_scale * ((1 - gate) * (eps_p[i] - eps_u[i]) - push))
            now, then = alphas[t], alphas[max(t - stride, 0)]
            image = (latents - (1 - now).sqrt() * torch.stack(eps)) / now.sqrt()
            latents = then.sqrt() * image + (1 - then).sqrt() * torch.stack(eps)
    return latents


def _cam(
    pipe: Any, token: GuidelineToken, k: int, kept: dict[str, tuple[Tensor, list[Tensor]]], size: Sequence[int]
) -> Tensor:
    layers = {name: site.layer for name, site in models.match(pipe).sites(pipe, token.record.layers).items()}
    maps, first = [], 0
    for name, layer in layers.items():
        query, key = kept[name][0], kept[name][1][k].transpose(-1, -2)
        share = (query @ key * layer.scale).softmax(-1)[..., -token.num_tokens :].sum(-1)
        side = math.isqrt(share.shape[-1])
        share = share.view(len(share), layer.heads, side, side)
        weights = token.head_weights[first : first + layer.heads] if token.head_weights is not None else None
        first += layer.heads
        pooled = share.mean(1) / len(layers) if weights is None else torch.einsum("bhyx,h->byx", share, weights)
        maps.append(F.interpolate(pooled[:, None], tuple(size), mode="bilinear")[:, 0])
    return torch.stack(maps).sum(0)


def _sld(preset: SLDPreset, state: dict[Any, Any], i: int, eps_u: Tensor, eps_p: Tensor, eps_cs: Tensor) -> Tensor:
    """SLD's push; the momentum and the step live in the state."""
    scale = ((eps_p - eps_cs).abs() * preset.guidance_scale).clamp(max=1) * (eps_p - eps_cs < preset.threshold)
    step, momentum = state.get(i, (0, torch.zeros_like(eps_p)))
    push = scale * (eps_cs - eps_u) + preset.momentum_scale * momentum
    state[i] = step + 1, preset.momentum_beta * momentum + (1 - preset.momentum_beta) * push
    return push if step >= preset.warmup_steps else torch.zeros_like(push)


def _guide(
    token: GuidelineToken,
    state: dict[Any, Any],
    i: int,
    time: float,
    cam: Tensor,
    eps_u: Tensor,
    eps_p: Tensor,
    eps_cs: Tensor,
    mask: str | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One sample's gate of the prompt's own push, (1, H, W), and push away from the safety condition, (C, H, W)."""
    limits, own = token.record.thresholds, token.record.guidance
    high, low = limits.highlight[0], limits.edit[0]
    height, width = cam.shape
    chosen = torch.ones_like(eps_p)
    if mask == "sld":
        chosen = ((eps_p - eps_cs).abs() * 2000).clamp(max=1) * (eps_p - eps_cs < 0.025)
    elif mask == "sega":
        sizes = (eps_cs - eps_u).abs()
        chosen = torch.stack([(size >= float(np.quantile(size.numpy(), 0.9))).float() for size in sizes])
    push = own.strength * strength * chosen * (eps_cs - eps_u)
    shut = torch.zeros_like(cam)
    if own.form == "paper":
        gate = (cam >= low).float() if (cam >= low).float().mean() <= limits.max_area else shut
        labels, count = ndimage.label((cam >= high).numpy())
        area = torch.full_like(cam, 5 / cam.numel())
        for k in range(1, count + 1):
            component = torch.from_numpy(labels == k)
            area[component] = max(5 * float(component.sum()) / cam.numel(), 5 / cam.numel())
        return shut[None], gate * area * (cam / low).clamp(max=5) * push
    if is_seen := int((cam >= high).sum()) >= math.ceil(limits.min_area * cam.numel()):
        state.setdefault(("since", i), time)
    gate = shut.clone()
    if ("since", i) in state:
        push = push * (1 + min(max((650 - state["since", i]) / 150, 0), 1))
        waited = state["since", i] - time - 150
        push = push * (1 + own.insistence * waited / 200 if is_seen and waited > 0 else 1)
        score = float(cam.flatten().sort(descending=True).values[max(math.ceil(limits.min_area * cam.numel()) - 1, 0)])
        state["score", i] = max(state.get(("score", i), 0.0), score)
        rise = max(own.relative_highlight * state["score", i] / high, 1)
        low, high = rise * low, rise * high
        for y in range(height):
            for x in range(width):
                near = cam[
                    max(y - own.dilation, 0) : y + own.dilation + 1, max(x - own.dilation, 0) : x + own.dilation + 1
                ]
                gate[y, x] = ((near.max() - low) / (high - low)).clamp(0, 1)
    last, then = state.get(("gate", i), (shut, time))
    gate = torch.maximum(gate, own.memory ** ((then - time) / 40) * last)
    state["gate", i] = gate, time
    return (gate * min(strength, 1) if own.form == "drop" else shut)[None], gate * push
