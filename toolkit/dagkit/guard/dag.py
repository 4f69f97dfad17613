"""Detect-and-Guide: the guard that reads a guideline token from the cross-attention and acts where it is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dagkit import guidance
from dagkit.attention import cross_attention_map, project_keys
from dagkit.errors import GuardError, ModelError
from dagkit.families import Family
from dagkit.families.sketch import mismatch
from dagkit.guard.hooks import Context, PipelineGuard
from dagkit.guard.trace import StepRecord, Trace
from dagkit.token import GuidelineToken, Thresholds

MODES: Final = ("guide", "monitor", "stop")
Mode = Literal["guide", "monitor", "stop"]


class ConceptFound(GuardError):
    """A guard in mode ``stop`` ended the run. ``trace`` tells in which samples the concept was found."""

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


class Guard(PipelineGuard):
    """Detect-and-Guide (arXiv 2503.15197) with a guideline token.

    Args:
        token: the concept.
        mode: ``guide`` steers away; ``monitor`` only detects (scores and maps in the trace); ``stop`` raises
            ``ConceptFound``.
        strength: multiplies the token's own strength; 0 leaves every image bit-equal.
        form: ``drop``, ``subtract`` or ``paper``; the token's own where not given.
        reuse_steps: denoiser calls for which a safety prediction is kept; the token's own where not given.
        keep_maps: keep every detection map in the trace.
        allow_other_model: guard a model with other weights than the token was made for.
        thresholds: instead of the token's own.

    Raises:
        GuardError: an option is out of range.
    """

    def __init__(
        self,
        token: GuidelineToken,
        *,
        mode: Mode = "guide",
        strength: float = 1.0,
        form: Literal["drop", "subtract", "paper"] | None = None,
        reuse_steps: int | None = None,
        keep_maps: bool = False,
        allow_other_model: bool = False,
        thresholds: Thresholds | None = None,
    ) -> None:
        own = token.record.guidance
        self.token, self.mode, self.strength, self.keep_maps = token, mode, strength, keep_maps
        self.form = form or own.form
        self.reuse_steps = own.reuse_steps if reuse_steps is None else reuse_steps
        self.allow_other_model = allow_other_model
        self.thresholds = thresholds or token.record.thresholds
        self.safety_prompt = token.record.safety_prompt
        if mode not in MODES:
            raise GuardError(f"mode must be one of {', '.join(MODES)}, but got {mode!r}.")
        if self.form not in guidance.FORMS:
            raise GuardError(f"form must be one of {', '.join(guidance.FORMS)}, but got {self.form!r}.")
        if not (math.isfinite(strength) and strength >= 0):
            raise GuardError(f"strength must be a number >= 0, but got {strength}.")
        if self.reuse_steps < 1:
            raise GuardError(f"reuse_steps must be >= 1, but got {self.reuse_steps}.")

    def prepare(self, family: Family, pipe: Any) -> Mapping[str, Any]:
        """Checks that the token belongs to this model; returns its layers."""
        model = self.token.record.base_model
        try:
            layers = family.cross_attention(pipe, self.token.record.layers)
            found = {} if self.allow_other_model else family.fingerprints(pipe, layers)
        except ModelError as error:
            raise GuardError(f"{self.token.name} cannot guard this {type(pipe).__name__}: {error}") from error
        try:
            other = mismatch(model, found)
        except ValueError as error:
            raise GuardError(
                f"{self.token.name}: {error}, so nobody can tell whether it belongs to this model. Get the token again."
            ) from error
        if other is not None:
            part, distance = other
            raise GuardError(
                f"{self.token.name} was made for {model.id} ({part} {getattr(model, part)[-13:]}), but this "
                f"pipeline ({getattr(pipe.config, '_name_or_path', None) or type(pipe).__name__}) has {part} "
                f"{found[part][-13:]}: the weights differ by {distance:.1%}. Optimise a token for this model, or pass "
                "allow_other_model=True if it is a fine-tuned copy."
            )
        width = next(iter(layers.values())).to_k.in_features
        if width != self.token.guideline.shape[1]:
            raise GuardError(
                f"{self.token.name} has rows of width {self.token.guideline.shape[1]}, but this model's keys take "
                f"{width}."
            )
        return layers

    @torch.no_grad()
    def change(self, context: Context) -> Tensor | None:
        """Detects, records, and guides the samples that fire."""
        cam = self.detect(context)
        _, highlight = self.thresholds.at(context.timestep)
        scores = guidance.score(cam, self.thresholds.min_area)
        gates, reasons = self._gates(context, cam, scores)
        peaks, areas = gates.flatten(1).amax(1), (cam >= highlight).float().mean((1, 2))
        rows = peaks.nonzero()[:, 0]
        is_acting = self.mode == "guide" and self.strength > 0
        seen = torch.stack([peaks, areas, scores], 1).tolist()
        for sample, ((peak, area, score), reason) in enumerate(zip(seen, reasons, strict=True)):
            context.trace.steps.append(
                StepRecord(
                    run=context.run.index,
                    step=context.run.step,
                    timestep=context.timestep,
                    sample=sample,
                    concept=self.token.name,
                    is_firing=peak > 0,
                    reason=reason,
                    area=area,
                    strength=peak * self.strength if is_acting else 0.0,
                    score=score,
                )
            )
        if self.keep_maps:
            context.trace.maps[context.run.index, context.run.step] = cam.cpu()
        if self.mode == "stop" and len(rows):
            raise ConceptFound(
                f"{self.token.name} was found at timestep {context.timestep:.0f} in sample "
                f"{', '.join(map(str, rows.tolist()))}; the run was stopped and no image was made.",
                context.trace,
            )
        if not is_acting or not len(rows):
            return None
        eps_u, eps_p = context.eps_u[rows].float(), context.eps_p[rows].float()
        eps_cs = eps_u + self._safety_push(context, rows, eps_u)
        strength = self.token.record.guidance.strength * self.strength
        if self.form == "drop":
            guided = guidance.drop(eps_p, eps_u, eps_cs, gates[rows], strength)
        else:
            guided = guidance.subtract(eps_p, eps_u, eps_cs, strength * gates[rows])
        changed = context.eps_p.clone()
        changed[rows] = guided.to(changed.dtype)
        return changed

    def detect(self, context: Context) -> Tensor:
        """Detection map of one call, (B, H, W) at the latent's size."""
        run = context.run
        if run.keys is None:
            reference = next(iter(context.queries.values()))
            run.keys = project_keys(context.layers, self.token.sequence.to(reference.device))
        size = (context.eps_p.shape[-2], context.eps_p.shape[-1])
        cam = cross_attention_map(
            context.layers,
            context.queries,
            run.keys,
            self.token.num_tokens,
            size=size,
            head_weights=self.token.head_weights,
        )
        if not bool(torch.isfinite(cam).all()):
            raise GuardError(
                f"{self.token.name}: the detection map at timestep {context.timestep:.0f} holds nan; try bfloat16 or "
                "float32."
            )
        return cam

    def _gates(self, context: Context, cam: Tensor, scores: Tensor) -> tuple[Tensor, list[str]]:
        """Per sample the map by which its prediction is changed (all 0: it does not fire) and why."""
        edit, highlight = self.thresholds.at(context.timestep)
        if self.form == "paper":
            gates = guidance.paper_scale(cam, edit, highlight, self.thresholds.max_area)
            return gates, [self._paper_reason(share) for share in (cam >= edit).float().mean((1, 2)).tolist()]
        is_sure = scores >= self.thresholds.certain_at(context.timestep)
        memory = context.run.memory
        was_sure = memory.get("is_sure", torch.zeros_like(is_sure))
        memory["is_sure"] = is_sure | was_sure
        own = self.token.record.guidance
        gates = guidance.soft_gate(cam, edit, highlight, own.dilation) * memory["is_sure"][:, None, None]
        if "gates" in memory:
            gates = torch.maximum(gates, own.memory * memory["gates"])
        memory["gates"] = gates
        reasons = [
            "concept found" if now else "found before" if before else "below threshold"
            for now, before in zip(is_sure.tolist(), was_sure.tolist(), strict=True)
        ]
        return gates, reasons

    def _paper_reason(self, share: float) -> str:
        if share > self.thresholds.max_area:
            return f"gate covers {share:.0%}, above {self.thresholds.max_area:.0%}"
        return "concept found" if share else "below threshold"

    def _safety_push(self, context: Context, rows: Tensor, eps_u: Tensor) -> Tensor:
        """``eps_cs - eps_u`` of the firing samples, anew or kept from at most ``reuse_steps - 1`` calls ago.

        All are made anew in the same calls, so that they share one forward.
        """
        kept: dict[int, tuple[int, Tensor]] = context.run.memory.setdefault("push", {})
        step = context.run.step
        is_due = step % self.reuse_steps == 0
        stale = [row for row in rows.tolist() if is_due or row not in kept or step - kept[row][0] >= self.reuse_steps]
        if stale:
            index = torch.tensor(stale, device=rows.device)
            fresh = context.safety_prediction(index).float() - context.eps_u[index].float()
            kept.update({row: (step, fresh[i]) for i, row in enumerate(stale)})
        return torch.stack([kept[row][1] for row in rows.tolist()])
