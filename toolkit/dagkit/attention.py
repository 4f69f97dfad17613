"""Cross-attention maps (CAMs) of a guideline token, read from the queries of a denoiser's ordinary forward pass.

Terms: a *layer* is a cross-attention module ``attn2`` of the denoiser with ``to_q``, ``to_k``, ``heads`` and ``scale``;
a *sequence* is ``[SOT, background.., guideline..]``, rows in the space of ``encoder_hidden_states``; its CAM is the
share of attention that falls on the guideline rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available

from dagkit.errors import GuardError

REQUIRED_ATTRIBUTES = ("to_q", "to_k", "heads", "scale")


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuses an attention module whose queries and keys dagkit would misread.

    Raises:
        GuardError: the layer lacks ``to_q``/``to_k``/``heads``/``scale``, or normalises queries or keys.
    """
    kind = type(layer).__name__
    missing = [attribute for attribute in REQUIRED_ATTRIBUTES if not hasattr(layer, attribute)]
    if missing:
        raise GuardError(
            f"layer {name} is a {kind} without {', '.join(missing)}; expected diffusers' Attention. This model "
            "cannot be guarded."
        )
    for norm in ("norm_q", "norm_k"):
        if getattr(layer, norm, None) is not None:
            raise GuardError(
                f"layer {name} ({kind}) uses {norm}; dagkit reads plain queries and keys. This model cannot be guarded."
            )


class _Store:
    """What the hooks write to; it refers to no module, so that torch.compile can trace the hooks."""

    def __init__(self) -> None:
        self.is_recording = False
        self.queries: dict[str, Tensor] = {}
        self.num_calls: dict[str, int] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if self.is_recording:
                self.queries[name] = output
                self.num_calls[name] = self.num_calls.get(name, 0) + 1

        return keep

    def clear(self) -> None:
        self.queries, self.num_calls = {}, {}


class QueryTap:
    """Keeps the queries of chosen cross-attention layers while it is open and recording.

    Args:
        layers: name -> attention module.

    The ``to_q`` output itself is untouched, so a tapped forward is bit-equal to a plain one. Works with SDPA, attention
    slicing, fused projections, LoRA layers, offloading and reduced precision, because it hooks the projection only.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            check_layer(name, layer)
        self.layers = dict(layers)
        self._store = _Store()
        self._handles: dict[str, tuple[nn.Module, Any]] = {}

    def __enter__(self) -> Self:
        self._hook()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._store.is_recording = False
        self._store.clear()

    def _hook(self) -> None:
        """Hooks every ``to_q``; again where a LoRA layer or a fusion replaced the module since the last call."""
        for name, layer in self.layers.items():
            projection: Any = layer.to_q
            known = self._handles.get(name)
            if known is not None and known[0] is projection:
                continue
            if known is not None:
                known[1].remove()
            self._handles[name] = (projection, projection.register_forward_hook(self._store.hook(name)))

    def start(self) -> None:
        """Forgets old queries and records those of the next forward pass."""
        self._hook()
        self._store.clear()
        self._store.is_recording = True

    def stop(self, batch: int, num_positions: Mapping[str, int]) -> dict[str, Tensor]:
        """Ends recording and returns name -> queries (B, h*w, heads*d_head), in the denoiser's dtype.

        Args:
            batch: B, rows of the denoiser call.
            num_positions: name -> h*w, image positions of each layer (``Family.num_positions``).

        Raises:
            GuardError: a layer was not seen, e.g. because a compiled graph from before the hooks was run; or what was
                seen cannot be the queries of all rows at all positions of the image.
        """
        self._store.is_recording = False
        queries, calls = self._store.queries, self._store.num_calls
        self._store.clear()
        missing = [name for name in self.layers if name not in queries]
        if missing:
            raise GuardError(
                f"queries of {len(missing)} of {len(self.layers)} layers were not seen (first: {missing[0]}). A "
                "model compiled before the guard was attached skips new hooks: call torch._dynamo.reset() and "
                "attach again."
            )
        for name, layer in self.layers.items():
            shape, expected = tuple(queries[name].shape), (batch, num_positions[name])
            if calls[name] != 1 or len(shape) != 3 or shape[:2] != expected:
                processor = type(getattr(layer, "processor", None)).__name__
                raise GuardError(
                    f"layer {name} with processor {processor} projected queries {calls[name]} times, last of shape "
                    f"{shape}; expected once, of shape ({expected[0]}, {expected[1]}, channels): all rows at all "
                    "positions of the image. What it attends with cannot be told, so it is not guarded. Use diffusers' "
                    "own attention processors, without token merging."
                )
        return {name: queries[name] for name in self.layers}


def grid(num_queries: int, height: int, width: int) -> tuple[int, int]:
    """Finds the (h, w) grid of a layer with h*w queries in a U-Net whose latent is (height, width).

    Each level halves both sides, rounding up.

    Raises:
        GuardError: no level has that many positions.
    """
    h, w = height, width
    while True:
        if h * w == num_queries:
            return h, w
        if h * w < num_queries or (h == 1 and w == 1):
            raise GuardError(
                f"{num_queries} queries fit no level of a {height}x{width} latent; this denoiser is no plain U-Net."
            )
        h, w = math.ceil(h / 2), math.ceil(w / 2)


def project_keys(layers: Mapping[str, Any], sequence: Tensor, lora_scale: float = 1.0) -> dict[str, Tensor]:
    """Keys of a sequence at each layer: name -> (heads, L, d_head), by calling ``to_k`` (LoRA, offload included).

    Args:
        layers: name -> attention module.
        sequence: (L, d) rows in the space of ``encoder_hidden_states``; differentiable.
        lora_scale: factor of LoRA layers, as of ``cross_attention_kwargs={"scale": ...}``. A denoiser sets it during
            its forward pass only, so queries and keys would differ without it.
    """
    keys = {}
    with without_autocast(sequence.device):
        for name, layer in layers.items():
            rows = sequence[None].to(_dtype(layer.to_k, sequence.dtype))
            if getattr(layer, "norm_cross", None) is not None:
                rows = layer.norm_encoder_hidden_states(rows)
            with _scaled_lora(layer.to_k, lora_scale):
                keys[name] = split_heads(layer.to_k(rows), layer.heads)[0]
    return keys


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the block every operation keeps its arguments' dtype, whatever ``torch.autocast`` the caller is in."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


@contextmanager
def _scaled_lora(module: nn.Module, scale: float) -> Iterator[None]:
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


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """(B, N, heads*d_head) -> (B, heads, N, d_head)."""
    return projected.reshape(*projected.shape[:2], heads, -1).transpose(1, 2)


def attention_share(queries: Tensor, keys: Tensor, num_guideline: int, scale: float) -> Tensor:
    """Share of attention on the last ``num_guideline`` rows: ``softmax(q k^T * scale)``, summed over them.

    With one guideline row and only SOT beside it this is ``sigmoid(q . (k_c - k_sot) * scale)``: a logistic model per
    head.

    Args:
        queries: (B, heads, N, d_head), any float dtype; computed in float32.
        keys: (heads, L, d_head).
        num_guideline: rows at the end of the sequence that belong to the concept, >= 1.
        scale: the layer's ``1 / sqrt(d_head)``.

    Returns:
        (B, heads, N) float32 in [0, 1].
    """
    size, heads, positions, width = queries.shape
    # the positions of all samples last: float32 is not copied, and softmax and sum run over whole lines of memory
    lines = queries.float().transpose(1, 2).reshape(size * positions, heads, width).permute(1, 2, 0)
    with without_autocast(queries.device):
        share = torch.bmm(keys.float() * scale, lines).softmax(1)[:, -num_guideline:].sum(1)
    return share.reshape(heads, size, positions).transpose(0, 1)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, h, w) maps to (B, *size), without aligned corners."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def cross_attention_map(
    layers: Mapping[str, Any],
    queries: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    num_guideline: int,
    *,
    size: tuple[int, int],
    latent_size: tuple[int, int] | None = None,
    head_weights: Tensor | None = None,
) -> Tensor:
    """Detection map: the CAM of the guideline rows over heads and layers (DAG, detection).

    Per layer and head ``softmax(q k^T / sqrt(d_head))``, summed over the guideline rows; mean (or weighted mean) over
    heads; bilinear resize; mean (or weighted mean) over layers. Layers of one grid are summed before they are resized.

    Args:
        layers: name -> attention module, in the token's order.
        queries: name -> (B, h*w, heads*d_head).
        keys: name -> (heads, L, d_head), from ``project_keys``.
        num_guideline: guideline rows at the end of the sequence.
        size: (H, W) of the result.
        latent_size: (H, W) of the latent, from which each layer's grid follows; ``size`` where not given.
        head_weights: (sum of heads over layers,) float32 >= 0 that sum to 1; None for the paper's plain mean.

    Returns:
        (B, H, W) float32 in [0, 1].
    """
    if not layers:
        raise GuardError("no cross-attention layer was given; expected at least one.")
    height, width = latent_size or size
    heads = [layer.heads for layer in layers.values()]
    if head_weights is None:
        head_weights = torch.cat([torch.full((count,), 1 / (count * len(heads))) for count in heads])
    weights = head_weights.to(next(iter(queries.values())).device, torch.float32)
    pooled: dict[tuple[int, int], Tensor] = {}
    for (name, layer), own in zip(layers.items(), torch.split(weights, heads), strict=True):
        share = attention_share(split_heads(queries[name], layer.heads), keys[name], num_guideline, layer.scale)
        found = (share * own[:, None]).sum(1)
        cells = grid(found.shape[1], height, width)
        pooled[cells] = pooled[cells] + found if cells in pooled else found
    first, *rest = (resize(found.reshape(-1, *cells), size) for cells, found in pooled.items())
    return sum(rest, first)


def word_map(
    layers: Mapping[str, Any],
    queries: Mapping[str, Tensor],
    encoder_hidden_states: Tensor,
    indices: Sequence[int],
    *,
    size: tuple[int, int],
    latent_size: tuple[int, int] | None = None,
) -> Tensor:
    """Attention of the prompt's own tokens at ``indices``: a rough locator that needs no training.

    Args:
        layers: name -> attention module.
        queries: name -> (B, h*w, heads*d_head).
        encoder_hidden_states: (L, d) of the prompt.
        indices: token positions in [0, L).
        size: (H, W) of the result.
        latent_size: (H, W) of the latent; ``size`` where not given.

    Returns:
        (B, H, W) float32 in [0, 1]: mean over layers and heads of the summed share of these tokens.
    """
    chosen = sorted(set(indices))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(encoder_hidden_states):
        raise ValueError(f"indices must be positions in [0, {len(encoder_hidden_states)}), but got {list(indices)}.")
    others = [i for i in range(len(encoder_hidden_states)) if i not in set(chosen)]
    keys = project_keys(layers, encoder_hidden_states[others + chosen])
    return cross_attention_map(layers, queries, keys, len(chosen), size=size, latent_size=latent_size)


def word_indices(tokenizer: Any, prompt: str, words: Iterable[str]) -> list[int]:
    """Token positions in ``tokenizer(prompt)`` of every occurrence of each word (or phrase), without regard to case."""
    ids = [int(i) for i in tokenizer(prompt.lower(), truncation=True).input_ids]
    found: set[int] = set()
    for word in words:
        wanted = [int(i) for i in tokenizer(word.lower(), add_special_tokens=False).input_ids]
        wanted = [i for i in wanted if i not in set(tokenizer.all_special_ids)]
        starts = [i for i in range(len(ids) - len(wanted) + 1) if wanted and ids[i : i + len(wanted)] == wanted]
        found.update(start + k for start in starts for k in range(len(wanted)))
    return sorted(found)


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), default)
