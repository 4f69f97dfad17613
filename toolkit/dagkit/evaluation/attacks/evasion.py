"""White-box attacks: they know model, token and guard, and optimise what no user can send, embeddings and noise.

A guard that never acts leaves a picture bit-equal. So the attack looks for a run whose unguarded end shows the concept
as before, and in which the guard's score stays below its threshold of certainty at every step: both are smooth, while
the guard's own change is not. Gradients go through the whole run. A step that loses the concept is taken back.
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL.Image import Image, new
from torch import Tensor

from dagkit.errors import ModelError
from dagkit.evaluation.attacks.defence import Trail
from dagkit.generation import generate_from_embeddings, latents_from_embeddings
from dagkit.models.calls import Step
from dagkit.models.sites import Detector, Tap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dagkit.evaluation.attacks.defence import Defence, Target
    from dagkit.guard import BoundGuard
    from dagkit.models import BaseModel
    from dagkit.models.calls import Call
    from dagkit.token import GuidelineToken

_LEAST: Final = 1e-9


@dataclass(frozen=True)
class Evasion:
    """How the attack works.

    Attributes:
        is_soft: optimises the prompt's embedding.
        is_noise: optimises the noise that the run begins with, always rescaled to the length that noise has.
        step_size: of the first step: root mean square of the change, relative to that of the embedding or noise.
        momentum: share of the last direction in the next one.
        radius: how far each row of an embedding may go from its start, relative to the row's own length; no bound
            where None.
        fidelity: weight of what is lost of the concept, beside the guard's score.
        max_loss: what may be lost, relative to what the guard takes away; a step that loses more is taken back.
        margin: share of the threshold of certainty below which the guard's score is not pushed further.
    """

    is_soft: bool = True
    is_noise: bool = False
    step_size: float = 0.05
    momentum: float = 0.7
    radius: float | None = None
    fidelity: float = 3.0
    max_loss: float = 0.2
    margin: float = 0.5


def check_evasion(base_model: BaseModel) -> None:
    """Refuses a base model that `evade` cannot attack.

    Raises:
        ModelError: its prompts are more than one embedding.
    """
    condition = base_model.encode([""])
    if condition.added or condition.mask is not None:
        raise ModelError(
            f"{base_model.source}: attacks on embeddings and noise know models whose prompts are one embedding, as "
            f"Stable Diffusion 1.x and 2.x, but in the family {base_model.family.name!r} they are more. Attack this "
            "model with words."
        )


def evade(
    base_model: BaseModel,
    token: GuidelineToken,
    guard: BoundGuard,
    defence: Defence,
    targets: Sequence[Target],
    *,
    sampling: dict[str, Any],
    num_queries: int,
    settings: Evasion | None = None,
    context: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Trail]:
    """Optimises embeddings, noise or both, one guarded picture a step, until each target has one past everything.

    Args:
        base_model: one whose prompts are one embedding.
        token: whose detection the attack knows and avoids.
        guard: draws the pictures that count.
        defence: looks at them.
        targets: B, attacked together; memory grows with B and with the steps of a run.
        sampling: as of `dagkit.generation.generate_images`.
        num_queries: guarded pictures a target, that of the unchanged prompt included; >= 1.
        settings: constants.
        context: what the images are for, for the check of the prompts.
        progress: told the query and the number of queries.

    Raises:
        ModelError: the base model's prompts are more than one embedding.
        PromptRefused: a target's prompt sexualises minors; nothing was drawn.
    """
    check_evasion(base_model)
    settings = settings or Evasion()
    prompts, seeds = [one.prompt for one in targets], [one.seed for one in targets]
    trails = [Trail(target) for target in targets]
    search = _Search(settings, base_model.encode(prompts).hidden_states.float(), _noise(base_model, seeds, sampling))

    def ask() -> list[Image]:
        with guard.run() as trace:
            images = generate_from_embeddings(
                base_model, search.embeddings, prompts, seeds, settings=sampling, noise=search.noise, context=context
            )
        seen = [bool(trace.summary(sample)["is_firing"]) for sample in range(len(images))]
        for trail, query in zip(trails, defence.look(targets, images, seen), strict=True):
            trail.queries.append(query)
        return images

    guarded = base_model.latents(ask()).float()
    progress(1, num_queries)
    aim: _Aim | None = None
    for number in range(1, num_queries):
        embeddings, noise = search.variables()
        with _listening(base_model, token, settings.margin) as heard:
            latents = latents_from_embeddings(
                base_model, embeddings, prompts, noise, settings=sampling, context=context
            ).float()
        score = torch.stack(heard).sum(0)
        aim = aim or _Aim(latents.detach(), guarded, score.detach())
        lost = aim.lost(latents)
        loss = score / aim.score + settings.fidelity * lost
        gradients = torch.autograd.grad(loss.sum(), search.moving(embeddings, noise))
        search.step(gradients, lost.detach() > settings.max_loss)
        ask()
        progress(number + 1, num_queries)
        if all(trail.is_over for trail in trails):
            break
    return trails


def _noise(base_model: BaseModel, seeds: Sequence[int], sampling: dict[str, Any]) -> Tensor:
    """(B, C, h, w): what a pipeline begins with for these seeds."""
    blank = new("RGB", (sampling["width"], sampling["height"]))
    shape = base_model.latents([blank]).shape
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(
        base_model.device
    )


class _Aim:
    """What the attack wants: the latents of the unguarded run, where the guard changes them.

    Args:
        wanted: (B, C, h, w), with the concept.
        guarded: (B, C, h, w), without it.
        score: (B,) of the guard, of the first run.
    """

    def __init__(self, wanted: Tensor, guarded: Tensor, score: Tensor) -> None:
        self.wanted, self.score = wanted, score.clamp_min(_LEAST)
        change = (guarded - wanted).square().mean(1, keepdim=True)
        self._weights = change / change.sum((2, 3), keepdim=True).clamp_min(_LEAST)
        self._taken = self._weighted(guarded)

    def _weighted(self, latents: Tensor) -> Tensor:
        return (self._weights * (latents - self.wanted).square()).sum((1, 2, 3))

    def lost(self, latents: Tensor) -> Tensor:
        """(B,) how far latents are from what is wanted, relative to guarded ones; differentiable."""
        return self._weighted(latents) / self._taken.clamp_min(_LEAST)


class _Search:
    """Where the attack is, and how it goes on: normalised gradients with momentum, a step length a target."""

    def __init__(self, settings: Evasion, embeddings: Tensor, noise: Tensor) -> None:
        self._settings, self._start = settings, embeddings
        self.embeddings, self.noise = embeddings, noise
        self._length = torch.full((len(noise),), settings.step_size, device=noise.device)
        self._direction: list[Tensor] = [torch.zeros_like(one) for one in self.moving(embeddings, noise)]
        self._good: tuple[list[Tensor], list[Tensor]] | None = None

    def variables(self) -> tuple[Tensor, Tensor]:
        """Embeddings and noise, those that are optimised with gradients."""
        embeddings, noise = self.embeddings.clone(), self.noise.clone()
        for one in self.moving(embeddings, noise):
            one.requires_grad_(True)
        return embeddings, noise

    def moving(self, embeddings: Tensor, noise: Tensor) -> list[Tensor]:
        """Of these two, what is optimised."""
        return [embeddings] * self._settings.is_soft + [noise] * self._settings.is_noise

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], is_lost: Tensor) -> None:
        """Goes on; from the last good place, and half as far, where the concept ``is_lost`` (B,) here."""
        places = self.moving(self.embeddings, self.noise)
        slopes = [one.float() for one in gradients]
        if self._good is not None:
            places = [_where(is_lost, old, new) for old, new in zip(self._good[0], places, strict=True)]
            slopes = [_where(is_lost, old, new) for old, new in zip(self._good[1], slopes, strict=True)]
            self._direction = [_where(is_lost, torch.zeros_like(one), one) for one in self._direction]
        self._good = places, slopes
        self._length *= torch.where(is_lost, 0.5, 1.1)
        share = self._settings.momentum
        self._direction = [
            share * old + (1 - share) * _unit(new) for old, new in zip(self._direction, slopes, strict=True)
        ]
        moved = [
            place - _column(self._length, place) * _rms(place) * _unit(way)
            for place, way in zip(places, self._direction, strict=True)
        ]
        if self._settings.is_noise:
            self.noise = moved.pop()
            self.noise = self.noise / _rms(self.noise)
        if self._settings.is_soft:
            self.embeddings = _near(moved.pop(), self._start, self._settings.radius)


def _rms(value: Tensor) -> Tensor:
    """(B, 1, ..): the root mean square of each row."""
    return _column(value.flatten(1).square().mean(1).sqrt().clamp_min(_LEAST), value)


def _unit(value: Tensor) -> Tensor:
    return value / _rms(value)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(_column(condition, yes), yes, no)


def _near(embeddings: Tensor, start: Tensor, radius: float | None) -> Tensor:
    """Rows at most ``radius`` times their first length away from their start."""
    if radius is None:
        return embeddings
    change = embeddings - start
    limit = radius * start.norm(dim=-1, keepdim=True)
    share: Tensor = (limit / change.norm(dim=-1, keepdim=True).clamp_min(_LEAST)).clamp_max(1)
    return start + change * share


@contextmanager
def _listening(base_model: BaseModel, token: GuidelineToken, margin: float) -> Iterator[list[Tensor]]:
    """Lists, for every step in which the guard could act, how far above the margin its score is, (B,) each.

    Unlike the score itself, which is one cell, this is the mean over the cells that decide.
    """
    family, pipe, limits = base_model.family, base_model.pipe, token.record.thresholds
    denoiser, layout = family.denoiser(pipe), family.calls(pipe)
    sites = family.sites(pipe, token.record.layers)
    detector = Detector(sites, token.sequence, token.num_tokens, token.head_weights)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    heard: list[Tensor] = []
    step = Step()
    seen: list[Call] = []

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal step
        if step.num_calls >= layout.num_calls:
            step = Step()
        call = layout.enter(type(pipe).__name__, step, dict(zip(names, args, strict=False)) | kwargs)
        if step.is_conditional(call):
            seen.append(call)
            tap.start()

    def after(_module: Any, _args: Any, _output: Any) -> None:
        if not seen:
            return
        call = seen.pop()
        features = tap.stop(len(call.sample), call.latent_size)
        level = base_model.schedule.level(call.timestep)
        if level > token.record.guidance.max_level:
            return
        assert step.p is not None
        cam = detector({name: value[step.p.rows] for name, value in features.items()}, call.latent_size)
        num = max(math.ceil(limits.min_area * cam[0].numel()), 1)
        excess = cam.flatten(1).topk(num).values / max(limits.certain_at(level), 1e-3) - margin
        heard.append(excess.clamp_min(0).mean(1))

    with Tap(sites) as tap, ExitStack() as stack:
        stack.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(after).remove)
        yield heard
