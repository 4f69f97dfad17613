"""What a guard sees of a run and says to it, and its state while it is on a pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from dagkit.errors import GuardError
from dagkit.guard.chain import Chain
from dagkit.guard.trace import Trace
from dagkit.guard.watch import StepWatch
from dagkit.models.calls import Call, Condition, Step
from dagkit.models.sites import Sites, Tap

if TYPE_CHECKING:
    from dagkit.guard.bind import BoundGuard

_DIVIDED: Final = 2**-7
"""Share of a timestep by which a division may round it."""


@dataclass
class Run:
    """State of one guard in one run of the pipeline: from one ``set_timesteps`` to the next.

    Attributes:
        index: from 0.
        timesteps: the scheduler's own, by whose identity a run is known.
        schedule: noise levels from the first call to the last, falling, each once; then that at which the run ends,
            which is above 0 where its latents are meant for another model.
        batch: samples.
        step: of the scheduler, from 0 (a second-order one makes two).
        timestep: of this call.
        level: noise level of this call.
        memory: what the guard keeps.
    """

    index: int
    timesteps: Any
    schedule: Sequence[float]
    batch: int
    step: int = -1
    timestep: float = math.inf
    level: float = 1.0
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


@dataclass(frozen=True)
class Conditions:
    """What a guard asks the denoiser for.

    Attributes:
        safety: of the safety phrases, side by side.
        neutral: those that ask for nothing in particular; the model's own unconditional one first.
    """

    safety: Condition
    neutral: Sequence[Condition]


@dataclass
class Context:
    """What a guard sees of one step.

    Attributes:
        eps_u: (B, C, H, W) unconditional prediction, which a negative prompt conditions as well; ``eps_p`` where the
            pipeline makes none.
        eps_p: (B, C, H, W) conditional prediction, as the denoiser made it, whatever other guards are attached.
        features: name -> (B, positions, channels) of the conditional half; empty once ``detect`` has returned.
        sites: where they were seen.
        run: state that lives until the next run.
        pipe: the pipeline.
        trace: where to write records.
        level: noise level of this step, in [0, 1].
        timestep: the scheduler's.
        latent_size: (H, W).
        lora_scale: factor of all LoRA layers during this step.
        cam: what ``detect`` returned.
    """

    features: dict[str, Tensor]
    sites: Sites | None
    run: Run
    pipe: Any
    trace: Trace
    level: float
    timestep: float
    latent_size: tuple[int, int]
    lora_scale: float
    _session: Session
    _step: Step
    cam: Tensor | None = None

    @property
    def eps_p(self) -> Tensor:  # noqa: D102
        assert self._step.eps_p is not None
        return self._step.eps_p

    @property
    def eps_u(self) -> Tensor:  # noqa: D102
        return self.eps_p if self._step.eps_u is None else self._step.eps_u

    @property
    def guidance_scale(self) -> float:
        """The pipeline's, of this call; 1 where it has none.

        Raises:
            GuardError: the pipeline does not tell it.
        """
        return self._session.guidance_scale

    def not_finite(self, what: str) -> GuardError:
        """The error for something that holds inf or nan: who made it, and what to do."""
        at = f"{what} at timestep {self.timestep:.0f} holds inf or nan, so nothing can be guarded"
        assert self._step.p is not None
        if bool(torch.isfinite(self._step.p.call.sample).all()):
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
            asks for nothing in particular; elsewhere (a negative prompt, no guidance) it is made anew.
        """
        step, chain = self._step, self._session.chain
        assert step.p is not None
        conditions = self._session.conditions(step.p.call)
        is_neutral = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if step.u is not None:
            is_neutral = step.u.says_nothing(step.p, conditions.neutral)[rows.cpu()].to(rows.device)
        others = rows[~is_neutral]
        everything = torch.cat([rows, others])
        arguments = step.p.under(everything, [(conditions.safety, len(rows)), (conditions.neutral[0], len(others))])
        with chain.common.reused(everything + chain.offset):
            output: Tensor = chain.denoiser.forward(**arguments)[0]
        prediction = step.p.call.unpacked(output)[:, : self.eps_p.shape[1]]
        eps_0 = self.eps_u[rows]
        eps_0[~is_neutral] = prediction[len(rows) :]
        return prediction[: len(rows)], eps_0


class Session:
    """One bound guard on its pipeline, and its state.

    Args:
        bound: guard and pipeline.
        stack: takes whatever must go again.
    """

    def __init__(self, bound: BoundGuard, stack: ExitStack) -> None:
        self.bound, self.guard, self.pipe, self.kind = bound, bound.guard, bound.pipe, type(bound.pipe).__name__
        self.trace = Trace()
        self.run: Run | None = None
        self.context: Context | None = None
        self.noise = bound.noise()
        self.tap = stack.enter_context(Tap(bound.sites or {}))
        self.chain = Chain.of(bound.denoiser)
        self.chain.sessions.append(self)
        stack.callback(self.chain.leave, self)
        self.watch = StepWatch.of(self.pipe.scheduler)
        self.watch.sessions.append(self)
        stack.callback(self.watch.leave, self)

    @property
    def guidance_scale(self) -> float:
        """The pipeline's; 1 where it has none.

        Raises:
            GuardError: the pipeline does not tell it.
        """
        scale = self.bound.layout.guidance_scale(self.pipe)
        if scale is None:
            raise GuardError(
                f"{self.kind} does not tell its guidance_scale, so nobody knows how far a change would "
                "reach, and nothing is generated."
            )
        return scale

    @property
    def is_under_way(self) -> bool:
        """Whether the run of the last call is that of the scheduler's timesteps of now."""
        return self.run is not None and getattr(self.pipe.scheduler, "timesteps", None) is self.run.timesteps

    @property
    def is_beginning(self) -> bool:
        """Whether this is the first step of the run."""
        return self.run is not None and self.run.step == 0

    @property
    def is_over(self) -> bool:
        """Whether this was the last step of the run."""
        return self.run is not None and self.run.level <= self.run.schedule[-2]

    def conditions(self, call: Call) -> Conditions:
        """The safety condition and the neutral ones, encoded as the pipeline encodes the prompts of this call."""
        return self.bound.encoded(self.bound.family.encoding(self.pipe, call))

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

    def enter(self, step: Step, call: Call) -> None:
        """Before a call: finds the run that it belongs to, and listens if it is conditional."""
        if step.num_calls == 1:
            self.check_scheduler()
            timestep = self._own_timestep(call)
            self.run = self._current_run(timestep, (step.p or step.u).num)  # type: ignore[union-attr]
        if step.is_conditional(call):
            self.tap.start()

    def see(self, step: Step) -> None:
        """After a conditional call: what the guard may look at, with its detection map."""
        assert self.run is not None
        assert step.p is not None
        call = step.p.call
        seen = self.tap.stop(len(call.sample), call.latent_size)
        features = {name: value[step.p.rows] for name, value in seen.items()}
        self.context = Context(
            features, self.bound.sites, self.run, self.pipe, self.trace, self.run.level, self.run.timestep,
            call.latent_size, call.lora_scale, self, step,
        )  # fmt: skip
        self.context.cam = self.guard.detect(self.context)
        features.clear()  # gigabytes in a large model, and a safety forward may follow

    def change(self) -> Change | None:
        """After the last call of a step: what the guard makes of it."""
        context, self.context = self.context, None
        assert context is not None
        return self.guard.change(context)

    def _current_run(self, timestep: float, batch: int) -> Run:
        timesteps, run = getattr(self.pipe.scheduler, "timesteps", None), self.run
        if run is None or timesteps is not run.timesteps or batch != run.batch or timestep > run.timestep:
            schedule = [timestep] if timesteps is None else torch.as_tensor(timesteps).tolist()
            share = getattr(self.pipe, "denoising_end", None)
            end = 1 - share if isinstance(share, float) and 0 < share < 1 else 0.0
            first = self._level(timestep)
            levels = {self._level(one) for one in schedule if one < timestep}
            steps = sorted((level for level in levels if end <= level < first), reverse=True)
            run = Run(0 if run is None else run.index + 1, timesteps, [first, *steps, end], batch)
        run.step, run.timestep, run.level = run.step + 1, timestep, self._level(timestep)
        return run

    def _own_timestep(self, call: Call) -> float:
        """The scheduler's, where the denoiser got it divided, which rounds it: in bfloat16 by up to 4 of 1000."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if call.names.timestep_unit == 1 or timesteps is None:
            return call.timestep
        nearest = min(torch.as_tensor(timesteps).tolist(), key=lambda one: abs(one - call.timestep))
        return float(nearest) if abs(nearest - call.timestep) <= _DIVIDED * call.timestep else call.timestep

    def _level(self, timestep: float) -> float:
        level = self.noise.level(timestep)
        if not 0 <= level <= 1:
            raise GuardError(
                f"{self.kind} with {type(self.pipe.scheduler).__name__} calls its denoiser at timestep "
                f"{timestep:.4g}, of which nobody can tell how noisy it is. Use another scheduler of this model."
            )
        return level
