"""Transformers whose blocks attend to the text: PixArt-alpha, PixArt-Sigma and Sana."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dagkit import attention
from dagkit.errors import ModelError
from dagkit.models.base import PLAIN, Encoding, Family, Seen
from dagkit.models.calls import Arguments, Batched, CallLayout, Condition, refuse_caches
from dagkit.models.cross_attention import CrossAttention, Grid, layers_of, scaled_lora
from dagkit.models.quantised import compute_dtype
from dagkit.models.sites import Site, Sites
from dagkit.models.unet import encode_with


class Caption:
    """What a denoiser makes of the text before its blocks see it, the same for all of them.

    A concept's rows are text-encoder rows and go this way as the prompt does, so that phrases can start an
    optimisation, a token is as wide as the text, and a LoRA on the way changes both alike.

    Args:
        modules: called one after the other; none where blocks see the text itself.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)

    def __call__(self, rows: Tensor, lora_scale: float = 1.0) -> Tensor:
        """(L, d) rows as the blocks get them, (L, inner)."""
        for module in self.modules:
            with scaled_lora(module, lora_scale):
                rows = module(rows.to(compute_dtype(module, rows.dtype)))
        return rows

    @cached_property
    def in_float32(self) -> Caption:
        """The same computing in float32: itself, or one copy for all sites."""
        if all(compute_dtype(module, torch.float32) == torch.float32 for module in self.modules):
            return self
        return Caption([deepcopy(module).float() for module in self.modules])


class CaptionAttention(CrossAttention):
    """Cross-attention to text that a `Caption` was made of; queries and keys may be normalised over all heads at once.

    Args:
        name: of the layer.
        layer: the module.
        grid: (h, w) of its queries for latents of a size.
        caption: of the denoiser.
        width: of the text-encoder's rows.
    """

    def __init__(self, name: str, layer: Any, grid: Grid, caption: Caption, width: int) -> None:
        super().__init__(name, layer, grid)
        self.caption, self._width = caption, width

    @property
    def tapped(self) -> nn.Module:
        """``norm_q`` where there is one, else ``to_q``."""
        norm: nn.Module | None = getattr(self.layer, "norm_q", None)
        return super().tapped if norm is None else norm

    @property
    def width(self) -> int:
        """Of ``encoder_hidden_states``, before the caption's projection."""
        return self._width

    def project(self, rows: Tensor, lora_scale: float = 1.0) -> Tensor:
        """``to_k``, and ``norm_k`` where there is one, of the rows' caption."""
        keys = super().project(self.caption(rows, lora_scale), lora_scale)
        norm = getattr(self.layer, "norm_k", None)
        if norm is None:
            return keys
        return attention.split_heads(norm(keys.transpose(0, 1).flatten(1)[None]), len(keys))[0]

    def check_norms(self) -> None:
        """Refuses norms of single heads: they come after the heads are split, where nothing is tapped."""
        norms = [getattr(self.layer, name, None) for name in ("norm_q", "norm_k")]
        whole = (int(self.layer.to_k.out_features),)
        if any(norm is None or tuple(getattr(norm.weight, "shape", ())) != whole for norm in norms):
            super().check_norms()

    @property
    def weighed(self) -> list[nn.Module]:
        """The modules of the layer alone that decide what rows mean here."""
        norm = getattr(self.layer, "norm_k", None)
        return [self.projection, *([] if norm is None else [norm])]

    def in_float32(self) -> CaptionAttention:
        """The layer itself where all is float32, else copies."""
        layer = super().in_float32().layer
        if layer is self.layer and self.caption.in_float32 is self.caption:
            return self
        return CaptionAttention(self.name, layer, self._grid, self.caption.in_float32, self._width)


class Guided(Batched):
    """``[unconditional; conditional]`` in one call of a transformer."""

    def check(self, pipe: Any, denoiser: Any) -> None:
        """Refuses caches as well.

        Raises:
            GuardError: the denoiser keeps parts of its output, or there is no classifier-free guidance.
        """
        refuse_caches(denoiser)
        super().check(pipe, denoiser)


class Untold(Guided):
    """The same of a pipeline whose guidance scale is known to its ``__call__`` alone: PixArt."""

    def is_guided(self, pipe: Any) -> bool:
        """Whether the scale of the run that is under way is above 1."""
        scale = self.guidance_scale(pipe)
        return scale is None or scale > 1

    def guidance_scale(self, pipe: Any) -> float | None:
        """That with which the pipeline, which is calling its denoiser, was called; None where nobody called it."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
                scale = frame.f_locals.get("guidance_scale")
                return None if scale is None else float(scale)
            frame = frame.f_back
        return None


class DiTFamily(Family):
    """Base of families whose denoiser is a stack of ``transformer_blocks`` with cross-attention (``attn2``)."""

    pipelines: ClassVar[frozenset[str]]
    """Pipeline classes whose batch is ``[unconditional; conditional]``."""

    way_of_text: ClassVar[Sequence[str]]
    """What of the denoiser the text passes before the blocks."""

    def matches(self, pipe: Any) -> bool:
        """Whether the class, or one that it derives from, is one of ``pipelines``, and the denoiser such a stack."""
        return any(cls.__name__ in self.pipelines for cls in type(pipe).__mro__) and hasattr(
            self.denoiser(pipe), "transformer_blocks"
        )

    def sites(self, pipe: Any, names: Sequence[str] | None = None) -> Sites:
        """Each block's cross-attention, or exactly ``names``."""
        transformer = self.denoiser(pipe)
        caption, patch = self._caption(pipe), int(transformer.config.patch_size)
        width = int(transformer.config.caption_channels or transformer.config.cross_attention_dim)

        def grid(latent_size: tuple[int, int]) -> tuple[int, int]:
            return latent_size[0] // patch, latent_size[1] // patch

        layers = layers_of(transformer, names)
        return Sites(CaptionAttention(name, layer, grid, caption, width) for name, layer in layers.items())

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Encoding = PLAIN) -> Condition:
        """(B, L, d) hidden states with the mask of what is text, as the pipeline encodes a negative prompt.

        Raises:
            ModelError: the pipeline has no text encoder.
        """
        self.text_encoders(pipe)
        hidden, mask, *_ = encode_with(pipe, prompts, how)
        return Condition(hidden, mask=mask)

    def phrase_rows(self, pipe: Any, phrase: str, how: Encoding = PLAIN, seen: Seen | None = None) -> Tensor:
        """(n, d) rows of the phrase's own tokens, in lower case as these pipelines have them."""
        ids = pipe.tokenizer(phrase.lower().strip(), return_special_tokens_mask=True)
        rows = self.rows(pipe, [phrase], how, seen)[0]
        own = [row for row, is_special in enumerate(ids.special_tokens_mask) if not is_special and row < len(rows)]
        return rows[own or [0]]

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """The one text encoder.

        Raises:
            ModelError: the pipeline was loaded without it.
        """
        if getattr(pipe, "text_encoder", None) is None:
            raise ModelError(
                f"{type(pipe).__name__} has no text encoder, so nobody can tell whose embeddings it is given, and the "
                "safety prompt cannot be encoded. Load the pipeline with it."
            )
        return super().text_encoders(pipe)

    def weighed(self, pipe: Any, sites: Mapping[str, Site]) -> dict[str, list[nn.Module]]:
        """The way of the text to the keys counts, too."""
        own = [module for site in sites.values() if isinstance(site, CaptionAttention) for module in site.weighed]
        return {"text_encoder": self.text_encoders(pipe), "key_projections": [*self._caption(pipe).modules, *own]}

    def side_multiple(self, pipe: Any) -> int:
        """A latent patch of the autoencoder's."""
        return int(pipe.vae_scale_factor) * int(self.denoiser(pipe).config.patch_size)

    def _caption(self, pipe: Any) -> Caption:
        denoiser = self.denoiser(pipe)
        modules = (getattr(denoiser, name, None) for name in self.way_of_text)
        return Caption([module for module in modules if module is not None])


class PixArt(DiTFamily):
    """PixArt-alpha and PixArt-Sigma: T5, whose texts end with a token and start with none; learned variances."""

    name = "pixart"
    has_start = False
    drawing: ClassVar[Mapping[str, Any]] = {"clean_caption": False}  # else it depends on which packages are installed
    pipelines = frozenset({"PixArtAlphaPipeline", "PixArtSigmaPipeline"})
    way_of_text = ("caption_projection",)

    def calls(self, pipe: Any) -> CallLayout:
        """``[unconditional; conditional]`` in one call."""
        return Untold(Arguments(sample="hidden_states"))

    def added_conditions(self, pipe: Any, latents: Tensor, condition: Condition) -> dict[str, Any]:
        """``resolution`` and ``aspect_ratio`` of the latent's own size where the denoiser wants them (alpha 1024)."""
        if not self.denoiser(pipe).use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
        added = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {name: latents.new_tensor(value).expand(len(latents), -1) for name, value in added.items()}


class Sana(DiTFamily):
    """Sana: Gemma, and a deep-compression autoencoder.

    The instruction that ``SanaPipeline`` puts before a prompt (``complex_human_instruction``), whose rows it cuts off
    again, is left out of what dagkit encodes, as the pipeline leaves it out of a negative prompt.
    """

    name = "sana"
    pipelines = frozenset({"SanaPipeline"})
    way_of_text = ("caption_projection", "caption_norm")

    def calls(self, pipe: Any) -> CallLayout:
        """``[unconditional; conditional]`` in one call."""
        scale = float(getattr(self.denoiser(pipe).config, "timestep_scale", 1.0))
        return Guided(Arguments(sample="hidden_states", added=None, timestep_unit=1 / scale))
