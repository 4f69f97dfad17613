"""Hooks on a pipeline's denoiser: what all guards share.

Plain torch hooks, because they survive offloading; the safety forward goes through ``module.forward``, so that
patches of offloading libraries run and hooks do not recurse.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dagkit.attention import QueryTap
from dagkit.errors import GuardError, ModelError
from dagkit.families import Condition, Family, match
from dagkit.guard.trace import Trace


@dataclass
class Call:
    """One denoiser call with its arguments by name."""

    arguments: dict[str, Any]

    @property
    def sample(self) -> Tensor:
        """The latents, (2 B, C, H, W)."""
        sample: Tensor = self.arguments["sample"]
        return sample

    @property
    def timestep(self) -> float:
        """In [0, 1000)."""
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
class Run:
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
            attachment = Attachment(self, pipe, stack)
            before = getattr(pipe.scheduler, "timesteps", None)
            yield attachment.trace
            seen = before if attachment.run is None else attachment.run.timesteps
            if getattr(pipe.scheduler, "timesteps", None) is not seen:
                raise GuardError(
                    f"{type(pipe).__name__} ran, but its denoiser was never seen, so nothing was guarded: discard "
                    "the images. A model compiled before the guard was attached skips new hooks: call "
                    "torch._dynamo.reset() and attach again."
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
    run: Run
    pipe: Any
    trace: Trace
    timestep: float
    _attachment: Attachment
    _call: Call

    def safety_prediction(self, rows: Tensor) -> Tensor:
        """(len(rows), C, H, W): the denoiser's prediction under the safety condition, for these samples only."""
        return self._attachment.safety_prediction(self._call, rows)


class Attachment:
    """One guard on one pipeline: the hooks and their state."""

    def __init__(self, guard: PipelineGuard, pipe: Any, stack: ExitStack) -> None:
        try:
            self.family = match(pipe)
        except ModelError as error:
            raise GuardError(f"{type(pipe).__name__} cannot be guarded: {error}") from error
        self.guard, self.pipe = guard, pipe
        self.denoiser = self.family.denoiser(pipe)
        if getattr(self.denoiser, "_compiled_call_impl", None) is not None:
            raise GuardError(
                f"{type(self.denoiser).__name__} was compiled in place (.compile()), which hides it from hooks. Use "
                "pipe.unet = torch.compile(pipe.unet) instead."
            )
        self.names = list(
            inspect.signature(type(getattr(self.denoiser, "_orig_mod", self.denoiser)).forward).parameters
        )[1:]
        self.layers = guard.prepare(self.family, pipe)
        with torch.no_grad():
            self.condition = self.family.encode_prompt(pipe, [guard.safety_prompt])
        self.trace = Trace()
        self.tap = stack.enter_context(QueryTap(self.layers))
        self.run: Run | None = None
        self.call: Call | None = None
        for handle in (
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after, with_kwargs=True),
        ):
            stack.callback(handle.remove)

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self.call = Call(arguments)
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

    def safety_prediction(self, call: Call, rows: Tensor) -> Tensor:
        """The denoiser's prediction for some samples under the safety condition."""
        prediction: Tensor = self.denoiser.forward(**call.conditional(rows, self.condition))[0]
        return prediction

    def _check_layout(self, call: Call) -> None:
        kind, sample = type(self.pipe).__name__, call.sample
        if not getattr(self.pipe, "do_classifier_free_guidance", True):
            raise GuardError(
                f"{kind} runs without classifier-free guidance, so there is no unconditional prediction to guide "
                "from. Set guidance_scale above 1 (and no callback that turns it off)."
            )
        half = len(sample) // 2
        if len(sample) % 2 or not torch.equal(sample[:half], sample[half:]):
            raise GuardError(
                f"{kind} calls its denoiser with a batch of {len(sample)} that is not [unconditional; conditional] "
                "of the same latents. This batch layout is unknown, so nothing is generated."
            )
        hidden = call.arguments["encoder_hidden_states"]
        if len(hidden) != len(sample):
            raise GuardError(f"{kind} passes {len(hidden)} conditions for a batch of {len(sample)}; expected one each.")

    def _current_run(self, call: Call) -> Run:
        timesteps, run, batch = getattr(self.pipe.scheduler, "timesteps", None), self.run, len(call.sample) // 2
        if run is None or timesteps is not run.timesteps or batch != run.batch or call.timestep > run.timestep:
            run = Run(index=0 if run is None else run.index + 1, timesteps=timesteps, batch=batch)
        run.step, run.timestep = run.step + 1, call.timestep
        return run


def _rows(value: Any, index: Tensor, batch: int) -> Any:
    """Rows ``index`` of every tensor whose first side is the batch, inside lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(item, index, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, index, batch) for item in value)
    return value
