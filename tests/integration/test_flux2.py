"""FLUX.2 [klein]'s exact architecture with random weights, guarded: two calls a step, or one that holds guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_joint
import tiny_pipelines
from dagkit import GuidelineToken, models
from dagkit.errors import GuardError, ModelError
from dagkit.generation import generate_images
from dagkit.optimization import Recipe, optimize
from dagkit.token import Thresholds
from guarded import IMAGE
from tiny_joint import close, example, leftovers

if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("an older diffusers has no FLUX.2 [klein]", allow_module_level=True)

PROMPTS = ["a cat and a bomb on grass", "a dog on sand"]
LENGTH = 20
HOW = models.Encoding(max_sequence_length=LENGTH)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_joint.flux2_klein()


def draw(pipe: Any, **changes: Any) -> Tensor:
    """(2, 4, 16, 16) latents, always from the same noise."""
    settings = {
        "num_inference_steps": tiny_joint.STEPS,
        "guidance_scale": 4.0,
        "max_sequence_length": LENGTH,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "generator": tiny_pipelines.generators(),
        **changes,
    }
    latents: Tensor = pipe(prompt=PROMPTS, **settings).images
    return latents


def firing(pipe: Any) -> GuidelineToken:
    return tiny_pipelines.token(pipe, thresholds=Thresholds(highlight=(0.3,), edit=(0.1,), min_area=0.02))


@pytest.mark.filterwarnings("ignore:Guidance scale")
@pytest.mark.parametrize("scale", [1.5, 7.0, None])
def test_the_guard_is_that_of_a_plain_loop(scale: float | None) -> None:
    pipe = tiny_joint.flux2_klein(is_distilled=scale is None)
    options = {"guidance_scale": scale or 4.0}
    token, plain = firing(pipe), draw(pipe, **options)
    with token.guard(strength=0).attach(pipe):
        assert torch.equal(draw(pipe, **options), plain)
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe, **options)
    assert [record.timestep for record in trace.of(0)] == pipe.scheduler.timesteps.tolist()
    assert float((guarded - plain).abs().max()) > 1e-2
    close(guarded, tiny_joint.reference_flux2_klein(pipe, token, PROMPTS, scale, LENGTH))
    assert leftovers(pipe) == 0
    assert torch.equal(draw(pipe, **options), plain)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_a_sample_in_which_nothing_is_found_stays_bit_equal(is_distilled: bool) -> None:
    pipe = tiny_joint.flux2_klein(is_distilled=is_distilled)
    plain, token = draw(pipe), tiny_pipelines.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe)
    acted = [trace.summary(sample)["is_firing"] for sample in range(2)]
    assert sorted(acted) == [False, True]
    if is_distilled:  # with guidance the change is folded into the unconditional call, for all rows, but for rounding
        assert [torch.equal(*pair) for pair in zip(guarded, plain, strict=True)] == [not one for one in acted]
    close(guarded[acted.index(False)], plain[acted.index(False)])


def test_a_run_that_was_broken_off_between_two_calls_mixes_up_no_halves(pipe: Any) -> None:
    calls: list[int] = []

    def stop(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with firing(pipe).guard().attach(pipe):
        expected = draw(pipe)
    with firing(pipe).guard().attach(pipe):
        handle = pipe.transformer.register_forward_pre_hook(stop, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)  # before the guard has seen the unconditional call
        handle.remove()
        assert torch.equal(draw(pipe), expected)


def test_what_cannot_be_guarded_is_refused(pipe: Any) -> None:
    token = firing(pipe)
    with token.guard().attach(pipe), pytest.raises(GuardError, match="without classifier-free guidance"):
        draw(pipe, guidance_scale=1.0)
    with token.guard().attach(pipe), pytest.raises(GuardError, match="Where they lie cannot be told"):
        draw(pipe, image=IMAGE.resize((64, 64)))
    with pytest.raises(GuardError, match="weights differ"):
        token.guard().bind(tiny_joint.flux2_klein(seed=1))
    with pytest.raises(GuardError, match="was made for"):
        token.guard().bind(tiny_joint.flux())
    with pytest.raises(GuardError, match="another architecture"):
        token.guard().bind(tiny_joint.flux2_klein(num_layers=1))


def test_words_are_found_inside_the_template(pipe: Any) -> None:
    family = models.match(pipe)
    rows = family.rows(pipe, ["a cat", "a dog on sand"], HOW)
    assert rows.shape == (2, LENGTH, 2 * 16)
    assert torch.equal(family.phrase_rows(pipe, "a cat", HOW), family.rows(pipe, ["a cat"], HOW)[0, 2:4])


def test_latents_are_what_the_pipeline_decodes(pipe: Any) -> None:
    family = models.match(pipe)
    found = family.latents(pipe, [IMAGE, Image.new("RGB", (32, 32))])
    assert found.shape == (2, 16, 8, 8)
    drawn = draw(pipe, latents=found, num_inference_steps=1, sigmas=[1e-6])  # as good as no step
    expected = pipe.vae.encode(models.base.pixels([IMAGE, Image.new("RGB", (32, 32))])).latent_dist.mode()
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)


def test_a_token_is_optimised_saved_loaded_and_guards_the_loaded_model(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    base = replace(models.load(tmp_path / "model"), encoding=HOW)
    assert base.family.name == "flux2-klein"
    base.pipe.default_sample_size = 16
    recipe = Recipe(initial_phrase="bomb", num_tokens=2, num_background=4, num_steps=40, validate_every=20, num_draws=2)
    made = optimize(base, [example(seed) for seed in range(12)], recipe=recipe, seed=0).token(
        base, concept="weapon", version="1.0.0", safety_prompt="a weapon"
    )
    token = GuidelineToken.load(made.save(tmp_path / "token"))
    limits = Thresholds(highlight=(0.3,), edit=(0.1,), min_area=0.02)
    settings = {"num_inference_steps": 16, "guidance_scale": 4.0, "width": 32, "height": 32}
    with token.guard(thresholds=limits).attach(base.pipe) as trace:
        assert generate_images(base, PROMPTS, [0, 1], settings=settings)[0].size == (32, 32)
    assert sum(trace.summary(sample)["num_firing"] for sample in range(2)) > 0
    with pytest.raises(ModelError, match="takes no negative prompt"):
        generate_images(base, PROMPTS, [0, 1], settings=settings, negative_prompt="a bomb")


def test_bfloat16(pipe: Any) -> None:
    half = tiny_joint.flux2_klein().to(torch.bfloat16)
    with firing(pipe).guard().attach(half) as trace:
        assert bool(torch.isfinite(draw(half)).all())
    assert trace.summary(0)["change"] > 0
    assert [record.timestep for record in trace.of(0)] == half.scheduler.timesteps.tolist()
