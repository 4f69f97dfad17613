"""Hooks on a pipeline's denoiser: what all guards of it share.

Plain torch hooks, because they survive offloading; the safety forward goes through ``module.forward``, so that
patches of offloading libraries run and hooks do not recurse. All guards of one denoiser share one `Chain`: each sees
the denoiser's own output, and their changes are combined, so that the order of attaching does not matter.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from dagkit import guidance
from dagkit.errors import GuardError
from dagkit.models.calls import Call, Step, refuse_caches

if TYPE_CHECKING:
    from dagkit.guard.session import Change, Session

_NOT_ENTERED: Final = "the denoiser returned without having been entered; attach the guard outside of a running call."


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


class Chain:
    """All guards of one denoiser: one pair of hooks, one output that all of them see, one combined change.

    Attributes:
        sessions: the guards.
        call: the denoiser call that is under way.
        offset: first row of the last call that is of the conditional half's sample 0.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser: Any = denoiser
        self.sessions: list[Session] = []
        self.call: Call | None = None
        self._is_aside = False
        self.offset = 0
        self.common = Common()
        self._step = Step()
        self._thread: int | None = None
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

    def leave(self, session: Session) -> None:
        """Lets go of a guard, and with the last one of the denoiser."""
        self.sessions.remove(session)
        if not self.sessions:
            self.common.stop()
            for handle in self.handles:
                handle.remove()

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.call = None
        self.common.stop()
        self._check_thread(self.sessions[0])
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        with self._ends_with_an_error():
            self._is_aside = self.sessions[0].bound.layout.is_aside(arguments, self._not_taken())
            if self._is_aside:
                return args, kwargs
            self._enter(arguments)
        # the U-Net pops from this list; the safety forward needs it whole
        fresh = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        return args, fresh

    def _not_taken(self) -> Step | None:
        """The last step, where all of its calls were seen and the scheduler has not taken it yet."""
        first = self.sessions[0]
        return self._step if first.watch.is_seen and first.is_under_way else None

    def _enter(self, arguments: dict[str, Any]) -> None:
        first = self.sessions[0]
        layout = first.bound.layout
        layout.check(first.pipe, self.denoiser)
        step, self._step = self._step, Step()  # a step that is refused is not gone on with
        if step.num_calls >= layout.num_calls or not first.is_under_way:  # the run before may have been broken off
            step = self._step
        self.call = call = layout.enter(first.kind, step, arguments)
        for session in self.sessions:
            session.enter(step, call)
        if first.is_beginning:
            refuse_caches(self.denoiser)
        self._step = step
        self.common = Common(first.bound.family.before_condition(first.pipe))

    def _after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        if self._is_aside:
            return output
        call, self.call = self.call, None
        self.common.stop()
        if call is None:
            raise GuardError(_NOT_ENTERED)
        with self._ends_with_an_error():
            return self._leave(call, output)

    def _leave(self, call: Call, output: Any) -> Any:
        first, step = self.sessions[0], self._step
        layout = first.bound.layout
        layout.leave(step, call, output)
        is_conditional = step.is_conditional(call)
        if is_conditional:
            # every guard lets go of its features before the first safety forward
            for session in self.sessions:
                session.see(step)
        if step.num_calls < layout.num_calls:
            return output
        self.offset = step.p.start if is_conditional and step.p else 0
        changes = [change for session in self.sessions if (change := session.change()) is not None]
        self.common = Common()  # lets go of what it kept
        for session in self.sessions:
            session.watch.is_seen = True
        if first.is_over:
            self._thread = None  # any thread may begin the next run
        if not changes:
            return output
        assert step.eps_p is not None
        guided = _combined(step.eps_p, changes)
        scale = first.guidance_scale if layout.num_calls > 1 else 1.0
        return layout.returned(call, output, layout.fold(step, guided, scale))

    @contextmanager
    def _ends_with_an_error(self) -> Iterator[None]:
        """An error that a guard raises ends the run of its thread."""
        try:
            yield
        except BaseException:
            self._thread, self._step = None, Step()
            raise

    def _check_thread(self, session: Session) -> None:
        """Refuses a call from another thread than that whose run is under way: their steps would be mixed."""
        thread = threading.get_ident()
        if self._thread is not None and self._thread != thread:
            raise GuardError(
                f"{session.kind} is drawing in another thread, or was stopped there in the middle of a run; a pipeline "
                "and its guard draw one run at a time. Give each thread its own pipeline, or draw inside `with "
                "bound.run():` in every thread, which waits its turn."
            )
        self._thread = thread


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
