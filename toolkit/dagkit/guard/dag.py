"""Detect-and-Guide: the guard that reads a guideline token from the cross-attention and acts where it is found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, Literal

import torch
from torch import Tensor

from dagkit import guidance
from dagkit.errors import GuardError, ModelError
from dagkit.guard.bind import PipelineGuard
from dagkit.guard.session import Change, Context
from dagkit.guard.trace import StepRecord, Trace
from dagkit.models import Family
from dagkit.models.sites import Detector, Sites
from dagkit.models.sketch import mismatch
from dagkit.token import GuidelineToken, Thresholds

MODES: Final = ("guide", "monitor", "stop")
Mode = Literal["guide", "monitor", "stop"]
_BELOW: Final = "below threshold"


def is_sure(rules: guidance.Form, limits: Thresholds, level: float, peaks: Tensor, scores: Tensor) -> Tensor:
    """(B,) bool: where a guard is sure that it sees the concept.

    Args:
        rules: of its form.
        limits: its thresholds.
        level: noise level.
        peaks: (B,) largest value of each detection map.
        scores: (B,) `dagkit.guidance.score` of each.
    """
    return scores >= limits.certain_at(level) if rules.is_timed else peaks >= limits.at(level)[1]


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
        strength: multiplies the change: below 1 all of it (in the form ``drop`` the gate too, so that the change goes
            to 0 with it), above 1 only the push away from the safety condition. 0 leaves every image bit-equal.
        form: ``drop``, ``subtract`` or ``paper``; the token's own where not given.
        reuse_steps: denoiser calls for which a safety prediction is kept; the token's own where not given.
        keep_maps: keep every detection map in the trace.
        allow_other_model: guard a model with other weights than the token was made for.
        thresholds: instead of the token's own.
        mask: multiplies the push by the mask of ``sld`` (the preset ``strong``) or ``sega`` (diffusers' threshold), as
            the paper does in DAG + SLD; forms ``subtract`` and ``paper`` only.

    Raises:
        GuardError: an option is out of range, or options do not fit each other.
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
        mask: Literal["sld", "sega"] | None = None,
    ) -> None:
        own = token.record.guidance
        self.token, self.mode, self.strength, self.keep_maps = token, mode, strength, keep_maps
        self.form = form or own.form
        self.reuse_steps = own.reuse_steps if reuse_steps is None else reuse_steps
        self.allow_other_model = allow_other_model
        self.thresholds, self.is_calibrated = thresholds or token.record.thresholds, thresholds is None
        self.mask = mask
        self.safety_prompt = token.record.safety_prompt
        if mode not in MODES:
            raise GuardError(f"mode must be one of {', '.join(MODES)}, but got {mode!r}.")
        if self.form not in guidance.FORMS:
            raise GuardError(f"form must be one of {', '.join(guidance.FORMS)}, but got {self.form!r}.")
        self.rules = guidance.FORMS[self.form]
        if not (math.isfinite(strength) and strength >= 0):
            raise GuardError(f"strength must be a number >= 0, but got {strength}.")
        if self.reuse_steps < 1:
            raise GuardError(f"reuse_steps must be >= 1, but got {self.reuse_steps}.")
        if mask is not None and mask not in guidance.MASKS:
            raise GuardError(f"mask must be one of {', '.join(guidance.MASKS)} or None, but got {mask!r}.")
        if mask is not None and self.rules.is_dropping:
            raise GuardError(
                f"mask {mask!r} fits no form {self.form!r}: a mask chooses single values of the push, but the prompt's "
                "own push is dropped in whole cells. Use form='subtract' or 'paper'."
            )
        if not self.rules.is_timed and min(self.thresholds.edit) <= 0:
            raise GuardError(
                f"{token.name}: the form {self.form!r} divides by the edit threshold, which must be above 0, but edit "
                f"is {self.thresholds.edit}. Pass thresholds=, or use another form."
            )

    @property
    def safety_phrases(self) -> tuple[str, ...]:
        """The token's."""
        return self.token.record.pushed_away_from

    def prepare(self, family: Family, pipe: Any) -> Sites:
        """Checks that the token can fire and belongs to this model; returns where it looks."""
        model = self.token.record.base_model
        limits = self.thresholds
        if self.is_calibrated and self.rules.is_timed and min(limits.certain or limits.highlight) >= 1:
            raise GuardError(
                f"{self.token.name} can never be sure: its certainty threshold is 1 at every noise level, so it would "
                "guard nothing. Optimise it on more data, or pass thresholds= to set them yourself."
            )
        try:
            sites = family.sites(pipe, self.token.record.layers)
            found = {} if self.allow_other_model else family.fingerprints(pipe, sites)
        except ModelError as error:
            raise GuardError(f"{self.token.name} cannot guard this {type(pipe).__name__}: {error}") from error
        try:
            other = mismatch(model, found)
        except ValueError as error:
            raise GuardError(
                f"{self.token.name}: {error}, so nobody can tell whether it belongs to this model. Get the token again."
            ) from error
        if other is not None:
            part = other.part
            raise GuardError(
                f"{self.token.name} was made for {model.id} ({part} {getattr(model, part)[-13:]}), but this "
                f"pipeline ({getattr(pipe.config, '_name_or_path', None) or type(pipe).__name__}) has {part} "
                f"{found[part][-13:]}: {other}. Optimise a token for this model, or pass "
                "allow_other_model=True if it is a fine-tuned copy."
            )
        if sites.width != self.token.guideline.shape[1]:
            raise GuardError(
                f"{self.token.name} has rows of width {self.token.guideline.shape[1]}, but this model's keys take "
                f"{sites.width}."
            )
        sites.check()
        weights = self.token.head_weights
        if weights is not None and len(weights) != sites.num_heads:
            raise GuardError(
                f"{self.token.name} has {len(weights)} head weights, but its {len(sites)} layers have "
                f"{sites.num_heads} heads in this model. Optimise a token for this model."
            )
        return sites

    @torch.no_grad()
    def detect(self, context: Context) -> Tensor:
        """Detection map of one step, (B, H, W) at the latent's size."""
        memory, token = context.run.memory, self.token
        if "detector" not in memory:
            assert context.sites is not None
            memory["detector"] = Detector(context.sites, token.sequence, token.num_tokens, token.head_weights)
        detector: Detector = memory["detector"]
        return detector(context.features, context.latent_size, lora_scale=context.lora_scale)

    @torch.no_grad()
    def change(self, context: Context) -> Change | None:
        """Decides, guides the samples that fire, and records."""
        cam, run = context.cam, context.run
        assert cam is not None
        edit, highlight = self.thresholds.at(context.level)
        peaks, scores = cam.flatten(1).amax(1), guidance.score(cam, self.thresholds.min_area)
        sure = is_sure(self.rules, self.thresholds, context.level, peaks, scores)
        areas, shares = (cam >= highlight).float().mean((1, 2)), (cam >= edit).float().mean((1, 2))
        seen = torch.stack([peaks, scores, areas, shares, sure.float()], 1).tolist()  # one transfer from a device
        if not all(math.isfinite(row[0]) for row in seen):
            raise context.not_finite(f"{self.token.name}: the detection map")
        is_seen = [bool(row[4]) for row in seen]
        if run.step == 0:
            self._check_run(context, is_seen)
        firing, reasons = self._decide(context, is_seen, [row[3] for row in seen])
        strengths, changes, change = [0.0] * len(seen), [0.0] * len(seen), None
        if self.mode == "guide" and self.strength > 0:
            gates = self._gates(context, cam, scores, (edit, highlight), firing)
            rows = (
                [] if gates is None else [row for row, peak in enumerate(gates.flatten(1).amax(1).tolist()) if peak > 0]
            )
            if gates is not None and rows:
                change, scale = self._guide(context, rows, gates, self._factors(context, rows, is_seen))
                done = torch.stack([scale.flatten(1).amax(1), self._change_of(context, change)], 1).tolist()
                for row, (factor, size) in zip(rows, done, strict=True):
                    strengths[row], changes[row] = factor, size
                if not all(map(math.isfinite, changes)):
                    raise context.not_finite(f"{self.token.name}: the change")
        name = self.token.name
        for sample, (_, score, area, _, _) in enumerate(seen):
            context.trace.steps.append(
                StepRecord(
                    run=run.index,
                    step=run.step,
                    timestep=context.timestep,
                    level=context.level,
                    sample=sample,
                    concept=name,
                    is_firing=firing[sample],
                    reason=reasons[sample],
                    area=area,
                    strength=strengths[sample],
                    score=score,
                    change=changes[sample],
                )
            )
        if self.keep_maps:
            context.trace.maps[run.index, run.step] = cam.cpu()
        if self.mode == "stop" and any(firing):
            found = ", ".join(str(sample) for sample, fires in enumerate(firing) if fires)
            raise ConceptFound(
                f"{name} was found at timestep {context.timestep:.0f} in sample {found}; the run was stopped and no "
                "image was made.",
                context.trace,
            )
        return change

    def _check_run(self, context: Context, is_sure: Sequence[bool]) -> None:
        """Refuses a run that has too little left for the guard to act in, when it begins.

        Raises:
            GuardError: never, too coarsely or too briefly; or a picture to start from shows the concept, too late.
        """
        run, own, name = context.run, self.token.record.guidance, self.token.name
        scheduler, (*steps, end) = type(context.pipe.scheduler).__name__, run.schedule
        if self.rules.is_timed and not any(guidance.is_acting(t, run.schedule, own.max_level) for t in steps):
            raise GuardError(
                f"{name} acts from noise level {own.max_level:g} down, but {scheduler} ends at {steps[-1]:.3g}, so it "
                "would never act. Take more num_inference_steps, a later denoising_end, or the form 'paper'."
            )
        if self.mode != "guide" or self.strength == 0:
            return
        if end > own.max_step + guidance.ROUNDING:
            share = math.ceil(round(100 * (1 - own.max_step), 6)) / 100
            raise GuardError(
                f"this run of {type(context.pipe).__name__} ends at noise level {end:.3g} (denoising_end), where the "
                f"concept of {name} would come back; expected at most {own.max_step:g}. Set denoising_end to "
                f"{share} or more, and guard the pipeline that goes on from there as well."
            )
        length, first = max((this - following, this) for this, following in pairwise(run.schedule))
        if length > own.max_step + guidance.ROUNDING:
            raise GuardError(
                f"{scheduler} takes a step of {length:.3g} of the noise, at noise level {first:.3g}; {name} keeps up "
                f"with at most {own.max_step:g}: in longer ones a concept is drawn before it is seen. Take more "
                "num_inference_steps, or timesteps that lie closer."
            )
        reach = length * context.guidance_scale
        if reach > guidance.MOST_REACH:
            warnings.warn(
                f"{name} guards less well in few steps of strong guidance: the longest step ({length:.3g} of the "
                f"noise) times the guidance scale ({context.guidance_scale:g}) is {reach:.2g}; it was measured up to "
                f"{guidance.MOST_REACH:g}. Take more num_inference_steps or a lower guidance_scale.",
                RuntimeWarning,
                stacklevel=2,
            )
        if any(is_sure) and steps[0] < own.min_start - guidance.ROUNDING:
            found = ", ".join(str(sample) for sample, is_found in enumerate(is_sure) if is_found)
            raise GuardError(
                f"what this run starts from, at noise level {steps[0]:.3g}, shows the concept of {name} already "
                f"(sample {found}), too late to draw it anew. Use another picture, or a strength from which the run "
                f"starts at noise level {own.min_start:g} or more."
            )

    def _decide(self, context: Context, is_sure: list[bool], shares: list[float]) -> tuple[list[bool], list[str]]:
        """Per sample whether it fires, and why or why not."""
        if not self.rules.is_timed:
            return is_sure, [self._untimed_reason(sure, share) for sure, share in zip(is_sure, shares, strict=True)]
        run, limit = context.run, self.token.record.guidance.max_level
        if not guidance.is_acting(context.level, run.schedule, limit):
            return [False] * len(is_sure), ["concept found, too early to act" if now else _BELOW for now in is_sure]
        since: dict[int, float] = run.memory.setdefault("since", {})
        reasons = [
            "concept found" if now else "found before" if sample in since else _BELOW
            for sample, now in enumerate(is_sure)
        ]
        for sample, now in enumerate(is_sure):
            if now:
                since.setdefault(sample, context.level)
        return [sample in since for sample in range(len(is_sure))], reasons

    def _factors(self, context: Context, rows: Sequence[int], is_seen: Sequence[bool]) -> Tensor:
        """(len(rows),) the strength of each sample's push: more where the concept is still seen after a while.

        More as well where the pipeline guides weakly, see ``guidance.reach``.
        """
        own, since = self.token.record.guidance, context.run.memory.get("since", {})
        factors = []
        for row in rows:
            then = since.get(row)  # None in a form that is not timed
            factor = 1.0 if then is None else guidance.hurry(then)
            if then is not None and is_seen[row]:
                factor *= guidance.insist(own.insistence, then - context.level)
            factors.append(factor)
        strength = own.strength * guidance.reach(context.guidance_scale)
        return strength * torch.tensor(factors, device=context.eps_p.device)

    def _untimed_reason(self, is_sure: bool, share: float) -> str:
        if share > self.thresholds.max_area:
            return f"gate covers {share:.0%}, above {self.thresholds.max_area:.0%}"
        return "concept found" if is_sure else "edited, but nothing highlighted" if share else _BELOW

    def _gates(
        self, context: Context, cam: Tensor, scores: Tensor, ends: tuple[float, float], firing: Sequence[bool]
    ) -> Tensor | None:
        """The map (B, H, W) by which each sample is changed; None where none is. ``ends``: edit and highlight."""
        edit, highlight = ends
        if not self.rules.is_timed:
            return guidance.paper_scale(cam, edit, highlight, self.thresholds.max_area)
        if not any(firing):
            return None
        own, memory, level = self.token.record.guidance, context.run.memory, context.level
        if not all(firing):
            acts = torch.tensor(firing, device=cam.device)
            cam, scores = cam * acts[:, None, None], scores * acts
        sureness = memory["sureness"] = torch.maximum(memory.get("sureness", scores), scores)
        gates = guidance.soft_gate(cam, edit, highlight, own.dilation, own.relative_highlight * sureness)
        if "gates" in memory:
            last, then = memory["gates"]
            gates = guidance.remember(gates, last, own.memory, then - level)
        memory["gates"] = gates, level
        return gates

    def _guide(self, context: Context, rows: list[int], gates: Tensor, strengths: Tensor) -> tuple[Change, Tensor]:
        """The changed samples, and the factors of their push, (len(rows), H, W) or (len(rows), C, H, W)."""
        index = torch.tensor(rows, device=context.eps_p.device)
        eps_p, gate = context.eps_p[index].float(), gates[index]
        push, offset = self._safety_push(context, rows)
        eps_0 = context.eps_u[index].float() + offset
        eps_cs = eps_0 + push
        if self.rules.is_dropping:
            gate, factor = gate * min(self.strength, 1.0), strengths * max(self.strength, 1.0)
            guided = guidance.drop(eps_p, eps_0, eps_cs, gate, factor)
            return Change(rows, guided, gate, eps_0), factor[:, None, None] * gate
        scale = self.strength * strengths[:, None, None] * gate
        if self.mask == "sld":
            strong = guidance.SLD_PRESETS["strong"]
            scale = scale[:, None] * guidance.sld_mask(eps_p, eps_cs, strong.guidance_scale, strong.threshold)
        elif self.mask == "sega":
            scale = scale[:, None] * guidance.sega_mask(push, guidance.SEGAPreset().threshold)
        return Change(rows, guidance.subtract(eps_p, eps_0, eps_cs, scale)), scale

    def _change_of(self, context: Context, change: Change) -> Tensor:
        """(rows,) norm of each row's change relative to its prediction's, as the pipeline gets it."""
        eps_p = context.eps_p[torch.tensor(list(change.rows), device=context.eps_p.device)]
        size: Tensor = torch.linalg.vector_norm(
            (change.guided.to(eps_p.dtype).float() - eps_p.float()).flatten(1), dim=1
        )
        whole: Tensor = torch.linalg.vector_norm(eps_p.float().flatten(1), dim=1)
        return size / whole

    def _safety_push(self, context: Context, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``eps_cs - eps_0`` and ``eps_0 - eps_u`` of the firing samples, float32, (len(rows), C, H, W) each.

        Anew, or kept from at most ``reuse_steps - 1`` calls ago. All are made anew in the same calls, so that they
        share one forward.
        """
        kept: dict[int, tuple[int, float, Tensor, Tensor]] = context.run.memory.setdefault("push", {})
        step, level = context.run.step, context.level
        is_due = step % self.reuse_steps == 0

        def is_old(row: int) -> bool:
            made, then, _, _ = kept[row]
            return (
                step - made >= self.reuse_steps
                or then - level > self.reuse_steps * guidance.REUSE_LEVELS + guidance.ROUNDING
            )

        stale = [row for row in rows if is_due or row not in kept or is_old(row)]
        if stale:
            index = torch.tensor(stale, device=context.eps_u.device)
            eps_cs, eps_0 = (prediction.float() for prediction in context.safety_predictions(index))
            push, offset = eps_cs - eps_0, eps_0 - context.eps_u[index].float()
            if not bool(push.flatten(1).any(1).all()):
                raise GuardError(
                    f"{self.token.name}: at timestep {context.timestep:.0f} the denoiser predicts the same under the "
                    "safety prompt as under none, so there is nothing to push away from and nothing can be guarded."
                )
            kept.update({row: (step, level, push[i], offset[i]) for i, row in enumerate(stale)})
        return torch.stack([kept[row][2] for row in rows]), torch.stack([kept[row][3] for row in rows])
