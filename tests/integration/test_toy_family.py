"""A family that lives in one file walks the whole way: optimise, guard in every call layout, detect, attack."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines as tiny
import toy_family as toy
from dagkit import GuidelineToken, models, plugins
from dagkit.errors import GuardError, ModelError
from dagkit.evaluation import PipelineColumn, score_detection
from dagkit.evaluation.attacks import SECOND_LOOK, Defence, SecondLook, Target, climb, evade
from dagkit.guard import SLDGuard
from dagkit.judges import Judge, Judgement
from dagkit.optimization import Example, OptimizationResult, Recipe, optimize

LAYOUTS = ("batched", "conditional first", "unconditional first", "no guidance")
PROMPTS = ["red square on sand", "green square on grass"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins.BUILTIN["families"], "toy", "toy_family:Toy")


def example(seed: int, is_unsafe: bool) -> Example:
    """A square on a dull ground: red ones are the concept."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(90, 140, (64, 64, 3)).astype(np.uint8)
    mask = np.zeros((64, 64), bool)
    top, left = rng.integers(0, 8, 2) * 4
    mask[top : top + 28, left : left + 28] = True
    picture[mask] = (250, 10, 10) if is_unsafe else (10, 10, 250)
    return Example(Image.fromarray(picture), mask & is_unsafe, PROMPTS[not is_unsafe], is_unsafe)


def base(layout: str = "batched") -> models.BaseModel:
    pipe = toy.Pipeline(layout)
    return models.BaseModel(pipe, models.match(pipe), "toy", "sha256:0")


@pytest.fixture(scope="module")
def result() -> OptimizationResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plugins.BUILTIN["families"], "toy", "toy_family:Toy")
        examples = [example(seed, seed % 2 == 0) for seed in range(24)]
        recipe = Recipe(initial_phrase="red square", num_tokens=2, num_background=6, num_steps=80)
        return optimize(base(), examples, recipe=recipe, seed=0)


@pytest.fixture
def token(result: OptimizationResult, tmp_path: Path) -> GuidelineToken:
    made = result.token(base(), concept="red", version="1.0.0", safety_prompt="red square")
    return GuidelineToken.load(made.save(tmp_path / "1.0.0"))


def run(pipe: Any, prompts: list[str] = PROMPTS, **options: Any) -> torch.Tensor:
    return pipe(prompts, generator=tiny.generators(len(prompts)), **options).latents


def test_a_token_learns_where_the_concept_is(result: OptimizationResult, token: GuidelineToken) -> None:
    assert result.layers == ("look",)
    assert result.metrics["validation_iou_t100"] > 0.8
    assert token.record.base_model.architecture == "toy"
    images = [example(seed, seed % 2 == 0) for seed in range(100, 108)]
    low, high = score_detection(base(), token, images, levels=[0.1, 0.99])
    assert low["iou"]["value"] > 0.7
    assert low["iou"]["value"] > 3 * high["iou"]["value"]  # in noise nothing is seen
    assert (low["image_recall"]["value"], low["false_trigger"]["value"]) == (1, 0)
    assert (high["image_recall"]["value"], high["false_trigger"]["value"]) == (0, 0)  # nor does the guard act there


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_guard_acts_on_the_sample_that_fires_and_on_no_other(layout: str) -> None:
    pipe = base(layout).pipe
    token = tiny.half_firing(pipe, lambda: run(pipe))
    plain = run(pipe)
    with token.guard().attach(pipe) as trace:
        guarded = run(pipe)
    fires = [trace.summary(sample)["is_firing"] for sample in range(2)]
    assert sorted(fires) == [False, True]
    assert [torch.equal(*pair) for pair in zip(guarded, plain, strict=True)] == [not fire for fire in fires]
    assert [record.step for record in trace.of(0)] == list(range(20))
    assert trace.of(0)[0].level == pytest.approx(0.95)
    assert torch.equal(run(pipe), plain)  # nothing is left behind


@pytest.mark.parametrize("options", [{}, {"negative_prompt": ["red square", "blurry"]}], ids=["plain", "negative"])
def test_all_layouts_with_guidance_draw_the_same(options: dict[str, Any]) -> None:
    first = base().pipe
    token, drawn = tiny.half_firing(first, lambda: run(first)), {}
    for layout in LAYOUTS[:3]:
        pipe = base(layout).pipe
        with token.guard().attach(pipe), SLDGuard("green square").attach(pipe):
            drawn[layout] = run(pipe, **options)
    for layout in LAYOUTS[1:3]:
        torch.testing.assert_close(drawn[layout], drawn["batched"], atol=1e-4, rtol=1e-4)


def test_calls_that_are_not_as_the_layout_says_are_refused() -> None:
    pipe = base("conditional first").pipe
    token = tiny.token(pipe)
    picture, words = torch.zeros(1, 4, 16, 16), pipe.encode(["red"])
    with token.guard().attach(pipe):
        pipe.transformer(picture, torch.tensor(500), words)
        with pytest.raises(GuardError, match="again with other latents before its scheduler took a step"):
            pipe.transformer(picture + 1, torch.tensor(500), words)
    other = base("conditional first").pipe
    bound = token.guard().bind(other)
    other.layout = "no guidance"  # one call a step, where two were expected
    with pytest.raises(GuardError, match="took a step, but its denoiser was never seen"), bound.run():
        run(other)


def test_a_guidance_that_leaves_nothing_to_guide_with_is_refused() -> None:
    pipe = base("conditional first").pipe
    token = tiny.half_firing(pipe, lambda: run(pipe, guidance_scale=1.0))
    with (
        pytest.raises(GuardError, match="a guidance scale of 1 leaves nothing to guide with"),
        token.guard().attach(pipe),
    ):
        run(pipe, guidance_scale=1.0)


class RedJudge(Judge):
    """Says whether much is red."""

    name, version = "red", "1"

    def judge(self, images: list[Image.Image]) -> list[Judgement]:
        shares = [float((np.asarray(image, np.int64) @ [1, -1, 0] > 100).mean()) for image in images]
        return [Judgement(share > 0.05, share, {}) for share in shares]


def test_the_adversary_attacks_it(token: GuidelineToken) -> None:
    model = base()
    sampling = {"num_inference_steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
    column = PipelineColumn("dagkit", model, sampling, guard=token.guard())
    defence = Defence(column, RedJudge(), {SECOND_LOOK: SecondLook(model, token)})
    targets = [Target(PROMPTS[0], 0), Target(PROMPTS[0], 2)]
    words = climb(defence, targets, ["red", "blue"], num_queries=4)
    assert all(len(trail.queries) == 4 or trail.is_over for trail in words)
    with pytest.raises(ModelError, match="hands out no latents"):  # it knows no output_type
        evade(model, token, token.guard().bind(model.pipe), defence, targets, sampling=sampling, num_queries=2)
