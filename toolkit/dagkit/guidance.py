"""Guidance equations as pure tensor functions.

All of them change the conditional prediction only. A pipeline computes ``eps = eps_u + s * (eps_p - eps_u)``; a guard
hands it ``eps_p'`` in place of ``eps_p``. The weights of every form are affine and sum to 1, so each holds for
epsilon, v and sample prediction alike, and for any scheduler.

Notation: ``eps_u`` unconditional, ``eps_p`` under the prompt, ``eps_cs`` under the safety prompt, ``eps_0`` where
nothing in particular is asked for, all (B, C, H, W); maps are (B, H, W) and are broadcast over channels. ``eps_0`` is
``eps_u``, unless a negative prompt conditions that: away from a weapon there is no push relative to a negative prompt
"a weapon".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dagkit.errors import required

MASKS: Final = ("sld", "sega")
MEMORY_LEVELS: Final = 0.04
"""After so much of the noise, one step of a run of 25, the share ``memory`` of a gate is left."""
LATE: Final = 0.65
LATEST: Final = 0.5
"""A concept first found between these noise levels is pushed up to twice as hard, as few steps are left for it."""
MOST_REACH: Final = 1.2
"""Longest step times guidance scale up to which a guard does as well as with the settings that it was made for. A step
moves latents by about as much; beyond it more of the concept is drawn in one than the next ones take away."""
REUSE_LEVELS: Final = 0.04
"""For so much of the noise, times ``reuse_steps``, a safety prediction is kept; in few steps it is made anew."""
ROUNDING: Final = 1e-9
"""Of noise levels that are compared."""
REFERENCE_SCALE: Final = 5.0
"""Guidance scale at which the default strength was chosen."""
INSIST_AFTER: Final = 0.15
"""For so much of the noise a sample is pushed before the guard insists."""
INSIST_EVERY: Final = 0.2
"""After so much more of the noise, ``insistence`` is added once."""
AREA_GAIN: Final = 5.0
MAGNITUDE_CAP: Final = 5.0


def edit_gate(cam: Tensor, edit: float, max_area: float = 0.8) -> Tensor:
    """Gate ``M`` of the paper: 1 where CAM >= ``edit``; all 0 where that is more than ``max_area`` of the image.

    In such a step no mode is decided yet, so it is skipped.

    Args:
        cam: (B, H, W) in [0, 1].
        edit: threshold in (0, 1); the paper's is 0.01.
        max_area: share of the image in (0, 1].

    Returns:
        (B, H, W) float32 of 0 and 1.
    """
    gate = (cam >= edit).float()
    return gate * (gate.mean((1, 2), keepdim=True) <= max_area)


def area_scale(cam: Tensor, highlight: float = 0.5, gain: float = AREA_GAIN) -> Tensor:
    """Strengthens guidance with the size of the region that is surely unsafe (DAG, safe self-regulation: area scaler).

    Args:
        cam: (B, H, W) in [0, 1].
        highlight: CAM from which a pixel counts as surely unsafe, in (0, 1).
        gain: ``s_c * H * W`` of the paper, 5 there.

    Returns:
        (B, H, W) float32: ``gain * area / (H * W)`` on each 4-connected component, 0 elsewhere.

    Raises:
        MissingPackage: scipy is not installed.
    """
    ndimage = required("scipy.ndimage")
    scale = torch.zeros(cam.shape, dtype=torch.float32)
    for sample, regions in enumerate((cam >= highlight).cpu().numpy()):
        labels, count = ndimage.label(regions)
        areas = np.bincount(labels.ravel(), minlength=count + 1).astype(np.float32)
        areas[0] = 0.0
        scale[sample] = torch.from_numpy(gain * areas[labels] / labels.size)
    return scale.to(cam.device)


def magnitude_scale(cam: Tensor, edit: float = 0.01, cap: float = MAGNITUDE_CAP) -> Tensor:
    """``min(CAM / edit, cap)``: in [1, cap] inside the gate (DAG, magnitude scaler).

    Args:
        cam: (B, H, W) in [0, 1].
        edit: threshold of the gate, in (0, 1).
        cap: largest value, >= 1; the paper's is 5.

    Returns:
        (B, H, W) float32 in [0, cap].
    """
    return (cam.float() / edit).clamp(max=cap)


def paper_scale(cam: Tensor, edit: float = 0.01, highlight: float = 0.5, max_area: float = 0.8) -> Tensor:
    """``S * M`` of the paper: gate, area scaler and magnitude scaler.

    Inside the gate the area scaler is the larger of the component's value and of the editing region's own
    (``5/(H*W)``, one pixel's worth), so that pixels outside any highlighted component are still edited, weakly.

    Returns:
        (B, H, W) float32 >= 0.
    """
    floor = AREA_GAIN / (cam.shape[-2] * cam.shape[-1])
    area = area_scale(cam, highlight).clamp(min=floor)
    return edit_gate(cam, edit, max_area) * area * magnitude_scale(cam, edit)


def soft_gate(cam: Tensor, edit: float, highlight: float, dilation: int = 0, least: Tensor | None = None) -> Tensor:
    """Ramp from 0 at ``edit`` to 1 at ``highlight``, grown by ``dilation`` cells (maximum over a square).

    Args:
        cam: (B, H, W) in [0, 1].
        edit: lower end, >= 0 and below ``highlight``.
        highlight: upper end, in (0, 1].
        dilation: cells, >= 0.
        least: (B,) in [0, 1], what the upper end of each sample is at least; the lower end rises alike.

    Returns:
        (B, H, W) float32 in [0, 1].
    """
    rise = 1.0 if least is None else (least / highlight).clamp(min=1)[:, None, None]
    gate = ((cam.float() - rise * edit) / (rise * max(highlight - edit, 1e-6))).clamp(0, 1)
    if dilation:
        gate = F.max_pool2d(gate[:, None], 2 * dilation + 1, stride=1, padding=dilation)[:, 0]
    return gate


def remember(gate: Tensor, last: Tensor, memory: float, elapsed: float) -> Tensor:
    """``max(gate, memory ** (elapsed / 0.04) * last)``: what was pushed out does not grow again once it is not seen.

    Counted in noise levels, so that runs of many and of few steps remember equally long.

    Args:
        gate: (B, H, W) in [0, 1], of this call.
        last: (B, H, W) in [0, 1], what this function returned in the call before.
        memory: share that is left after ``MEMORY_LEVELS``, in [0, 1].
        elapsed: noise levels since the call before, >= 0; Heun's second calls may have 0.

    Returns:
        (B, H, W) in [0, 1].
    """
    return torch.maximum(gate, memory ** (elapsed / MEMORY_LEVELS) * last)


def insist(insistence: float, elapsed: float) -> float:
    """``1 + insistence * max(elapsed - 0.15, 0) / 0.2``: factor of the push where a concept stays in spite of it.

    So the push may be gentle for all, and is stronger for the few that need more.

    Args:
        insistence: >= 0; 0 never insists, 1 is dagkit's own.
        elapsed: noise levels since the guard began to push this sample, >= 0.

    Returns:
        >= 1.
    """
    return 1 + insistence * max(elapsed - INSIST_AFTER, 0.0) / INSIST_EVERY


def hurry(since: float) -> float:
    """``1 + clamp((0.65 - since) / 0.15, 0, 1)``: factor of the push where a concept is first found late.

    In image-to-image the picture that a run starts from may show it, with few steps left to draw it anew.

    Args:
        since: noise level at which the guard began to push this sample.
    """
    return 1 + min(max((LATE - since) / (LATE - LATEST), 0.0), 1.0)


def reach(guidance_scale: float) -> float:
    """``max(1, 5 / guidance_scale)``: factor of the push, so that it does not fade where the pipeline guides weakly.

    The pipeline multiplies whatever a guard adds to ``eps_p`` by its guidance scale; with this factor a push reaches as
    far as at scale 5 at least.

    Args:
        guidance_scale: of the pipeline, > 1.
    """
    return max(1.0, REFERENCE_SCALE / guidance_scale)


def is_acting(level: float, schedule: Sequence[float], max_level: float) -> bool:
    """Whether more than half of the step that begins at a noise level lies at or below ``max_level``.

    So runs of few steps do not lose a whole long step to a first level that lies a little above.

    Args:
        level: of this call.
        schedule: noise levels of the run, falling; the last is where it ends.
        max_level: from which the guard acts.
    """
    following = next((other for other in schedule if other < level), level)
    return min(level, (level + following) / 2) <= max_level + ROUNDING


def score(cam: Tensor, min_area: float) -> Tensor:
    """Safety score of each image: the largest CAM value that at least ``min_area`` of the image reaches.

    So ``score >= highlight`` holds exactly where the highlighted area is at least ``min_area``.

    Args:
        cam: (B, H, W) in [0, 1].
        min_area: share of the image in [0, 1]; at least one cell is always asked for.

    Returns:
        (B,) float32 in [0, 1].
    """
    flat = cam.flatten(1)
    rank = min(max(math.ceil(min_area * flat.shape[1] - 1e-6), 1), flat.shape[1])
    return flat.topk(rank, dim=1).values[:, -1]


def subtract(eps_p: Tensor, eps_0: Tensor, eps_cs: Tensor, scale: Tensor) -> Tensor:
    """``eps_p - scale * (eps_cs - eps_0)``: pushes away from the safety condition (DAG, with ``paper_scale``).

    Args:
        eps_p: (B, C, H, W).
        eps_0: (B, C, H, W).
        eps_cs: (B, C, H, W).
        scale: (B, H, W), or (B, C, H, W) with a mask of SLD or SEGA, >= 0; the paper's values stay below 25.
    """
    scale = scale if scale.dim() == eps_p.dim() else scale[:, None]
    return eps_p - scale.to(eps_p.dtype) * (eps_cs - eps_0)


def drop(eps_p: Tensor, eps_0: Tensor, eps_cs: Tensor, gate: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """``eps_p - gate * ((eps_p - eps_0) + strength * (eps_cs - eps_0))``: the prompt's own push is dropped as well.

    With gate 1 the guided result is ``eps_u + s * (eps_0 - eps_u) - s * strength * (eps_cs - eps_0)``: there the prompt
    has no say, as if it were empty. This is dagkit's own form; 0.5 to 10 is the usual range of ``strength``.

    Args:
        eps_p: (B, C, H, W).
        eps_0: (B, C, H, W).
        eps_cs: (B, C, H, W).
        gate: (B, H, W) in [0, 1].
        strength: >= 0, or (B,) one for each sample.
    """
    gate = gate[:, None].to(eps_p.dtype)
    if isinstance(strength, Tensor):
        strength = strength[:, None, None, None].to(eps_p.dtype)
    return eps_p - gate * ((eps_p - eps_0) + strength * (eps_cs - eps_0))


def combine(eps_p: Tensor, eps_0: Tensor, guided: Sequence[Tensor], gates: Sequence[Tensor | None]) -> Tensor:
    """Several guards at once: ``eps_p - max_i gate_i * (eps_p - eps_0) - sum_i push_i``.

    The prompt's own push is dropped once, by the largest gate, and the pushes away from the safety conditions,
    ``push_i = eps_p - gate_i * (eps_p - eps_0) - guided_i``, add up. So the order of guards does not matter, and one
    alone gives ``guided_0``.

    Args:
        eps_p: (B, C, H, W), or (C, H, W) of one sample.
        eps_0: as ``eps_p``.
        guided: what each guard alone makes of ``eps_p``, as ``eps_p``.
        gates: each guard's gate, (B, H, W) or (H, W) in [0, 1], as of ``drop``; None where it drops nothing.

    Returns:
        As ``eps_p``, in float32 or the predictions' own dtype if that is wider.
    """
    dtype = torch.promote_types(eps_p.dtype, torch.float32)
    eps_p, eps_0 = eps_p.to(dtype), eps_0.to(dtype)
    open_gates = [gate.to(dtype) for gate in gates if gate is not None]
    dropped = torch.stack(open_gates).amax(0) - torch.stack(open_gates).sum(0) if open_gates else None
    total = eps_p + torch.stack([one.to(dtype) - eps_p for one in guided]).sum(0)
    return total if dropped is None else total - dropped.unsqueeze(-3) * (eps_p - eps_0)


class Form(NamedTuple):
    """How a guard decides and guides; `FORMS` holds them by name.

    Attributes:
        is_timed: it acts on a sample that it is certain of, from the token's ``max_level`` down and from then on, with
            memory and insistence, by `soft_gate`; else by `paper_scale` of each step alone.
        is_dropping: it leaves out the prompt's own push as well (`drop`); else it only pushes away (`subtract`).
    """

    is_timed: bool
    is_dropping: bool


FORMS: Final = {
    "drop": Form(is_timed=True, is_dropping=True),
    "paper": Form(is_timed=False, is_dropping=False),
    "subtract": Form(is_timed=True, is_dropping=False),
}


class SLDPreset(NamedTuple):
    """Constants of Safe Latent Diffusion; see ``sld``."""

    guidance_scale: float
    warmup_steps: int
    threshold: float
    momentum_scale: float
    momentum_beta: float


SLD_PRESETS: Final = {
    "weak": SLDPreset(20, 15, 0.0, 0.0, 0.0),
    "medium": SLDPreset(1000, 10, 0.01, 0.3, 0.4),
    "strong": SLDPreset(2000, 7, 0.025, 0.5, 0.7),
    "max": SLDPreset(5000, 0, 1.0, 0.5, 0.7),
}
"""Constants of Schramowski et al. (CVPR 2023, arXiv 2211.05105), as diffusers ships them."""


def sld_mask(eps_p: Tensor, eps_cs: Tensor, guidance_scale: float, threshold: float) -> Tensor:
    """SLD's element-wise scale (arXiv 2211.05105, section 3).

    ``min(|eps_p - eps_cs| * guidance_scale, 1)`` where ``eps_p - eps_cs < threshold``, 0 elsewhere: there the prompt
    leads away from the concept already.

    Args:
        eps_p: (B, C, H, W).
        eps_cs: (B, C, H, W).
        guidance_scale: >= 0; 20 to 5000 in ``SLD_PRESETS``.
        threshold: 0 to 1 in ``SLD_PRESETS``.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    difference = eps_p - eps_cs
    scale = torch.clamp(difference.abs() * guidance_scale, max=1.0)
    return torch.where(difference >= threshold, torch.zeros_like(scale), scale)


def sld(
    eps_p: Tensor, eps_0: Tensor, eps_cs: Tensor, momentum: Tensor, preset: SLDPreset, step: int
) -> tuple[Tensor, Tensor]:
    """Safe Latent Diffusion (arXiv 2211.05105, section 3): a global push away, with momentum.

    With ``mask`` of ``sld_mask``, from ``warmup_steps`` on::

        push      = mask * (eps_cs - eps_0) + momentum_scale * momentum
        eps_p'    = eps_p - push
        momentum' = momentum_beta * momentum + (1 - momentum_beta) * push

    Before, ``eps_p`` stays, while momentum builds up. Usual ranges, as in ``SLD_PRESETS``: ``guidance_scale`` 20 to
    5000, ``warmup_steps`` 0 to 15, ``threshold`` 0 to 1, ``momentum_scale`` 0 to 0.5, ``momentum_beta`` 0 to 0.7.

    Args:
        eps_p: (B, C, H, W).
        eps_0: (B, C, H, W).
        eps_cs: (B, C, H, W).
        momentum: (B, C, H, W), zeros at the first step.
        preset: constants.
        step: denoiser call of this run, from 0; guidance starts at ``preset.warmup_steps``.

    Returns:
        The changed ``eps_p`` and the next momentum.
    """
    mask = sld_mask(eps_p, eps_cs, preset.guidance_scale, preset.threshold)
    push = (eps_cs - eps_0) * mask + preset.momentum_scale * momentum
    momentum = preset.momentum_beta * momentum + (1 - preset.momentum_beta) * push
    return (eps_p - push if step >= preset.warmup_steps else eps_p), momentum


class SEGAPreset(NamedTuple):
    """Constants of Semantic Guidance; see ``sega``. The defaults are diffusers'."""

    edit_guidance_scale: float = 5.0
    warmup_steps: int = 10
    threshold: float = 0.9
    momentum_scale: float = 0.1
    momentum_beta: float = 0.4


def sega_mask(push: Tensor, threshold: float) -> Tensor:
    """SEGA's mask: 1 on the largest ``1 - threshold`` share of a push's sizes, per sample and channel, else 0.

    ``|push| >= quantile(|push|, threshold)`` (arXiv 2301.12247, section 3).

    Args:
        push: (B, C, H, W); a factor on it changes nothing.
        threshold: in [0, 1]; 0.9 to 0.99 is usual.

    Returns:
        (B, C, H, W) bool.
    """
    size = push.abs()
    cut = torch.quantile(size.flatten(2).float(), threshold, dim=2).to(push.dtype)
    return size >= cut[..., None, None]


def sega(
    eps_p: Tensor, eps_0: Tensor, eps_cs: Tensor, momentum: Tensor, preset: SEGAPreset, step: int, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Semantic Guidance away from one concept (Brack et al., NeurIPS 2023, arXiv 2301.12247, section 3).

    With ``mask`` of ``sega_mask``, after ``warmup_steps``::

        push      = mask * edit_guidance_scale * (eps_0 - eps_cs) + momentum_scale * momentum
        eps_p'    = eps_p + push / guidance_scale
        momentum' = momentum_beta * momentum + (1 - momentum_beta) * push

    Before, ``eps_p`` stays, while momentum builds up, as in diffusers. SEGA adds its push beside classifier-free
    guidance, hence the division. Usual ranges: ``edit_guidance_scale`` 3 to 20, ``warmup_steps`` 0 to 20,
    ``threshold`` 0.9 to 0.99, ``momentum_scale`` 0 to 1, ``momentum_beta`` 0 to 0.9.

    Args:
        eps_p: (B, C, H, W).
        eps_0: (B, C, H, W).
        eps_cs: (B, C, H, W).
        momentum: (B, C, H, W), zeros at the first step.
        preset: constants.
        step: denoiser call of this run, from 0; guidance starts at ``preset.warmup_steps``.
        guidance_scale: the pipeline's, > 1.

    Returns:
        The changed ``eps_p`` and the next momentum.
    """
    push = preset.edit_guidance_scale * (eps_0 - eps_cs)
    push = torch.where(sega_mask(push, preset.threshold), push, torch.zeros_like(push))
    push = push + preset.momentum_scale * momentum
    momentum = preset.momentum_beta * momentum + (1 - preset.momentum_beta) * push
    return (eps_p + push / guidance_scale if step >= preset.warmup_steps else eps_p), momentum
