"""Guards: hooks on a pipeline's denoiser that detect a concept while it is drawn and steer away from it.

    with token.guard().attach(pipe) as trace:
        image = pipe("...").images[0]

A guard changes the conditional half of the denoiser's output and nothing else, so it works with any scheduler and
prediction type, and samples in which it does not fire stay bit-equal. What it cannot guard it refuses: it never
silently does nothing.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from dagkit import guidance
from dagkit.attention import QueryTap, cross_attention_map, project_keys
from dagkit.errors import GuardError, ModelError
from dagkit.families import Condition, Family, match
from dagkit.families.sketch import TOLERANCE, difference
from dagkit.guard.trace import StepRecord, Trace
from dagkit.token import GuidelineToken, Thresholds

MODES: Final = ("guide", "monitor", "stop")
Mode = Literal["guide", "monitor", "stop"]


class ConceptFound(GuardError):
    """A guard in mode ``stop`` ended the run. ``trace`` tells in which samples the concept was found."""

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


@dataclass
class _Call:
    """One denoiser call with its arguments by name."""

    arguments: dict[str, Any]

    @property
    def sample(self) -> Tensor:
        sample: Tensor = self.arguments["sample"]
        return sample

    @property
    def timestep(self) -> float:
        return float(torch.as_tensor(self.arguments["timestep"]).flatten()[0])

    def conditional(self, rows: Tensor, condition: Condition) -> dict[str, Any]:
        """Arguments for some samples of the conditional half, under another condition.

        Args:
            rows: indices into the conditional half.
            condition: of one prompt.
        """
        batch = len(self.sample)
        index = rows.to(self.sample.device) + batch // 2
        arguments = {name: _rows(value, index, batch) for name, value in self.arguments.items()}
        hidden = self.arguments["encoder_hidden_states"]
        arguments["encoder_hidden_states"] = condition.hidden_states.to(hidden).expand(len(rows), -1, -1)
        arguments["encoder_attention_mask"] = None
        if condition.added:
            added = dict(arguments["added_cond_kwargs"])
            for name, value in condition.added.items():
                added[name] = value.to(added[name]).expand(len(rows), *value.shape[1:])
            arguments["added_cond_kwargs"] = added
        return {**arguments, "return_dict": False}


@dataclass
class _Run:
    """State of one run of the pipeline: from one ``set_timesteps`` to the next."""

    index: int
    timesteps: Any
    batch: int
    step: int = -1
    timestep: float = math.inf
    keys: dict[str, Tensor] | None = None
    memory: dict[str, Any] = field(default_factory=dict)


class PipelineGuard(ABC):
    """Base of all guards: checks the batch, runs the safety forward, hands back the changed prediction."""

    safety_prompt: str

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Trace]:
        """Guards a pipeline inside the ``with`` block; nothing is left behind after it.

        Args:
            pipe: a diffusers pipeline of a known family with classifier-free guidance.

        Yields:
            The trace, filled while the pipeline runs.

        Raises:
            GuardError: the pipeline cannot be guarded, now or in one of its calls.
        """
        with ExitStack() as stack:
            attachment = _Attachment(self, pipe, stack)
            before = getattr(pipe.scheduler, "timesteps", None)
            yield attachment.trace
            if not attachment.num_calls and getattr(pipe.scheduler, "timesteps", None) is not before:
                raise GuardError(
                    f"{type(pipe).__name__} ran, but its denoiser was never seen, so nothing was guarded: discard "
                    "the images. A model"
                    " compiled before the guard was attached skips new hooks: call torch._dynamo.reset() and attach "
                    "again."
                )

    @abstractmethod
    def prepare(self, family: Family, pipe: Any) -> Mapping[str, Any]:
        """Checks the pipeline and returns the layers whose queries the guard needs (none for global guards)."""

    @abstractmethod
    def change(self, context: Context) -> Tensor | None:
        """The new conditional prediction, or None to leave the output as it is."""


@dataclass
class Context:
    """What a guard sees of one denoiser call.

    Attributes:
        eps_u: (B, C, H, W) unconditional prediction.
        eps_p: (B, C, H, W) conditional prediction.
        queries: name -> (B, positions, channels) of the conditional half.
        layers: name -> attention module.
        run: state that lives until the next run.
        pipe: the pipeline.
        trace: where to write records.
        timestep: of this call.
    """

    eps_u: Tensor
    eps_p: Tensor
    queries: dict[str, Tensor]
    layers: Mapping[str, Any]
    run: _Run
    pipe: Any
    trace: Trace
    timestep: float
    _attachment: _Attachment
    _call: _Call

    def safety_prediction(self, rows: Tensor) -> Tensor:
        """(len(rows), C, H, W): the denoiser's prediction under the safety condition, for these samples only."""
        return self._attachment.safety_prediction(self._call, rows)


class _Attachment:
    """One guard on one pipeline: the hooks and their state."""

    def __init__(self, guard: PipelineGuard, pipe: Any, stack: ExitStack) -> None:
        try:
            self.family = match(pipe)
        except ModelError as error:
            raise GuardError(f"{type(pipe).__name__} cannot be guarded: {error}") from error
        self.guard, self.pipe = guard, pipe
        self.denoiser = self.family.denoiser(pipe)
        self.names = list(
            inspect.signature(type(getattr(self.denoiser, "_orig_mod", self.denoiser)).forward).parameters
        )[1:]
        self.layers = guard.prepare(self.family, pipe)
        with torch.no_grad():
            self.condition = self.family.encode_prompt(pipe, [guard.safety_prompt])
        self.trace = Trace()
        self.tap = stack.enter_context(QueryTap(self.layers))
        self.run: _Run | None = None
        self.call: _Call | None = None
        self.num_calls = 0
        for handle in (
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after, with_kwargs=True),
        ):
            stack.callback(handle.remove)

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.num_calls += 1
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self.call = _Call(arguments)
        self._check_layout(self.call)
        self.run = self._current_run(self.call)
        self.tap.start()
        # the U-Net pops from this list; the safety forward needs it whole
        fresh = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        return args, fresh

    def _after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        call, run = self.call, self.run
        if call is None or run is None:
            raise GuardError(
                "the denoiser returned without having been entered; attach the guard outside of a running call."
            )
        self.call = None
        half = len(call.sample) // 2
        queries = {name: value[half:] for name, value in self.tap.stop().items()} if self.layers else {}
        prediction = output[0] if isinstance(output, tuple) else output.sample
        eps_u, eps_p = prediction.chunk(2)
        changed = self.guard.change(
            Context(eps_u, eps_p, queries, self.layers, run, self.pipe, self.trace, call.timestep, self, call)
        )
        if changed is None:
            return output
        combined = torch.cat([eps_u, changed.to(eps_u.dtype)])
        return (combined, *output[1:]) if isinstance(output, tuple) else type(output)(sample=combined)

    def safety_prediction(self, call: _Call, rows: Tensor) -> Tensor:
        # .forward: patches of offloading libraries run, torch hooks (ours) do not recurse
        prediction: Tensor = self.denoiser.forward(**call.conditional(rows, self.condition))[0]
        return prediction

    def _check_layout(self, call: _Call) -> None:
        kind, sample = type(self.pipe).__name__, call.sample
        if not getattr(self.pipe, "do_classifier_free_guidance", True):
            raise GuardError(
                f"{kind} runs without classifier-free guidance, so there is no unconditional prediction to guide "
                "from. Set"
                " guidance_scale above 1 (and no callback that turns it off)."
            )
        half = len(sample) // 2
        if len(sample) % 2 or not torch.equal(sample[:half], sample[half:]):
            raise GuardError(
                f"{kind} calls its denoiser with a batch of {len(sample)} that is not [unconditional; conditional] "
                "of the same"
                " latents. This batch layout is unknown, so nothing is generated."
            )
        hidden = call.arguments["encoder_hidden_states"]
        if len(hidden) != len(sample):
            raise GuardError(f"{kind} passes {len(hidden)} conditions for a batch of {len(sample)}; expected one each.")

    def _current_run(self, call: _Call) -> _Run:
        timesteps, run, batch = getattr(self.pipe.scheduler, "timesteps", None), self.run, len(call.sample) // 2
        if run is None or timesteps is not run.timesteps or batch != run.batch or call.timestep > run.timestep:
            run = _Run(index=0 if run is None else run.index + 1, timesteps=timesteps, batch=batch)
        run.step, run.timestep = run.step + 1, call.timestep
        return run


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
        for part, sketch in found.items():
            distance = difference(getattr(model, part), sketch)
            if distance > TOLERANCE:
                raise GuardError(
                    f"{self.token.name} was made for {model.id} ({part} {getattr(model, part)[-13:]}), but this "
                    "pipeline "
                    f"({getattr(pipe.config, '_name_or_path', None) or type(pipe).__name__}) has {part} "
                    f"{sketch[-13:]}: the weights differ "
                    f"by {distance:.1%}. Optimise a token for this model, or pass allow_other_model=True if it is a "
                    "fine-tuned copy."
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
        edit, highlight = self.thresholds.at(context.timestep)
        scores = score(cam, self.thresholds.min_area)
        gates, reasons = self._gates(cam, edit, highlight, scores)
        rows = gates.flatten(1).amax(1).nonzero()[:, 0]
        is_acting = self.mode == "guide" and self.strength > 0
        for sample in range(len(cam)):
            fires = bool((rows == sample).any())
            context.trace.steps.append(
                StepRecord(
                    run=context.run.index,
                    step=context.run.step,
                    timestep=context.timestep,
                    sample=sample,
                    concept=self.token.name,
                    is_firing=fires,
                    reason=reasons[sample],
                    area=float((cam[sample] >= highlight).float().mean()),
                    strength=float(gates[sample].amax()) * self.strength if fires and is_acting else 0.0,
                    score=float(scores[sample]),
                )
            )
        if self.keep_maps:
            context.trace.maps[context.run.index, context.run.step] = cam.cpu()
        if self.mode == "stop" and len(rows):
            raise ConceptFound(
                f"{self.token.name} was found at timestep {context.timestep:.0f} in sample "
                f"{', '.join(map(str, rows.tolist()))}; the run was"
                " stopped and no image was made.",
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

    def _gates(self, cam: Tensor, edit: float, highlight: float, scores: Tensor) -> tuple[Tensor, list[str]]:
        """Per sample the map by which its prediction is changed (all 0: it does not fire) and why."""
        if self.form == "paper":
            gates = guidance.paper_scale(cam, edit, highlight, self.thresholds.max_area)
            share = (cam >= edit).float().mean((1, 2)).tolist()
            reasons = [
                f"gate covers {part:.0%}, above {self.thresholds.max_area:.0%}" if part > self.thresholds.max_area
                else "concept found" if part else "below threshold" for part in share
            ]  # fmt: skip
            return gates, reasons
        is_sure = scores >= highlight
        gates = guidance.soft_gate(cam, edit, highlight, self.token.record.guidance.dilation) * is_sure[:, None, None]
        return gates, ["concept found" if sure else "below threshold" for sure in is_sure.tolist()]

    def _safety_push(self, context: Context, rows: Tensor, eps_u: Tensor) -> Tensor:
        """``eps_cs - eps_u`` of the firing samples, anew or kept from at most ``reuse_steps - 1`` calls ago."""
        kept: dict[int, tuple[int, Tensor]] = context.run.memory.setdefault("push", {})
        step = context.run.step
        stale = [row for row in rows.tolist() if row not in kept or step - kept[row][0] >= self.reuse_steps]
        if stale:
            index = torch.tensor(stale, device=rows.device)
            fresh = context.safety_prediction(index).float() - context.eps_u[index].float()
            kept.update({row: (step, fresh[i]) for i, row in enumerate(stale)})
        return torch.stack([kept[row][1] for row in rows.tolist()])


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


class _GlobalGuard(PipelineGuard):
    """A peer method: every sample, every step, the whole image."""

    def prepare(self, family: Family, pipe: Any) -> Mapping[str, Any]:
        """Needs no layer."""
        return {}

    @torch.no_grad()
    def change(self, context: Context) -> Tensor | None:
        """Runs the safety forward on the whole batch and applies the peer's equation."""
        rows = torch.arange(len(context.eps_p), device=context.eps_p.device)
        eps_cs = context.safety_prediction(rows)
        momentum = context.run.memory.get("momentum")
        momentum = torch.zeros_like(context.eps_p) if momentum is None else momentum
        changed, context.run.memory["momentum"] = self.equation(context, eps_cs, momentum)
        return changed

    @abstractmethod
    def equation(self, context: Context, eps_cs: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """The changed conditional prediction and the next momentum."""


class SLDGuard(_GlobalGuard):
    """Safe Latent Diffusion (arXiv 2211.05105) as a guard, for comparison or beside a ``Guard``.

    Args:
        safety_prompt: text of the concept.
        preset: ``weak``, ``medium``, ``strong`` or ``max``.
    """

    def __init__(self, safety_prompt: str, preset: str = "strong") -> None:
        if preset not in guidance.SLD_PRESETS:
            raise GuardError(f"preset must be one of {', '.join(guidance.SLD_PRESETS)}, but got {preset!r}.")
        self.safety_prompt, self.preset = safety_prompt, guidance.SLD_PRESETS[preset]

    def equation(self, context: Context, eps_cs: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """SLD's."""
        return guidance.sld(context.eps_p, context.eps_u, eps_cs, momentum, self.preset, context.run.step)


class SEGAGuard(_GlobalGuard):
    """Semantic Guidance (arXiv 2301.12247) away from one concept, as a guard.

    Args:
        safety_prompt: text of the concept.
        preset: constants; diffusers' defaults where not given.
    """

    def __init__(self, safety_prompt: str, preset: guidance.SEGAPreset | None = None) -> None:
        self.safety_prompt, self.preset = safety_prompt, preset or guidance.SEGAPreset()

    def equation(self, context: Context, eps_cs: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """SEGA's."""
        scale = getattr(context.pipe, "guidance_scale", None)
        if scale is None:
            raise GuardError(
                f"{type(context.pipe).__name__} does not tell its guidance_scale, which SEGA needs. Use SLDGuard or "
                "Guard."
            )
        return guidance.sega(
            context.eps_p, context.eps_u, eps_cs, momentum, self.preset, context.run.step, float(scale)
        )


def _rows(value: Any, index: Tensor, batch: int) -> Any:
    """Rows ``index`` of every tensor whose first side is the batch, inside lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(item, index, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, index, batch) for item in value)
    return value
