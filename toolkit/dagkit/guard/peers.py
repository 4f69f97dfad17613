"""Peer methods in the same hook form, to compare with and to combine with."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from dagkit import guidance
from dagkit.errors import GuardError
from dagkit.guard.bind import PipelineGuard
from dagkit.guard.session import Change, Context
from dagkit.models import Family


class _GlobalGuard(PipelineGuard):
    """A peer method: every sample, every step, the whole image."""

    def prepare(self, family: Family, pipe: Any) -> None:
        """Looks nowhere."""
        return

    @torch.no_grad()
    def change(self, context: Context) -> Change | None:
        """Runs the safety forward on the whole batch and applies the peer's equation."""
        rows = torch.arange(len(context.eps_p), device=context.eps_p.device)
        eps_cs, eps_0 = context.safety_predictions(rows)
        momentum = context.run.memory.get("momentum")
        momentum = torch.zeros_like(context.eps_p) if momentum is None else momentum
        changed, context.run.memory["momentum"] = self.equation(context, eps_0, eps_cs, momentum)
        return Change(range(len(changed)), changed)

    @abstractmethod
    def equation(self, context: Context, eps_0: Tensor, eps_cs: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """The changed conditional prediction and the next momentum."""


class SLDGuard(_GlobalGuard):
    """Safe Latent Diffusion (arXiv 2211.05105) as a guard, for comparison or beside a ``Guard``.

    Args:
        safety_prompt: text of the concept.
        preset: ``weak``, ``medium``, ``strong`` or ``max``, or constants of one's own.
    """

    def __init__(self, safety_prompt: str, preset: str | guidance.SLDPreset = "strong") -> None:
        if isinstance(preset, str) and preset not in guidance.SLD_PRESETS:
            raise GuardError(f"preset must be one of {', '.join(guidance.SLD_PRESETS)}, but got {preset!r}.")
        self.safety_prompt = safety_prompt
        self.preset = guidance.SLD_PRESETS[preset] if isinstance(preset, str) else preset

    def equation(self, context: Context, eps_0: Tensor, eps_cs: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """SLD's."""
        return guidance.sld(context.eps_p, eps_0, eps_cs, momentum, self.preset, context.run.step)


class SEGAGuard(_GlobalGuard):
    """Semantic Guidance (arXiv 2301.12247) away from one concept, as a guard.

    Args:
        safety_prompt: text of the concept.
        preset: constants; diffusers' defaults where not given.
    """

    def __init__(self, safety_prompt: str, preset: guidance.SEGAPreset | None = None) -> None:
        self.safety_prompt, self.preset = safety_prompt, preset or guidance.SEGAPreset()

    def equation(self, context: Context, eps_0: Tensor, eps_cs: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """SEGA's."""
        return guidance.sega(
            context.eps_p, eps_0, eps_cs, momentum, self.preset, context.run.step, context.guidance_scale
        )
