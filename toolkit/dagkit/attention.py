"""Attention maps as pure tensor functions; they know no module.

Terms: a *sequence* is ``[SOT, background.., guideline..]``, rows in the space of ``encoder_hidden_states``; its CAM is
the share of attention that falls on the guideline rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the block every operation keeps its arguments' dtype, whatever ``torch.autocast`` the caller is in."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """(B, N, heads*d_head) -> (B, heads, N, d_head)."""
    return projected.reshape(*projected.shape[:2], heads, -1).transpose(1, 2)


def shares(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """``softmax(q k^T * scale)``: each row's share of attention.

    Args:
        queries: (B, heads, N, d_head), any float dtype; computed in float32.
        keys: (heads, L, d_head).
        scale: the layer's ``1 / sqrt(d_head)``.

    Returns:
        (B, heads, N, L) float32 in [0, 1].
    """
    with without_autocast(queries.device):
        return (queries.float() @ keys.float().transpose(-1, -2) * scale).softmax(-1)


def attention_share(queries: Tensor, keys: Tensor, num_guideline: int, scale: float) -> Tensor:
    """Share of attention on the last ``num_guideline`` rows: `shares`, summed over them.

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
