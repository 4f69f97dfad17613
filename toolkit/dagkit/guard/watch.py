"""Watches a scheduler, so that no step is taken that nobody guarded."""

from __future__ import annotations

import functools
from types import MethodType
from typing import TYPE_CHECKING, Any

from dagkit.errors import GuardError

if TYPE_CHECKING:
    from dagkit.guard.session import Session


class StepWatch:
    """Refuses a step of a scheduler that no guarded denoiser call came before.

    The scheduler's own ``step`` is replaced on the instance while guards are attached. It stays a bound method, so that
    a deep copy of the scheduler steps itself, is watched too, and is let go of with the original.

    Attributes:
        is_seen: whether the denoiser was called as often as a step needs, and guarded, since the last one.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.sessions: list[Session] = []
        self.is_seen = False
        plain = scheduler.__dict__.get("step")

        @functools.wraps(type(scheduler).step)
        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            if self.sessions and not self.is_seen:
                raise GuardError(
                    f"{self.sessions[0].kind} took a step, but its denoiser was never seen, so nothing was guarded "
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

    def leave(self, session: Session) -> None:
        """Lets go of a guard, and with the last one of the scheduler."""
        self.sessions.remove(session)
        if not self.sessions:
            del self.scheduler.step
            if self.plain is not None:
                self.scheduler.step = self.plain
