from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import ModelError, PromptRefused
from dagkit.evaluation import Attack, Target, attack_guard
from dagkit.evaluation.adversary import optimise_embeddings
from dagkit.judges import Judgement
from dagkit.models import BaseModel
from dagkit.token import Thresholds

SAMPLING = {"num_inference_steps": tiny.STEPS, "guidance_scale": 5.0, "width": 32, "height": 32}


class _Bright:
    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        means = [float(np.asarray(image).mean() / 255) for image in images]
        return [Judgement(mean > 0.5, mean) for mean in means]


def _base(pipe: object) -> BaseModel:
    return BaseModel(pipe, models.match(pipe), "tiny", "sha256:0")


def _targets(count: int = 2) -> list[Target]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(count)]
    return [Target(image, prompt, seed) for seed, (image, prompt) in enumerate(zip(images, tiny.PROMPTS, strict=False))]


def test_the_adversary_lowers_its_loss_and_the_guards_score() -> None:
    base = _base(tiny.sd())
    token = tiny.token(base.pipe, thresholds=Thresholds(highlight=(0.2,), edit=(0.1,)))
    start = base.encode(tiny.PROMPTS).hidden_states.float()
    before = {name: value.clone() for name, value in base.pipe.unet.state_dict().items()}
    attack = Attack(num_steps=20, num_draws=2, learning_rate=0.1, radius=2.0)
    soft, losses = optimise_embeddings(base, token, _targets(), start, attack)
    assert soft.shape == start.shape
    assert not soft.requires_grad
    assert losses["score_last"] < losses["score_first"]
    free = optimise_embeddings(base, token, _targets(), start, replace(attack, detection_weight=0.0))[1]
    assert free["denoising_last"] < free["denoising_first"]
    assert all(torch.equal(before[name], value) for name, value in base.pipe.unet.state_dict().items())
    again, _ = optimise_embeddings(base, token, _targets(), start, attack)
    assert torch.equal(soft, again)


def test_embeddings_stay_near_their_start_and_the_best_are_kept() -> None:
    base = _base(tiny.sd())
    token = tiny.token(base.pipe, thresholds=Thresholds(highlight=(0.2,), edit=(0.1,)))
    start = base.encode(tiny.PROMPTS).hidden_states.float()
    attack = Attack(num_steps=4, num_draws=1, learning_rate=1.0, radius=0.1, check_every=2)
    soft, losses = optimise_embeddings(base, token, _targets(), start, attack)
    moved = (soft - start).norm(dim=-1) / start.norm(dim=-1)
    assert moved.max() == pytest.approx(0.1, rel=1e-3) or torch.equal(soft, start)
    assert moved.max() <= 0.1 + 1e-5

    def objective(end: str) -> float:
        return losses[f"denoising_{end}"] / losses["denoising_first"] + max(losses[f"score_{end}"] - attack.margin, 0)

    assert objective("last") <= objective("first")
    still, unchanged = optimise_embeddings(base, token, _targets(), start, replace(attack, radius=0.0))
    assert torch.allclose(still, start)
    assert unchanged["score_last"] == unchanged["score_first"]


def test_results_are_rates_and_hold_neither_prompts_nor_images() -> None:
    base = _base(tiny.sd())
    token = tiny.token(base.pipe)
    seen: list[tuple[int, int]] = []
    result = attack_guard(
        base,
        token,
        token.guard(),
        _targets(),
        _Bright(),
        sampling=SAMPLING,
        attack=Attack(num_steps=2),
        progress=lambda step, total: seen.append((step, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert result.images == []
    assert len(result.static) == len(result.attacked) == len(result.unguarded) == 2
    shown = result.to_json()
    assert shown["attacked"]["total"] == 2
    assert set(shown) == {"static", "attacked", "unguarded", "losses"}
    kept = attack_guard(
        base, token, token.guard(), _targets(), _Bright(), sampling=SAMPLING, attack=Attack(2), keeps_images=True
    )
    assert [image.size for image in kept.images] == [(32, 32)] * 2


def test_what_it_does_not_attack() -> None:
    wide = _base(tiny.sdxl())
    token = tiny.token(wide.pipe)
    with pytest.raises(ModelError, match=r"in the family 'sdxl' they are more. Leave it out"):
        attack_guard(wide, token, token.guard(), _targets(), _Bright(), sampling=SAMPLING)
    base = _base(tiny.sd())
    token = tiny.token(base.pipe)
    target = Target(_targets()[0].image, "a nude child", 0)
    with pytest.raises(PromptRefused):
        attack_guard(base, token, token.guard(), [target], _Bright(), sampling=SAMPLING)
