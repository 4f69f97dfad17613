"""Cross-attention as a site: diffusers' ``Attention`` with ``to_q`` over the image and ``to_k`` over the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor, nn

from dagkit import attention
from dagkit.errors import GuardError, ModelError
from dagkit.models.quantised import compute_dtype
from dagkit.models.sites import AttentionSite

REQUIRED_ATTRIBUTES: Final = ("to_q", "to_k", "heads", "scale")

Grid = Callable[[tuple[int, int]], tuple[int, int]]


class CrossAttention(AttentionSite):
    """One cross-attention layer: features are its queries, and rows score ``softmax(q k^T / sqrt(d_head))``.

    Args:
        name: of the layer.
        layer: the module.
        grid: (h, w) of its queries for latents of a size.
    """

    def __init__(self, name: str, layer: Any, grid: Grid) -> None:
        self.name, self.layer, self._grid = name, layer, grid

    @property
    def tapped(self) -> nn.Module:
        """``to_q``."""
        projection: nn.Module = self.layer.to_q
        return projection

    @property
    def scale(self) -> float:
        """The layer's."""
        return float(self.layer.scale)

    @property
    def width(self) -> int:
        """Of ``encoder_hidden_states``."""
        return int(self.layer.to_k.in_features)

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """As given."""
        return self._grid(latent_size)

    def project(self, rows: Tensor, lora_scale: float = 1.0) -> Tensor:
        """``to_k`` of the rows, called as a module (LoRA, offload included)."""
        rows = rows[None].to(compute_dtype(self.layer.to_k, rows.dtype))
        if getattr(self.layer, "norm_cross", None) is not None:
            rows = self.layer.norm_encoder_hidden_states(rows)
        with scaled_lora(self.layer.to_k, lora_scale):
            return attention.split_heads(self.layer.to_k(rows), self.num_heads)[0]

    def check(self) -> None:
        """Refuses an attention module whose queries and keys would be misread.

        Raises:
            GuardError: the layer lacks ``to_q``/``to_k``/``heads``/``scale``, or normalises queries or keys.
        """
        kind = type(self.layer).__name__
        missing = [attribute for attribute in REQUIRED_ATTRIBUTES if not hasattr(self.layer, attribute)]
        if missing:
            raise GuardError(
                f"layer {self.name} is a {kind} without {', '.join(missing)}; expected diffusers' Attention. This "
                "model cannot be guarded."
            )
        self.check_norms()

    def check_norms(self) -> None:
        """Refuses queries or keys that are normalised before they are compared.

        Raises:
            GuardError: they are.
        """
        for norm in ("norm_q", "norm_k"):
            if getattr(self.layer, norm, None) is not None:
                raise GuardError(
                    f"layer {self.name} ({type(self.layer).__name__}) uses {norm}; dagkit reads plain queries and "
                    "keys. This model cannot be guarded."
                )

    @property
    def projection(self) -> nn.Module:
        """``to_k``, without a LoRA that is loaded on it."""
        projection: nn.Module = getattr(self.layer.to_k, "base_layer", self.layer.to_k)
        return projection

    def in_float32(self) -> CrossAttention:
        """The layer itself where its keys are float32, else a copy."""
        if self.layer.to_k.weight.dtype == torch.float32:
            return self
        return CrossAttention(self.name, deepcopy(self.layer).float(), self._grid)


def layers_of(denoiser: nn.Module, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The cross-attention layers of a denoiser by name, compiled or not: all of them, or exactly ``names``.

    Raises:
        ModelError: there is none, or one of ``names`` is missing.
    """
    found = {name: module for name, module in denoiser.named_modules() if name.endswith("attn2")}
    layers = {name.removeprefix("_orig_mod."): module for name, module in found.items()}
    if names is None:
        if not layers:
            raise ModelError(
                "the denoiser has no cross-attention layer (attn2), so there is nothing to read a concept from."
            )
        return layers
    missing = [name for name in names if name not in layers]
    if missing:
        raise ModelError(
            f"the denoiser has no cross-attention layer {missing[0]} ({len(missing)} of {len(names)} are missing); it "
            f"has {len(layers)}, e.g. {next(iter(layers), 'none')}. The token was made for another architecture."
        )
    return {name: layers[name] for name in names}


@contextmanager
def scaled_lora(module: nn.Module, scale: float) -> Iterator[None]:
    """Multiplies LoRA layers at and below a module by a scale, as diffusers does, and restores them exactly."""
    layers: list[Any] = [part for part in module.modules() if scale != 1.0 and hasattr(part, "scale_layer")]
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)
