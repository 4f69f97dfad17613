"""Hooks on a pipeline's denoiser: what all guards share.

Plain torch hooks, because they survive offloading; the safety forward goes through ``module.forward``, so that
patches of offloading libraries run and hooks do not recurse. All guards of one denoiser share one `Chain`: each sees
the denoiser's own output, and their changes are combined, so that the order of attaching does not matter.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor, nn

from dagkit import guidance
from dagkit.attention import QueryTap
from dagkit.errors import GuardError, ModelError
from dagkit.guard.trace import Trace
from dagkit.models import Condition, Encoding, Family, match
from dagkit.models.checker import watched

NUM_TIMESTEPS: Final = 1000
ROUNDING: Final = 0.02
"""Share of a text row's length by which batches and half precision may move it."""


class Call:
    """One denoiser call.

    Attributes:
        arguments: by name.
        sample: the latents, (2 B, C, H, W).
        timestep: as the denoiser gets it.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.sample: Tensor = arguments["sample"]
        self.timestep = float(torch.as_tensor(arguments["timestep"]).flatten()[0])

    @property
    def lora_scale(self) -> float:
        """Factor of all LoRA layers during this call alone: ``cross_attention_kwargs={"scale": ...}``."""
        return float((self.arguments.get("cross_attention_kwargs") or {}).get("scale", 1.0))

    def conditional(self, rows: Tensor, conditions: Sequence[tuple[Condition, int]]) -> dict[str, Any]:
        """Arguments for some samples of the conditional half, under other conditions.

        Args:
            rows: indices into the conditional half.
            conditions: of one prompt each, with the number of rows that they are for, in order.
        """
        batch = len(self.sample)
        index = rows.to(self.sample.device) + batch // 2
        arguments = {name: _rows(value, index, batch) for name, value in self.arguments.items()}
        hidden = self.arguments["encoder_hidden_states"]
        arguments["encoder_hidden_states"] = _repeated([(one.hidden_states, n) for one, n in conditions], hidden)
        arguments["encoder_attention_mask"] = None
        if added := conditions[0][0].added:
            arguments["added_cond_kwargs"] = {
                **arguments["added_cond_kwargs"],
                **{
                    name: _repeated([(one.added[name], n) for one, n in conditions], self.added[name]) for name in added
                },
            }
        return {**arguments, "return_dict": False}

    @property
    def added(self) -> dict[str, Any]:
        """Further conditions of all rows by name."""
        return self.arguments.get("added_cond_kwargs") or {}

    def is_neutral(self, neutral: Sequence[Condition]) -> Tensor:
        """(B,) bool, on the CPU: where the unconditional half asks for nothing in particular.

        There its text is one of ``neutral``, and nothing else that it is conditioned on differs from the conditional
        half. A negative prompt, other embeddings, a negative picture or other size conditions are something.
        """
        hidden, half = self.arguments["encoder_hidden_states"], len(self.sample) // 2
        says_nothing = torch.zeros(half, dtype=torch.bool)
        for condition in neutral:
            is_this = _is_close(hidden[:half], condition.hidden_states)
            for name, value in condition.added.items():
                is_this &= _is_close(self.added[name][:half, None], value[:, None])
            says_nothing |= is_this
        others = [value for name, value in self.added.items() if not neutral or name not in neutral[0].added]
        return says_nothing & _halves_agree(others, half)


@dataclass
class Run:
    """State of one guard in one run of the pipeline: from one ``set_timesteps`` to the next.

    Attributes:
        index: from 0.
        timesteps: the scheduler's own, by whose identity a run is known.
        schedule: timesteps from the first call to the last, falling, each once; then that at which the run ends, which
            is above 0 where its latents are meant for another model.
        batch: samples.
        step: denoiser call, from 0.
        timestep: of this call.
        memory: what the guard keeps.
    """

    index: int
    timesteps: Any
    schedule: Sequence[float]
    batch: int
    step: int = -1
    timestep: float = math.inf
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What one guard alone makes of some samples.

    Attributes:
        rows: positions in the batch, from 0.
        guided: (len(rows), C, H, W), their new conditional prediction.
        gate: (len(rows), H, W) in [0, 1], the share of the prompt's own push ``eps_p - eps_0`` that ``guided`` leaves
            out; None where it leaves out nothing.
        eps_0: (len(rows), C, H, W) neutral prediction that ``gate`` falls back to; None without a gate.
    """

    rows: Sequence[int]
    guided: Tensor
    gate: Tensor | None = None
    eps_0: Tensor | None = None


class PipelineGuard(ABC):
    """Base of all guards: checks the batch, runs the safety forward, hands back the changed prediction."""

    safety_prompt: str

    def attach(self, pipe: Any) -> GuardContext:
        """Guards a pipeline inside a ``with`` block; nothing is left behind after it.

            with guard.attach(pipe) as trace:
                image = pipe("...").images[0]

        Several guards may be attached to one pipeline, and detached in any order; `dagkit.guidance.combine` says how
        their changes add up.

        Args:
            pipe: a diffusers pipeline of a known family with classifier-free guidance.

        Returns:
            A context whose value is the trace, filled while the pipeline runs. Until it is entered the pipeline is
            refused; one that is thrown away without it is warned of.

        Raises:
            GuardError: the pipeline cannot be guarded, now or in one of its calls.
        """
        return GuardContext(self, pipe)

    @abstractmethod
    def prepare(self, family: Family, pipe: Any) -> Mapping[str, Any]:
        """Checks the pipeline and returns the layers whose queries the guard needs (none for global guards)."""

    def detect(self, context: Context) -> Tensor | None:
        """The detection map (B, H, W), for ``context.cam``; the queries are let go of after it."""
        return None

    @abstractmethod
    def change(self, context: Context) -> Change | None:
        """The changed samples, or None to leave the output as it is."""


class GuardContext:
    """A guard about to be attached to a pipeline; ``PipelineGuard.attach`` makes it, ``with`` enters it, once."""

    def __init__(self, guard: PipelineGuard, pipe: Any) -> None:
        self._handle: Any = None
        self._guard, self._pipe = guard, pipe
        self._stack = ExitStack()
        self._attachment: Attachment | None = None
        self._handle = _denoiser_of(pipe).register_forward_pre_hook(_refuse_until_entered)

    def __enter__(self) -> Trace:
        if self._handle is None:
            raise GuardError("this guard was attached before; call attach again for each with block.")
        self._wait_no_more()
        with self._stack:  # whatever is put on the pipeline goes again if the rest fails
            self._attachment = Attachment(self._guard, self._pipe, self._stack)
            self._stack.enter_context(watched(self._pipe, self._attachment.tell_blackened))
            self._stack = self._stack.pop_all()
        return self._attachment.trace

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None and self._attachment is not None:
                self._attachment.check_scheduler()

    def __del__(self) -> None:
        if self._handle is not None:
            self._wait_no_more()
            warnings.warn(
                f"{type(self._pipe).__name__} is not guarded: what attach returned was never entered. Write: with "
                "guard.attach(pipe): ...",
                RuntimeWarning,
                stacklevel=2,
            )

    def _wait_no_more(self) -> None:
        self._handle.remove()
        self._handle = None


def _refuse_until_entered(denoiser: nn.Module, _args: Any) -> None:
    if Chain.on(denoiser) is None:
        raise GuardError(
            "a guard was made for this pipeline by attach, but not entered, so nothing would be guarded. Write: with "
            "guard.attach(pipe): ..., and draw inside it."
        )


def _denoiser_of(pipe: Any) -> Any:
    try:
        return match(pipe).denoiser(pipe)
    except ModelError as error:
        raise GuardError(f"{type(pipe).__name__} cannot be guarded: {error}") from error


@dataclass
class Context:
    """What a guard sees of one denoiser call.

    Attributes:
        eps_u: (B, C, H, W) unconditional prediction, which a negative prompt conditions as well.
        eps_p: (B, C, H, W) conditional prediction, as the denoiser made it, whatever other guards are attached.
        queries: name -> (B, positions, channels) of the conditional half; empty once ``detect`` has returned.
        layers: name -> attention module.
        run: state that lives until the next run.
        pipe: the pipeline.
        trace: where to write records.
        timestep: of this call, in [0, 1000).
        lora_scale: factor of all LoRA layers during this call.
        cam: what ``detect`` returned.
    """

    eps_u: Tensor
    eps_p: Tensor
    queries: dict[str, Tensor]
    layers: Mapping[str, Any]
    run: Run
    pipe: Any
    trace: Trace
    timestep: float
    lora_scale: float
    _attachment: Attachment
    _call: Call
    cam: Tensor | None = None

    @property
    def guidance_scale(self) -> float:
        """The pipeline's, of this call.

        Raises:
            GuardError: the pipeline does not tell it.
        """
        scale = getattr(self.pipe, "guidance_scale", None)
        if scale is None:
            raise GuardError(
                f"{type(self.pipe).__name__} does not tell its guidance_scale, so nobody knows how far a change would "
                "reach, and nothing is generated."
            )
        return float(scale)

    def not_finite(self, what: str) -> GuardError:
        """The error for something that holds inf or nan: who made it, and what to do."""
        at = f"{what} at timestep {self.timestep:.0f} holds inf or nan, so nothing can be guarded"
        if bool(torch.isfinite(self._call.sample).all()):
            return GuardError(f"{at}; try bfloat16 or float32.")
        scheduler = self.pipe.scheduler
        if getattr(scheduler.config, "rescale_betas_zero_snr", False) and (
            getattr(scheduler.config, "prediction_type", None) == "epsilon"
        ):
            return GuardError(
                f"{at}: {type(scheduler).__name__} has rescale_betas_zero_snr with prediction_type 'epsilon' and "
                "divides by 0 where there is no signal. Set prediction_type='v_prediction' if the model predicts that; "
                "else rescale_betas_zero_snr=False."
            )
        return GuardError(f"{at}, as the latents do that {type(scheduler).__name__} handed to the denoiser.")

    def safety_predictions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The denoiser's predictions for these samples under the safety condition and under none, in one forward.

        Args:
            rows: samples, indices into the batch.

        Returns:
            ``eps_cs`` and ``eps_0``, (len(rows), C, H, W) each. ``eps_0`` is the unconditional prediction where that
            asks for nothing in particular; elsewhere (a negative prompt) it is made anew.
        """
        conditions, chain = self._attachment.conditions(self._call), self._attachment.chain
        is_neutral = self._call.is_neutral(conditions.neutral)[rows.cpu()].to(rows.device)
        others = rows[~is_neutral]
        everything = torch.cat([rows, others])
        arguments = self._call.conditional(
            everything, [(conditions.safety, len(rows)), (conditions.neutral[0], len(others))]
        )
        with chain.common.reused(everything + len(self.eps_p)):
            prediction: Tensor = chain.denoiser.forward(**arguments)[0]
        eps_0 = self.eps_u[rows]
        eps_0[~is_neutral] = prediction[len(rows) :]
        return prediction[: len(rows)], eps_0


class Common:
    """What a denoiser computes before it looks at the condition, kept from one call for its safety forwards.

    In Stable Diffusion the first self-attention is the largest of all; with the first ResNet block it takes a
    sixteenth of a forward pass.

    Args:
        modules: of ``Family.before_condition``.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self.outputs: dict[nn.Module, Tensor] = {}
        self.handles = [module.register_forward_hook(self._keep) for module in modules]

    def _keep(self, module: nn.Module, _args: Any, output: Tensor) -> None:
        self.outputs[module] = output

    def stop(self) -> None:
        """Takes the hooks away; the outputs stay."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def reused(self, rows: Tensor) -> Iterator[None]:
        """Inside the block the modules return these rows of what they returned before, without computing it again."""
        try:
            for module, output in self.outputs.items():
                module.forward = functools.partial(_given, output[rows.to(output.device)])
            yield
        finally:
            for module in self.outputs:
                module.__dict__.pop("forward", None)


def _given(output: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return output


@dataclass(frozen=True)
class Conditions:
    """What a guard asks the denoiser for.

    Attributes:
        safety: of the safety prompt.
        neutral: those that ask for nothing in particular; the model's own unconditional one first.
    """

    safety: Condition
    neutral: Sequence[Condition]


class Attachment:
    """One guard on one pipeline, and its state."""

    def __init__(self, guard: PipelineGuard, pipe: Any, stack: ExitStack) -> None:
        denoiser = _denoiser_of(pipe)
        self.family = match(pipe)
        self.guard, self.pipe, self.kind = guard, pipe, type(pipe).__name__
        if getattr(denoiser, "_compiled_call_impl", None) is not None:
            raise GuardError(
                f"{type(denoiser).__name__} was compiled in place (.compile()), which hides it from hooks. Use "
                "pipe.unet = torch.compile(pipe.unet) instead."
            )
        self.layers = guard.prepare(self.family, pipe)
        self._conditions: dict[Encoding, Conditions] = {}
        self._encode(Encoding())
        self.trace = Trace()
        self.run: Run | None = None
        self.tap = stack.enter_context(QueryTap(self.layers))
        self.chain = Chain.of(denoiser)
        self.chain.attachments.append(self)
        stack.callback(self.chain.leave, self)
        self.watch = StepWatch.of(pipe.scheduler)
        self.watch.attachments.append(self)
        stack.callback(self.watch.leave, self)

    def conditions(self, call: Call) -> Conditions:
        """The safety condition and the neutral ones, encoded as the pipeline encodes the prompts of this run."""
        scale = call.lora_scale
        return self._encode(Encoding(getattr(self.pipe, "clip_skip", None), None if scale == 1.0 else scale))

    @torch.no_grad()
    def _encode(self, how: Encoding) -> Conditions:
        if how not in self._conditions:
            prompt = self.guard.safety_prompt
            made = Conditions(
                self.family.encode_prompt(self.pipe, [prompt], how), self.family.neutral_conditions(self.pipe, how)
            )
            if any(bool(_is_close(made.safety.hidden_states, one.hidden_states)) for one in made.neutral):
                raise GuardError(
                    f"the safety prompt {prompt[:80]!r} says as much to {self.kind} as an empty one, so there is "
                    "nothing to push away from. Use words that its text encoder knows."
                )
            self._conditions[how] = made
        return self._conditions[how]

    def tell_blackened(self, flags: Sequence[bool]) -> None:
        """Writes down what the pipeline's own safety checker made of the images of this run."""
        if self.run is not None:
            self.trace.blackened[self.run.index] = list(flags)

    def check_scheduler(self) -> None:
        """Refuses what `StepWatch` cannot see.

        Raises:
            GuardError: the pipeline has another scheduler than when the guard was attached.
        """
        if self.pipe.scheduler is not self.watch.scheduler:
            raise GuardError(
                f"{self.kind} got another scheduler while a guard was attached, so nobody can tell whether every run "
                "was guarded: discard the images. Set pipe.scheduler first, then attach."
            )

    def enter(self, call: Call) -> None:
        """Before the denoiser: checks the call and starts to record."""
        if not getattr(self.pipe, "do_classifier_free_guidance", True):
            denoiser = self.chain.denoiser
            if getattr(denoiser.config, "time_cond_proj_dim", None) is not None:
                raise GuardError(
                    f"{type(denoiser).__name__} was distilled with its guidance built in (time_cond_proj_dim), as LCMs "
                    f"are, so {self.kind} runs without classifier-free guidance and there is no unconditional "
                    "prediction to guide from. Use the model that it was distilled from."
                )
            raise GuardError(
                f"{self.kind} runs without classifier-free guidance, so there is no unconditional prediction to guide "
                "from. Set guidance_scale above 1 (and no callback that turns it off)."
            )
        self.check_scheduler()
        self.run = self._current_run(call)
        self.tap.start()

    def see(self, call: Call, eps_u: Tensor, eps_p: Tensor) -> Context:
        """After the denoiser: what the guard may look at, with its detection map."""
        if self.run is None:
            raise GuardError(_NOT_ENTERED)
        size = (call.sample.shape[-2], call.sample.shape[-1])
        positions = self.family.num_positions(self.pipe, self.layers, size)
        seen = self.tap.stop(len(call.sample), positions)
        queries = {name: value[len(eps_p) :] for name, value in seen.items()}
        context = Context(
            eps_u, eps_p, queries, self.layers, self.run, self.pipe, self.trace, call.timestep, call.lora_scale,
            self, call,
        )  # fmt: skip
        context.cam = self.guard.detect(context)
        queries.clear()  # gigabytes in a large model, and a safety forward may follow
        return context

    def _current_run(self, call: Call) -> Run:
        timesteps, run, batch = getattr(self.pipe.scheduler, "timesteps", None), self.run, len(call.sample) // 2
        if run is None or timesteps is not run.timesteps or batch != run.batch or call.timestep > run.timestep:
            schedule = [call.timestep] if timesteps is None else torch.as_tensor(timesteps).tolist()
            self._check_timesteps(schedule)
            share = getattr(self.pipe, "denoising_end", None)
            end = NUM_TIMESTEPS * (1 - share) if isinstance(share, float) and 0 < share < 1 else 0.0
            steps = sorted({timestep for timestep in schedule if end <= timestep < call.timestep}, reverse=True)
            run = Run(0 if run is None else run.index + 1, timesteps, [call.timestep, *steps, end], batch)
        self._check_timesteps([call.timestep])
        run.step, run.timestep = run.step + 1, call.timestep
        return run

    def _check_timesteps(self, timesteps: Sequence[float]) -> None:
        for timestep in timesteps:
            if not 0 <= timestep < NUM_TIMESTEPS:
                raise GuardError(
                    f"{self.kind} with {type(self.pipe.scheduler).__name__} calls its denoiser at timestep "
                    f"{timestep:.4g}; expected [0, {NUM_TIMESTEPS}), by which thresholds are kept. EDM schedulers "
                    "count noise otherwise: use DDIM, DPM++, Euler or another scheduler of Stable Diffusion."
                )


class Chain:
    """All guards of one denoiser: one pair of hooks, one output that all of them see, one combined change."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser: Any = denoiser
        self.attachments: list[Attachment] = []
        self.call: Call | None = None
        self.common = Common()
        original = getattr(denoiser, "_orig_mod", denoiser)  # of a compiled module
        self.names = list(inspect.signature(type(original).forward).parameters)[1:]
        self.handles = (
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after, with_kwargs=True),
        )

    @classmethod
    def on(cls, denoiser: nn.Module) -> Chain | None:
        """The denoiser's chain, where it has one."""
        owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_hooks.values())
        return next((owner for owner in owners if isinstance(owner, Chain)), None)

    @classmethod
    def of(cls, denoiser: nn.Module) -> Chain:
        """The denoiser's chain, made and hooked where it has none yet."""
        return cls.on(denoiser) or cls(denoiser)

    def leave(self, attachment: Attachment) -> None:
        """Lets go of a guard, and with the last one of the denoiser."""
        self.attachments.remove(attachment)
        if not self.attachments:
            self.common.stop()
            for handle in self.handles:
                handle.remove()

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.call = None
        self.common.stop()
        call = Call(dict(zip(self.names, args, strict=False)) | kwargs)
        for attachment in self.attachments:
            attachment.enter(call)
        _check_layout(self.attachments[0].kind, call)
        self.call = call
        first = self.attachments[0]
        self.common = Common(first.family.before_condition(first.pipe))
        # the U-Net pops from this list; the safety forward needs it whole
        fresh = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        return args, fresh

    def _after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        call, self.call = self.call, None
        self.common.stop()
        if call is None:
            raise GuardError(_NOT_ENTERED)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        eps_u, eps_p = prediction.chunk(2)
        # every guard lets go of its queries before the first safety forward
        contexts = [attachment.see(call, eps_u, eps_p) for attachment in self.attachments]
        changes = []
        for attachment, context in zip(self.attachments, contexts, strict=True):
            change = attachment.guard.change(context)
            changes += [] if change is None else [change]
        self.common = Common()  # lets go of what it kept
        for attachment in self.attachments:
            attachment.watch.is_seen = True
        if not changes:
            return output
        combined = torch.cat([eps_u, _combined(eps_p, changes)])
        return (combined, *output[1:]) if isinstance(output, tuple) else type(output)(sample=combined)


class StepWatch:
    """Refuses a step of a scheduler that no guarded denoiser call came before.

    The scheduler's own ``step`` is replaced on the instance while guards are attached. It stays a bound method, so that
    a deep copy of the scheduler steps itself, is watched too, and is let go of with the original.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.attachments: list[Attachment] = []
        self.is_seen = False
        plain = scheduler.__dict__.get("step")

        @functools.wraps(type(scheduler).step)
        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            if self.attachments and not self.is_seen:
                raise GuardError(
                    f"{self.attachments[0].kind} took a step, but its denoiser was never seen, so nothing was guarded "
                    "and no image is made. A pipeline whose denoiser was replaced must be guarded anew; a model "
                    "compiled before the guard was attached skips new hooks: call torch._dynamo.reset() and attach "
                    "again."
                )
            self.is_seen = False
            return type(own).step(own, *args, **kwargs) if plain is None else plain(*args, **kwargs)

        step.watch = self  # type: ignore[attr-defined]
        self.plain = plain
        scheduler.step = MethodType(step, scheduler)

    @classmethod
    def of(cls, scheduler: Any) -> StepWatch:
        """The scheduler's watch, made where it has none yet."""
        watch = getattr(scheduler.step, "watch", None)
        return watch if isinstance(watch, cls) and watch.scheduler is scheduler else cls(scheduler)

    def leave(self, attachment: Attachment) -> None:
        """Lets go of a guard, and with the last one of the scheduler."""
        self.attachments.remove(attachment)
        if not self.attachments:
            del self.scheduler.step
            if self.plain is not None:
                self.scheduler.step = self.plain


_NOT_ENTERED: Final = "the denoiser returned without having been entered; attach the guard outside of a running call."


def _check_layout(kind: str, call: Call) -> None:
    sample, hidden = call.sample, call.arguments["encoder_hidden_states"]
    half = len(sample) // 2
    if len(sample) % 2 or not torch.equal(sample[:half], sample[half:]):
        raise GuardError(
            f"{kind} calls its denoiser with a batch of {len(sample)} that is not [unconditional; conditional] "
            "of the same latents. This batch layout is unknown, so nothing is generated."
        )
    if len(hidden) != len(sample):
        raise GuardError(f"{kind} passes {len(hidden)} conditions for a batch of {len(sample)}; expected one each.")


def _combined(eps_p: Tensor, changes: Sequence[Change]) -> Tensor:
    """The conditional prediction with all changes; a sample that one guard alone changed is exactly that guard's."""
    result = eps_p.clone()
    for row in sorted({row for change in changes for row in change.rows}):
        mine = [(change, change.rows.index(row)) for change in changes if row in change.rows]
        guided = [change.guided[i] for change, i in mine]
        if len(mine) > 1:
            gates = [None if change.gate is None else change.gate[i] for change, i in mine]
            neutral = [change.eps_0[i] for change, i in mine if change.eps_0 is not None]
            eps_0 = torch.stack(neutral).mean(0) if neutral else eps_p[row]
            guided = [guidance.combine(eps_p[row], eps_0, guided, gates)]
        result[row] = guided[0].to(result.dtype)
    return result


def _repeated(parts: Sequence[tuple[Tensor, int]], like: Tensor) -> Tensor:
    """Each (1, ...) tensor so many times, below each other, in another tensor's dtype and on its device."""
    rows = [value.to(like).expand(count, *value.shape[1:]) for value, count in parts if count]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _is_close(hidden: Tensor, other: Tensor) -> Tensor:
    """(B,) bool, on the CPU: whether (B, L, d) rows are those of another text, once or several times, but for rounding.

    Args:
        hidden: (B, L, d).
        other: (1, l, d).
    """
    if hidden.shape[1] % other.shape[1] or hidden.shape[2] != other.shape[2]:
        return torch.zeros(len(hidden), dtype=torch.bool)
    other = other.to(hidden.device, torch.float32)
    texts = hidden.float().reshape(len(hidden), -1, *other.shape[1:])
    distance: Tensor = torch.linalg.vector_norm(texts - other[:, None], dim=-1)
    is_close: Tensor = distance <= ROUNDING * torch.linalg.vector_norm(other, dim=-1)[:, None]
    return is_close.flatten(1).all(1).cpu()


def _halves_agree(values: Any, half: int) -> bool:
    """Whether every tensor with 2 * ``half`` rows, inside lists, tuples and dicts too, has two equal halves."""
    if isinstance(values, Tensor):
        return values.dim() == 0 or len(values) != 2 * half or torch.equal(values[:half], values[half:])
    if isinstance(values, dict):
        values = list(values.values())
    return all(_halves_agree(value, half) for value in values) if isinstance(values, (list, tuple)) else True


def _rows(value: Any, index: Tensor, batch: int) -> Any:
    """Rows ``index`` of every tensor whose first side is the batch, inside lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(item, index, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, index, batch) for item in value)
    return value
