"""A guard bound to a pipeline: everything is checked once, and each run costs next to nothing."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dagkit.errors import GuardError, ModelError
from dagkit.guard.chain import Chain
from dagkit.guard.session import Change, Conditions, Context, Session
from dagkit.models import Encoding, Family, match
from dagkit.models.calls import is_close
from dagkit.models.checker import watched
from dagkit.models.seal import Seal
from dagkit.models.words import check_words

if TYPE_CHECKING:
    from dagkit.guard.trace import Trace
    from dagkit.models.noise import NoiseSchedule
    from dagkit.models.sites import Sites


class PipelineGuard(ABC):
    """Base of all guards: checks the batch, runs the safety forward, hands back the changed prediction."""

    safety_prompt: str

    @property
    def safety_phrases(self) -> tuple[str, ...]:
        """What the safety condition says: texts that are encoded one by one and stand side by side in it."""
        return (self.safety_prompt,)

    def bind(self, pipe: Any) -> BoundGuard:
        """Checks the pipeline once, for as many runs as one likes.

            bound = guard.bind(pipe)
            with bound.run() as trace:
                image = pipe("...").images[0]

        Args:
            pipe: a diffusers pipeline of a known family with classifier-free guidance.

        Raises:
            GuardError: the pipeline cannot be guarded.
        """
        return BoundGuard(self, pipe)

    def attach(self, pipe: Any) -> GuardContext:
        """The short form of ``bind(pipe).run()``: checks and guards a pipeline inside a ``with`` block.

            with guard.attach(pipe) as trace:
                image = pipe("...").images[0]

        Several guards may be attached to one pipeline, and detached in any order; `dagkit.guidance.combine` says how
        their changes add up. Nothing is left behind.

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
    def prepare(self, family: Family, pipe: Any) -> Sites | None:
        """Checks the pipeline and returns where the guard must look (None for global guards)."""

    def detect(self, context: Context) -> Tensor | None:
        """The detection map (B, H, W), for ``context.cam``; the features are let go of after it."""
        return None

    @abstractmethod
    def change(self, context: Context) -> Change | None:
        """The changed samples, or None to leave the output as it is."""


class BoundGuard:
    """A guard that was checked against a pipeline; ``PipelineGuard.bind`` makes it.

    Attributes:
        guard: what guards.
        pipe: the pipeline.
        family: what knows its parts.
        denoiser: of the pipeline.
        layout: how the pipeline calls it.
        sites: where the guard looks.
    """

    def __init__(self, guard: PipelineGuard, pipe: Any) -> None:
        self.guard, self.pipe = guard, pipe
        self.family, self.denoiser = _parts_of(pipe)
        self.layout = self.family.calls(pipe)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._conditions: dict[Encoding, Conditions] = {}
        self._check()

    @contextmanager
    def run(self) -> Iterator[Trace]:
        """Guards whatever the pipeline draws inside the ``with`` block; yields the trace.

        Another thread that comes meanwhile waits until the block is left.

        Raises:
            GuardError: the model was changed since the guard was bound, or the guard is at work in this thread already.
        """
        if self._owner == threading.get_ident():
            raise GuardError(
                f"this guard is guarding {type(self.pipe).__name__} in this thread already; draw inside that block, or "
                "bind the guard once more."
            )
        with self._lock, ExitStack() as stack:
            self._owner = threading.get_ident()
            stack.callback(setattr, self, "_owner", None)
            self._check_again()
            session = Session(self, stack)
            stack.enter_context(watched(self.pipe, session.tell_blackened))
            yield session.trace
            session.check_scheduler()

    def noise(self) -> NoiseSchedule:
        """How noisy the pipeline's latents are, by its scheduler of now.

        Raises:
            GuardError: the scheduler does not tell.
        """
        try:
            return self.family.noise(self.pipe)
        except ModelError as error:
            raise GuardError(f"{type(self.pipe).__name__} cannot be guarded: {error}") from error

    @torch.no_grad()
    def encoded(self, how: Encoding) -> Conditions:
        """The safety condition and the neutral ones, encoded in one way.

        Raises:
            GuardError: a text of the safety condition says nothing to this model, or something else.
        """
        if how not in self._conditions:
            is_one = not self.family.stand_side_by_side
            phrases = (self.guard.safety_prompt,) if is_one else self.guard.safety_phrases
            try:
                check_words(self.pipe, phrases)
            except ModelError as error:
                raise GuardError(f"{type(self.pipe).__name__} cannot be guarded: {error}") from error
            texts = self.family.encode_prompt(self.pipe, list(phrases), how)
            neutral = self.family.neutral_conditions(self.pipe, how)
            says_nothing = torch.stack([is_close(texts.hidden_states, one.hidden_states) for one in neutral]).any(0)
            if empty := [phrase for phrase, is_empty in zip(phrases, says_nothing.tolist(), strict=True) if is_empty]:
                raise GuardError(
                    f"the safety prompt {empty[0][:80]!r} says as much to {type(self.pipe).__name__} as an empty one, "
                    "so there is nothing to push away from. Use words that its text encoder knows."
                )
            self._conditions[how] = Conditions(texts.side_by_side(), neutral)
        return self._conditions[how]

    def _check(self) -> None:
        """All that takes time."""
        self._check_denoiser()
        self.sites = self.guard.prepare(self.family, self.pipe)
        self.noise()
        self._conditions.clear()
        self.encoded(Encoding())
        self._weighed = self._modules()
        self._seal = Seal(self._weighed)

    def _check_denoiser(self) -> None:
        """Whether a forward pass is a whole one, and is seen.

        Raises:
            GuardError: it is not.
        """
        name = type(self.denoiser).__name__
        if getattr(self.denoiser, "_compiled_call_impl", None) is not None:
            raise GuardError(
                f"{name} was compiled in place (.compile()), which hides it from hooks. Use pipe.unet = "
                "torch.compile(pipe.unet) instead."
            )
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise GuardError(
                f"{name} has a cache ({type(self.denoiser._cache_config).__name__}), which skips layers that a guard "
                "must see and would mix its own calls with the pipeline's. Call disable_cache() first."
            )
        if getattr(self.denoiser, "_parallel_config", None) is not None:
            raise GuardError(
                f"{name} is cut across devices (enable_parallelism), so each of them sees a part of the image or of "
                "its heads. Guard a model that is whole on one device."
            )

    def _check_again(self) -> None:
        """Whether pipeline and model are still those that were checked; checks them once more where they changed.

        Raises:
            GuardError: they cannot be guarded any longer, or the denoiser is another one.
        """
        if self.family.denoiser(self.pipe) is not self.denoiser:
            raise GuardError(
                f"{type(self.pipe).__name__} got another denoiser since the guard was bound. Bind the guard again."
            )
        modules = self._modules()
        is_same = len(modules) == len(self._weighed) and all(map(_is, modules, self._weighed))
        self._check_denoiser()
        if not is_same or not self._seal.is_whole():
            self._check()

    def _modules(self) -> list[nn.Module]:
        """Those whose weights the guard belongs to, as the pipeline has them now."""
        parts = self.family.weighed(self.pipe, self.sites or {})
        return [module for modules in parts.values() for module in modules]


class GuardContext:
    """A guard about to be attached to a pipeline; ``PipelineGuard.attach`` makes it, ``with`` enters it, once."""

    def __init__(self, guard: PipelineGuard, pipe: Any) -> None:
        self._handle: Any = None
        self._guard, self._pipe = guard, pipe
        self._stack = ExitStack()
        _, denoiser = _parts_of(pipe)
        self._handle = denoiser.register_forward_pre_hook(_refuse_until_entered)

    def __enter__(self) -> Trace:
        if self._handle is None:
            raise GuardError("this guard was attached before; call attach again for each with block.")
        self._wait_no_more()
        return self._stack.enter_context(self._guard.bind(self._pipe).run())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

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


def _parts_of(pipe: Any) -> tuple[Family, Any]:
    try:
        family = match(pipe)
        return family, family.denoiser(pipe)
    except ModelError as error:
        raise GuardError(f"{type(pipe).__name__} cannot be guarded: {error}") from error


def _is(one: object, other: object) -> bool:
    return one is other
