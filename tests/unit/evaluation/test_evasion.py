"""The white-box attacks, on a model of Stable Diffusion's shape with random weights."""

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
from dagkit.evaluation import PipelineColumn
from dagkit.evaluation.attacks import Defence, Evasion, SecondLook, Target, Trail, evade
from dagkit.evaluation.attacks.evasion import _Search
from dagkit.generation import generate_from_embeddings, generate_images, latents_from_embeddings
from dagkit.judges import Judge, Judgement
from dagkit.models import BaseModel
from dagkit.token import Thresholds

SAMPLING = {"num_inference_steps": tiny.STEPS, "guidance_scale": 5.0, "width": 32, "height": 32}
TARGETS = [Target(prompt, 40 + number) for number, prompt in enumerate(tiny.PROMPTS)]
THRESHOLDS = Thresholds(highlight=(0.05,), edit=(0.01,), min_area=0.0)


class Bright(Judge):
    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        means = [float(np.asarray(image).mean() / 255) for image in images]
        return [Judgement(mean > 0.5, mean) for mean in means]


@pytest.fixture
def base() -> BaseModel:
    pipe = tiny.sd()
    return BaseModel(pipe, models.match(pipe), "tiny", "sha256:0")


def attack(
    base: BaseModel, *, targets: Sequence[Target] = TARGETS, num_queries: int = 3, **settings: object
) -> list[Trail]:
    token = tiny.token(base.pipe, thresholds=THRESHOLDS)
    defence = Defence(PipelineColumn("dagkit", base, SAMPLING), Bright(), {"second_look": SecondLook(base, token)})
    bound = token.guard().bind(base.pipe)
    options = {"sampling": SAMPLING, "num_queries": num_queries, "settings": Evasion(**settings)}  # type: ignore[arg-type]
    return evade(base, token, bound, defence, targets, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("is_soft", "is_noise"), [(True, False), (False, True), (True, True)])
def test_every_query_is_a_guarded_picture_and_the_first_is_the_prompt_itself(
    base: BaseModel, is_soft: bool, is_noise: bool
) -> None:
    before = {name: value.clone() for name, value in base.pipe.unet.state_dict().items()}
    trails = attack(base, is_soft=is_soft, is_noise=is_noise, step_size=0.5)
    token = tiny.token(base.pipe, thresholds=THRESHOLDS)
    with token.guard().attach(base.pipe):
        plain = generate_images(base, tiny.PROMPTS, [one.seed for one in TARGETS], settings=SAMPLING)
    for trail, target, image in zip(trails, TARGETS, plain, strict=True):
        assert [(one.prompt, one.seed) for one in trail.queries] == [(target.prompt, target.seed)] * 3
        first = np.asarray(trail.queries[0].image, np.int16)
        assert np.abs(first - np.asarray(image, np.int16)).max() <= 1
        is_changed = any(one.score != trail.queries[0].score for one in trail.queries)
        assert is_changed or not is_noise  # what the text says is dropped where this guard acts
        assert all(one.is_seen for one in trail.queries)
        assert set(trail.queries[0].found) == {"second_look"}
    assert all(torch.equal(before[name], value) for name, value in base.pipe.unet.state_dict().items())
    again = attack(base, is_soft=is_soft, is_noise=is_noise, step_size=0.5)
    assert [one.score for one in again[0].queries] == [one.score for one in trails[0].queries]


def test_the_runs_that_are_optimised_are_those_that_are_drawn(base: BaseModel) -> None:
    seeds = [one.seed for one in TARGETS]
    embeddings = base.encode(tiny.PROMPTS).hidden_states
    noise = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    wanted = embeddings.clone().requires_grad_(True)
    latents = latents_from_embeddings(base, wanted, tiny.PROMPTS, noise.requires_grad_(True), settings=SAMPLING)
    slopes = torch.autograd.grad(latents.square().sum(), [wanted, noise])
    assert all(bool(torch.isfinite(one).all()) and one.abs().max() > 0 for one in slopes)
    images = generate_from_embeddings(base, embeddings, tiny.PROMPTS, seeds, settings=SAMPLING, noise=noise.detach())
    assert (base.latents(images) - latents).shape == latents.shape
    with pytest.raises(ModelError, match="hands out no latents"):
        latents_from_embeddings(base, embeddings, tiny.PROMPTS, noise.detach(), settings=SAMPLING)
    with pytest.raises(PromptRefused):
        latents_from_embeddings(base, wanted, ["a nude child", "x"], noise, settings=SAMPLING)
    with pytest.raises(ModelError, match="expected a prompt and a seed for each of 2 embeddings"):
        latents_from_embeddings(base, wanted, tiny.PROMPTS[:1], noise, settings=SAMPLING)


def test_a_step_that_loses_the_concept_is_taken_back_and_noise_keeps_its_length() -> None:
    settings = Evasion(is_noise=True, step_size=0.2, radius=0.5)
    start, noise = torch.ones(2, 3, 8), torch.ones(2, 4, 4, 4)
    search = _Search(settings, start, noise)
    slopes = [torch.randn_like(start), torch.randn_like(noise)]
    search.step(slopes, torch.tensor([False, False]))
    first = search.embeddings.clone()
    assert search.noise.square().mean((1, 2, 3)).tolist() == pytest.approx([1.0, 1.0])
    assert not torch.equal(first, start)
    search.step([-one for one in slopes], torch.tensor([True, False]))
    moved = (search.embeddings - start).norm(dim=(1, 2)) / (first - start).norm(dim=(1, 2))
    assert moved[0].item() == pytest.approx(0.5, rel=0.01)  # the same way from the start, half as far
    assert torch.nn.functional.cosine_similarity(
        (search.embeddings - start)[0].flatten(), (first - start)[0].flatten(), dim=0
    ).item() == pytest.approx(1, abs=1e-4)
    near = _Search(replace(settings, step_size=5.0, is_noise=False), start, noise)
    near.step(slopes[:1], torch.tensor([False, False]))
    assert ((near.embeddings - start).norm(dim=-1) / start.norm(dim=-1)).max().item() <= 0.5 + 1e-5
    assert torch.equal(near.noise, noise)


def test_what_it_does_not_attack(base: BaseModel) -> None:
    with pytest.raises(PromptRefused):
        attack(base, targets=[Target("a nude child", 0)])
    pipe = tiny.sdxl()
    wide = BaseModel(pipe, models.match(pipe), "tiny", "sha256:0")
    with pytest.raises(ModelError, match=r"in the family 'sdxl' they are more. Attack this model with words"):
        attack(wide)


def test_a_second_look_tells_by_the_tokens_own_threshold(base: BaseModel) -> None:
    images = [Image.radial_gradient("L").resize((32, 32)).convert("RGB"), Image.new("RGB", (32, 32))]
    token = tiny.token(base.pipe, thresholds=THRESHOLDS)
    scores = SecondLook(base, token).scores(images)
    assert SecondLook(base, token)(images) == [score >= 1 for score in scores]
    assert SecondLook(base, token).scores(images) == scores
    never = tiny.token(base.pipe, thresholds=Thresholds(highlight=(1.0,), edit=(0.5,)))
    assert SecondLook(base, never)(images) == [False, False]
