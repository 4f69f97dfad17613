"""Hooks on a pipeline's denoiser: what all guards share.

Plain torch hooks, because they survive offloading; the safety forward goes through ``module.forward``, so that
patches of offloading libraries run and hooks do not recurse. All guards of one denoiser share one `Chain`: each sees
the denoiser's own output, and their changes are combined, so that the order of attaching does not matter.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from dagkit import guidance
from dagkit.attention import QueryTap
from dagkit.errors import GuardError, ModelError
from dagkit.families import Condition, Family, match
from dagkit.guard.trace import Trace

NUM_TIMESTEPS: Final = 1000


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
class Run:
    """State of one guard in one run of the pipeline: from one ``set_timesteps`` to the next."""

    index: int
    timesteps: Any
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
        gate: (len(rows), H, W) in [0, 1], the share of the prompt's own push ``eps_p - eps_u`` that ``guided`` leaves
            out; None where it leaves out nothing.
    """

    rows: Sequence[int]
    guided: Tensor
    gate: Tensor | None = None


class PipelineGuard(ABC):
    """Base of all guards: checks the batch, runs the safety forward, hands back the changed prediction."""

    safety_prompt: str

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Trace]:
        """Guards a pipeline inside the ``with`` block; nothing is left behind after it.

        Several guards may be attached to one pipeline, and detached in any order; `dagkit.guidance.combine` says how
        their changes add up.

        Args:
            pipe: a diffusers pipeline of a known family with classifier-free guidance.

        Yields:
            The trace, filled while the pipeline runs.

        Raises:
            GuardError: the pipeline cannot be guarded, now or in one of its calls.
        """
        with ExitStack() as stack:
            attachment = Attachment(self, pipe, stack)
            yield attachment.trace
            attachment.check_scheduler()

    @abstractmethod
    def prepare(self, family: Family, pipe: Any) -> Mapping[str, Any]:
        """Checks the pipeline and returns the layers whose queries the guard needs (none for global guards)."""

    def detect(self, context: Context) -> Tensor | None:
        """The detection map (B, H, W), for ``context.cam``; the queries are let go of after it."""
        return None

    @abstractmethod
    def change(self, context: Context) -> Change | None:
        """The changed samples, or None to leave the output as it is."""


@dataclass
class Context:
    """What a guard sees of one denoiser call.

    Attributes:
        eps_u: (B, C, H, W) unconditional prediction.
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

    def safety_prediction(self, rows: Tensor) -> Tensor:
        """(len(rows), C, H, W): the denoiser's prediction under the safety condition, for these samples only."""
        arguments = self._call.conditional(rows, self._attachment.condition)
        chain = self._attachment.chain
        with chain.common.reused(rows + len(self.eps_p)):
            prediction: Tensor = chain.denoiser.forward(**arguments)[0]
        return prediction


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


class Attachment:
    """One guard on one pipeline, and its state."""

    def __init__(self, guard: PipelineGuard, pipe: Any, stack: ExitStack) -> None:
        try:
            self.family = match(pipe)
        except ModelError as error:
            raise GuardError(f"{type(pipe).__name__} cannot be guarded: {error}") from error
        self.guard, self.pipe, self.kind = guard, pipe, type(pipe).__name__
        denoiser = self.family.denoiser(pipe)
        if getattr(denoiser, "_compiled_call_impl", None) is not None:
            raise GuardError(
                f"{type(denoiser).__name__} was compiled in place (.compile()), which hides it from hooks. Use "
                "pipe.unet = torch.compile(pipe.unet) instead."
            )
        self.layers = guard.prepare(self.family, pipe)
        with torch.no_grad():
            self.condition = self.family.encode_prompt(pipe, [guard.safety_prompt])
        self.trace = Trace()
        self.run: Run | None = None
        self.tap = stack.enter_context(QueryTap(self.layers))
        self.chain = Chain.of(denoiser)
        self.chain.attachments.append(self)
        stack.callback(self.chain.leave, self)
        self.watch = StepWatch.of(pipe.scheduler)
        self.watch.attachments.append(self)
        stack.callback(self.watch.leave, self)

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
        queries = {name: value[len(eps_p) :] for name, value in self.tap.stop().items()} if self.layers else {}
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
            self._check_timesteps([call.timestep] if timesteps is None else torch.as_tensor(timesteps).tolist())
            run = Run(index=0 if run is None else run.index + 1, timesteps=timesteps, batch=batch)
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
    def of(cls, denoiser: nn.Module) -> Chain:
        """The denoiser's chain, made and hooked where it has none yet."""
        owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_hooks.values())
        return next((owner for owner in owners if isinstance(owner, Chain)), None) or cls(denoiser)

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
        combined = torch.cat([eps_u, _combined(eps_p, eps_u, changes)])
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


def _combined(eps_p: Tensor, eps_u: Tensor, changes: Sequence[Change]) -> Tensor:
    """The conditional prediction with all changes; a sample that one guard alone changed is exactly that guard's."""
    result = eps_p.clone()
    for row in sorted({row for change in changes for row in change.rows}):
        mine = [(change, change.rows.index(row)) for change in changes if row in change.rows]
        guided = [change.guided[i] for change, i in mine]
        if len(mine) > 1:
            gates = [None if change.gate is None else change.gate[i] for change, i in mine]
            guided = [guidance.combine(eps_p[row], eps_u[row], guided, gates)]
        result[row] = guided[0].to(result.dtype)
    return result


def _rows(value: Any, index: Tensor, batch: int) -> Any:
    """Rows ``index`` of every tensor whose first side is the batch, inside lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(item, index, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, index, batch) for item in value)
    return value
