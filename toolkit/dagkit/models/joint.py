"""Joint attention as a site, and Stable Diffusion 3: text and image share one softmax.

Features are the image's part of what attention gives out, before it is projected (*output space*): a concept's rows
are learned there, for each site its own. A row of such a token holds its parts for all sites one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from dagkit import attention
from dagkit.errors import GuardError, ModelError
from dagkit.models.base import PLAIN, Encoding, Family, Seen, noise_like
from dagkit.models.calls import Arguments, Batched, Call, CallLayout, Condition, Step
from dagkit.models.cross_attention import Grid
from dagkit.models.sites import AttentionSite, Sites

LOOKED_FROM: Final = 0.5
"""Noise level at which a text is looked up where there is no image."""

_ROWS_AT_ONCE: Final = 8
_SEED: Final = 0


class JointAttention(AttentionSite):
    """One joint-attention layer.

    Features are the image positions of attention's output, scaled to a root mean square of 1, which a forward pre-hook
    on ``to_out[0]`` sees whatever the processor, fused or not. Rows score ``softmax(<o, r> / sqrt(d_head))`` head by
    head.

    Args:
        name: of the layer.
        layer: the module.
        part: of a concept's row that is this site's.
        width: of a whole row.
        grid: (h, w) of the image positions for latents of a size.
    """

    reads = "input"

    def __init__(self, name: str, layer: Any, part: slice, width: int, grid: Grid) -> None:
        self.name, self.layer, self._part, self._width, self._grid = name, layer, part, width, grid

    @property
    def tapped(self) -> nn.Module:
        """``to_out[0]``."""
        projection: nn.Module = self.layer.to_out[0]
        return projection

    @property
    def scale(self) -> float:
        """By the width of a head."""
        return 1 / math.sqrt((self._part.stop - self._part.start) / self.num_heads)

    @property
    def width(self) -> int:
        """Of all sites together."""
        return self._width

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """As given."""
        return self._grid(latent_size)

    def project(self, rows: Tensor, lora_scale: float = 1.0) -> Tensor:
        """This site's part of the rows; a LoRA changes features alone."""
        return attention.split_heads(rows[None, :, self._part], self.num_heads)[0]

    def features(self, value: Tensor) -> Tensor:
        """(B, h*w, channels) of root mean square 1."""
        return normalised(value)

    def check(self) -> None:
        """Refuses a layer that would be misread.

        Raises:
            GuardError: it is no joint attention, or was fused into something else.
        """
        kind = type(self.layer).__name__
        missing = [name for name in ("to_out", "add_k_proj", "heads") if getattr(self.layer, name, None) is None]
        if missing:
            raise GuardError(
                f"layer {self.name} is a {kind} without {', '.join(missing)}; expected joint attention of text and "
                "image. This model cannot be guarded."
            )
        processor = self.processor
        if "Fused" in processor and getattr(self.layer, "norm_q", None) is not None and kind == "Attention":
            raise GuardError(
                f"layer {self.name} attends with {processor}, which leaves out the layer's norms of queries and keys: "
                "fused, this is another model. Call unfuse_qkv_projections() first."
            )

    @property
    def projection(self) -> nn.Module:
        """``to_v``, of whose output space features are, without a LoRA that is loaded on it."""
        projection: nn.Module = getattr(self.layer.to_v, "base_layer", self.layer.to_v)
        return projection


def normalised(value: Tensor) -> Tensor:
    """Vectors (..., d) scaled to a root mean square of 1, in their own dtype."""
    size = value.float().square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    return (value * size).to(value.dtype)


class JointFamily(Family):
    """Base of families whose denoiser is a transformer with joint-attention blocks ``transformer_blocks``."""

    pipelines: ClassVar[frozenset[str]]
    """Pipeline classes that are known."""
    stand_side_by_side = False
    text_sees_image = True

    def matches(self, pipe: Any) -> bool:
        """Whether the class, or one that it derives from, is one of ``pipelines``."""
        return any(cls.__name__ in self.pipelines for cls in type(pipe).__mro__)

    def arguments(self, how: Encoding) -> dict[str, Any]:
        """``max_sequence_length``."""
        return {} if how.max_sequence_length is None else {"max_sequence_length": how.max_sequence_length}

    def grid(self, pipe: Any) -> Grid:
        """Image positions of a block for latents of a size."""
        side = int(self.denoiser(pipe).config.patch_size)

        def cells(size: tuple[int, int]) -> tuple[int, int]:
            return size[0] // side, size[1] // side

        return cells

    def sites(self, pipe: Any, names: Sequence[str] | None = None) -> Sites:
        """Joint attention of all blocks whose text goes on, or of exactly ``names``."""
        denoiser = self.denoiser(pipe)
        layers = {
            f"transformer_blocks.{number}.attn": block.attn
            for number, block in enumerate(denoiser.transformer_blocks)
            if getattr(block.attn, "to_add_out", None) is not None
        }
        missing = [name for name in names or () if name not in layers]
        if missing:
            raise ModelError(
                f"the denoiser has no joint-attention layer {missing[0]} ({len(missing)} of {len(names or ())} are "
                f"missing); it has {len(layers)}, e.g. {next(iter(layers), 'none')}. The token was made for another "
                "architecture."
            )
        if not layers:
            raise ModelError("the denoiser has no joint attention, so there is nothing to read a concept from.")
        chosen = {name: layers[name] for name in names or layers}
        width, grid, start, found = sum(layer.inner_dim for layer in chosen.values()), self.grid(pipe), 0, []
        for name, layer in chosen.items():
            found.append(JointAttention(name, layer, slice(start, start + layer.inner_dim), width, grid))
            start += layer.inner_dim
        return Sites(found)

    def rows(self, pipe: Any, texts: list[str], how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(B, L, d) what attention gives out at each token of the texts, site by site, of root mean square 1.

        In output space a text's rows depend on the image that it is looked up in: ``seen``, or nothing but noise.
        """
        sites = self.sites(pipe)
        seen = seen or self._nothing(pipe)
        parts: dict[str, Tensor] = {}
        found = []
        with ExitStack() as stack:
            for name, site in sites.items():
                handle = site.layer.to_add_out.register_forward_pre_hook(_keeper(parts, name))  # type: ignore[attr-defined]
                stack.callback(handle.remove)
            for start in range(0, len(texts), _ROWS_AT_ONCE):
                chunk = texts[start : start + _ROWS_AT_ONCE]
                count = len(chunk)
                latents = seen.latents.expand(count, *seen.latents.shape[1:])
                self.predict(pipe, latents, seen.timestep.expand(count), self.encode_prompt(pipe, chunk, how))
                found.append(torch.cat([normalised(parts[name]) for name in sites], -1))
        return torch.cat(found)

    def text_rows(self, pipe: Any, texts: list[str], how: Encoding = PLAIN) -> Tensor:
        """(N, d) rows of some texts together, without the one that starts each."""
        return self.rows(pipe, texts, how)[:, 1:].flatten(0, 1)

    def _nothing(self, pipe: Any) -> Seen:
        """Noise, as the denoiser gets it."""
        denoiser, schedule, side = self.denoiser(pipe), self.noise(pipe), self.side(pipe)
        empty = torch.zeros(1, self.channels(pipe), side, side, device=denoiser.device, dtype=denoiser.dtype)
        timesteps = schedule.timesteps(torch.tensor([LOOKED_FROM], dtype=torch.float64))
        return Seen(schedule.noised(empty, noise_like(empty, _SEED), timesteps), timesteps[0])

    def side(self, pipe: Any) -> int:
        """Cells of the latents of the model's own size."""
        return int(self.denoiser(pipe).config.sample_size)

    def channels(self, pipe: Any) -> int:
        """Of the latents."""
        return int(pipe.vae.config.latent_channels)

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One plain forward pass."""
        channels = self.channels(pipe)
        if latents.shape[1] != channels:
            raise ModelError(
                f"the denoiser takes {channels} channels, but latents have {latents.shape[1]}; optimise on the "
                "text-to-image model of this family."
            )
        return super().predict(pipe, latents, timesteps, condition)


def _keeper(parts: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        parts[name] = args[0]

    return keep


class _WithSkippedLayers(Batched):
    """`Batched`, beside which skip-layer guidance asks for the conditional half alone, some blocks left out.

    The pipeline adds ``s (eps_p - eps_skip)``, so what a guard made of ``eps_p`` counts there too.
    """

    def is_aside(self, arguments: dict[str, Any], last: Step | None) -> bool:
        """Whether layers are skipped."""
        return arguments.get("skip_layers") is not None


class SD3(JointFamily):
    """Stable Diffusion 3 and 3.5: three text encoders, pooled text, flow matching."""

    name = "sd3"
    pipelines = frozenset(
        {
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        }
    )

    def calls(self, pipe: Any) -> CallLayout:
        """``[unconditional; conditional]`` in one call; those of skip-layer guidance stand beside it."""
        return _WithSkippedLayers(Arguments(sample="hidden_states", mask=None, added=None))

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """(B, L, d) rows of both CLIP encoders side by side, then T5's (zeros without one); pooled text (B, p)."""
        hidden, _, pooled, _ = pipe.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **how.options,
        )
        return Condition(hidden, {"pooled_projections": pooled})

    def encoding(self, pipe: Any, call: Call) -> Encoding:
        """Also how many rows T5 has, or its zeros."""
        num_clip = int(pipe.tokenizer_max_length)
        return super().encoding(pipe, call)._replace(max_sequence_length=call.hidden_states.shape[1] - num_clip)

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """Those that are loaded."""
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        return [encoder for encoder in encoders if encoder is not None]

    def side_multiple(self, pipe: Any) -> int:
        """Patches of the autoencoder's cells."""
        return super().side_multiple(pipe) * int(self.denoiser(pipe).config.patch_size)
