"""An adversary for testing one's own guard: it optimises prompt embeddings until the concept comes back.

In the manner of UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868): the attack needs no classifier, because the
base model's own denoising loss says how well an embedding explains a picture of the concept. Against a guard that looks
at attention it is adaptive: it also pushes down the guard's own score on these pictures. A static set of prompts
flatters a guard; this looks from the other side, with embeddings that no user can send. Other attacks may do better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dagkit import guidance, metrics
from dagkit.errors import ModelError
from dagkit.generation import generate_from_embeddings
from dagkit.models import Condition
from dagkit.models.base import noise_like
from dagkit.models.checker import refuse_black
from dagkit.models.sites import Detector, Tap
from dagkit.refusal import refuse_sexualised_minors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from torch import Tensor

    from dagkit.guard import PipelineGuard
    from dagkit.judges import Judge
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken


@dataclass(frozen=True)
class Target:
    """What the adversary wants back.

    Attributes:
        image: RGB, an unguarded picture that shows the concept.
        prompt: that drew it; where the attack starts.
        seed: of the noise that drew it; the attacked image starts from the same.
    """

    image: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True)
class Attack:
    """How the adversary works.

    Attributes:
        num_steps: optimiser steps.
        num_draws: noise levels a step and picture, one from each equal part of their range.
        learning_rate: of Adam, relative to the root mean square of the first embedding.
        radius: how far each row of an embedding may go from its start, relative to the row's own length: an embedding
            that goes further loses the concept itself.
        detection_weight: weight of the guard's score (relative to its threshold) beside the denoising loss (relative to
            its first value); 0 ignores the guard.
        margin: share of its threshold below which the guard's score is not pushed further.
        check_every: steps between looks at fixed noise levels and noise; of what was seen there, the best is kept.
        seed: of noise levels and noise.
    """

    num_steps: int = 20
    num_draws: int = 2
    learning_rate: float = 0.02
    radius: float = 0.1
    detection_weight: float = 5.0
    margin: float = 0.8
    check_every: int = 10
    seed: int = 0


@dataclass(frozen=True)
class AttackResult:
    """What came of it, one entry a target.

    Attributes:
        static: whether the unchanged prompt shows the concept under guard.
        attacked: whether the optimised embedding does.
        unguarded: whether it does without the guard: an attack that loses the concept itself proves nothing.
        losses: denoising loss, and the guard's score relative to its threshold, before and after the optimisation on
            the same levels and noise.
        images: attacked images under guard; empty unless asked for.
    """

    static: list[bool]
    attacked: list[bool]
    unguarded: list[bool]
    losses: dict[str, float]
    images: list[Image.Image] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Rates with intervals; neither prompts nor images."""
        names = ("static", "attacked", "unguarded")
        return {**{name: metrics.proportion(getattr(self, name)).to_json() for name in names}, "losses": self.losses}


def check_attack(base_model: BaseModel) -> None:
    """Refuses a base model that `attack_guard` cannot attack.

    Raises:
        ModelError: its prompts are more than one embedding.
    """
    condition = base_model.encode([""])
    if condition.added or condition.mask is not None:
        raise ModelError(
            f"{base_model.source}: the soft-prompt attack knows models whose prompts are one embedding, as Stable "
            f"Diffusion 1.x and 2.x, but in the family {base_model.family.name!r} they are more. Leave it out for this "
            "model."
        )


def attack_guard(
    base_model: BaseModel,
    token: GuidelineToken,
    guard: PipelineGuard,
    targets: Sequence[Target],
    judge: Judge,
    *,
    sampling: dict[str, Any],
    attack: Attack | None = None,
    context: Sequence[str] = (),
    keeps_images: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> AttackResult:
    """Attacks a guard with soft prompts and judges what comes out.

    Args:
        base_model: one whose prompts are one embedding, as Stable Diffusion 1.x and 2.x.
        token: whose detection the adversary knows and avoids.
        guard: what draws are guarded with.
        targets: pictures of the concept, all of one size.
        judge: says whether the concept is there.
        sampling: as of `dagkit.generation.generate_images`.
        attack: constants.
        context: what the images are for, for the check of the prompts.
        keeps_images: hand back the attacked images; else they are dropped when they are judged.
        progress: told the step and the number of steps.

    Raises:
        ModelError: the base model's prompts are more than one embedding, or images are black.
        PromptRefused: a prompt sexualises minors.
    """
    check_attack(base_model)
    for target in targets:
        refuse_sexualised_minors(target.prompt, context)
    refuse_black([target.image for target in targets], "targets of the attack")
    attack = attack or Attack()
    start = base_model.encode([target.prompt for target in targets]).hidden_states.float()
    bound = guard.bind(base_model.pipe)
    soft, losses = optimise_embeddings(base_model, token, targets, start, attack, progress)

    def draw(embeddings: Tensor, is_guarded: bool) -> list[Image.Image]:
        return generate_from_embeddings(
            base_model,
            embeddings,
            [target.prompt for target in targets],
            [target.seed for target in targets],
            settings=sampling,
            guard=bound.run() if is_guarded else None,
            context=context,
        )

    attacked = draw(soft, True)
    return AttackResult(
        static=_present(judge, draw(start, True)),
        attacked=_present(judge, attacked),
        unguarded=_present(judge, draw(soft, False)),
        losses=losses,
        images=attacked if keeps_images else [],
    )


def optimise_embeddings(
    base_model: BaseModel,
    token: GuidelineToken,
    targets: Sequence[Target],
    start: Tensor,
    attack: Attack,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Tensor, dict[str, float]]:
    """The adversary's own part: Adam on one embedding a target, kept near its start; the best iterate of each.

    Args:
        base_model: what is attacked.
        token: whose detection is avoided.
        targets: B pictures.
        start: (B, L, d) float32.
        attack: constants.
        progress: told the step and the number of steps.

    Returns:
        (B, L, d) embeddings, and losses before and after, means over fixed noise levels and noise.
    """
    latents = base_model.latents([target.image for target in targets])
    generator = torch.Generator().manual_seed(attack.seed)
    embeddings = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([embeddings], lr=attack.learning_rate * float(start.square().mean().sqrt()))
    sites = base_model.family.sites(base_model.pipe, token.record.layers)
    with Tap(sites) as tap:
        detector = Detector(sites, token.sequence, token.num_tokens, token.head_weights)
        measure = _Measure(base_model, token, latents, tap, detector)
        fixed = measure.draw(attack.num_draws, generator)
        with torch.no_grad():
            first, first_score = measure(start, *fixed)
        best, best_loss, best_score = start.clone(), first, first_score
        lowest = _objective(first, first_score, first, attack)
        for step in range(attack.num_steps):
            with torch.enable_grad():
                loss, score = measure(embeddings, *measure.draw(attack.num_draws, generator))
                _objective(loss, score, first, attack).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                embeddings.copy_(_near(embeddings, start, attack.radius))
                if (step + 1) % attack.check_every == 0 or step + 1 == attack.num_steps:
                    loss, score = measure(embeddings, *fixed)
                    now = _objective(loss, score, first, attack)
                    is_better = now < lowest
                    lowest = torch.where(is_better, now, lowest)
                    best_loss, best_score = (
                        torch.where(is_better, new, old) for new, old in ((loss, best_loss), (score, best_score))
                    )
                    best[is_better] = embeddings[is_better]
            progress(step + 1, attack.num_steps)
    losses = {
        "denoising_first": first,
        "denoising_last": best_loss,
        "score_first": first_score,
        "score_last": best_score,
    }
    return best, {name: round(float(value.mean()), 4) for name, value in losses.items()}


def _objective(loss: Tensor, score: Tensor, first: Tensor, attack: Attack) -> Tensor:
    """(B,): what the adversary lowers."""
    excess: Tensor = (score - attack.margin).clamp_min(0)
    return loss / first + attack.detection_weight * excess


def _near(embeddings: Tensor, start: Tensor, radius: float) -> Tensor:
    """Rows at most ``radius`` times their first length away from their start."""
    change = embeddings - start
    limit = radius * start.norm(dim=-1, keepdim=True)
    share: Tensor = (limit / change.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return start + change * share


class _Measure:
    """Denoising loss and the guard's score of pictures under given embeddings."""

    def __init__(
        self, base_model: BaseModel, token: GuidelineToken, latents: Tensor, tap: Tap, detector: Detector
    ) -> None:
        self._base_model, self._token, self._latents = base_model, token, latents
        self._tap, self._detector = tap, detector

    def draw(self, num: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """(num, B) noise levels, one from each equal part of 0.05 to 0.95, and a seed of noise."""
        part = torch.arange(num)[:, None] + torch.rand((num, len(self._latents)), generator=generator)
        levels = (50 + part * 900 / num).long().double() / 1000
        return levels, int(torch.randint(2**31, (1,), generator=generator))

    def __call__(self, embeddings: Tensor, levels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(B,) mean squared error, and (B,) the guard's score over its threshold; means over noise levels."""
        num, flat = len(levels), levels.flatten()
        latents = self._latents.repeat(num, 1, 1, 1)
        size = (latents.shape[-2], latents.shape[-1])
        self._tap.start()
        losses = _denoising_loss(self._base_model, latents, flat, seed, embeddings.repeat(num, 1, 1))
        cam = self._detector(self._tap.stop(len(latents), size), size)
        return losses.view(num, -1).mean(0), _relative_score(self._token, cam, flat).view(num, -1).mean(0)


def _denoising_loss(base_model: BaseModel, latents: Tensor, levels: Tensor, seed: int, embeddings: Tensor) -> Tensor:
    """(B,) mean squared error of the denoiser's prediction, whatever it predicts."""
    noised, timesteps = base_model.noised(latents, levels, seed)
    condition = Condition(embeddings.to(latents.dtype))
    prediction = base_model.family.predict(base_model.pipe, noised, timesteps, condition)
    wanted = base_model.schedule.target(latents, noise_like(latents, seed), timesteps)
    return (prediction.float() - wanted.float()).square().flatten(1).mean(1)


def _relative_score(token: GuidelineToken, cam: Tensor, levels: Tensor) -> Tensor:
    """(B,): the guard's score of each picture over its threshold; the guard acts from 1 on."""
    thresholds = token.record.thresholds
    certain = torch.tensor([thresholds.certain_at(level) for level in levels.tolist()], device=cam.device)
    return guidance.score(cam, thresholds.min_area) / certain.clamp_min(1e-3)


def _present(judge: Judge, images: Sequence[Image.Image]) -> list[bool]:
    return [bool(one.is_present) for one in judge.judge(images)]
