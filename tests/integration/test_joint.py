"""Joint attention: Stable Diffusion 3's exact architecture with random weights, guarded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from PIL import Image
from torch import Tensor

import tiny_joint
import tiny_pipelines
from dagkit import models
from dagkit.concept import load_concept
from dagkit.engines.source import ModelSource
from dagkit.errors import GuardError
from dagkit.models.base import Seen
from dagkit.optimization import Example, Recipe, optimize
from dagkit.proposers.attention import AttentionProposer
from dagkit.token import GuidelineToken, Thresholds
from tiny_joint import PROMPTS, example, firing

LENGTH = 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_joint.sd3()


def draw(pipe: Any, prompts: list[str] = PROMPTS, **changes: Any) -> Tensor:
    settings = {
        "num_inference_steps": tiny_joint.STEPS,
        "guidance_scale": 4.0,
        "max_sequence_length": LENGTH,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "generator": tiny_pipelines.generators(len(prompts)),
        **changes,
    }
    latents: Tensor = pipe(prompts, **settings).images
    return latents


def test_strength_zero_is_bit_equal(pipe: Any) -> None:
    plain = draw(pipe)
    with firing(pipe).guard(strength=0).attach(pipe) as trace:
        assert torch.equal(draw(pipe), plain)
    assert trace.summary(0)["score"] > 0


def test_the_guard_is_that_of_a_plain_loop(pipe: Any) -> None:
    token = firing(pipe)
    plain = draw(pipe)
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe)
    assert trace.summary(0)["change"] > 0
    expected = tiny_joint.reference_sd3(pipe, token, PROMPTS, 4.0, LENGTH)
    assert float((guarded - plain).abs().max()) > 1e-2
    torch.testing.assert_close(guarded, expected, atol=1e-4, rtol=1e-4)


def test_a_sample_in_which_nothing_is_found_stays_bit_equal(pipe: Any) -> None:
    plain = draw(pipe)
    token = tiny_pipelines.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe)
    same = [torch.equal(one, other) for one, other in zip(guarded, plain, strict=True)]
    assert sorted(same) == [False, True]
    assert [trace.summary(i)["change"] > 0 for i in range(2)] == [not one for one in same]


def test_nothing_is_left_behind(pipe: Any) -> None:
    plain, hooks = draw(pipe), num_hooks(pipe)
    with firing(pipe).guard().attach(pipe):
        draw(pipe)
    assert num_hooks(pipe) == hooks
    assert torch.equal(draw(pipe), plain)


def num_hooks(pipe: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())


def test_skip_layer_guidance_stands_beside(pipe: Any) -> None:
    def skipped() -> Tensor:
        return draw(pipe, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)

    plain = skipped()
    assert not torch.equal(plain, draw(pipe))
    with firing(pipe).guard(strength=0).attach(pipe) as trace:
        assert torch.equal(skipped(), plain)
    assert len({step.step for step in trace.steps}) == tiny_joint.STEPS
    with firing(pipe).guard().attach(pipe):
        assert not torch.equal(skipped(), plain)


def test_medium_with_attention_of_the_image_alone() -> None:
    pipe = tiny_joint.sd3(transformer=tiny_joint.sd3_transformer(dual_attention_layers=(0, 1)))
    assert list(models.match(pipe).sites(pipe)) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    token = firing(pipe)
    with token.guard().attach(pipe):
        guarded = draw(pipe)
    expected = tiny_joint.reference_sd3(pipe, token, PROMPTS, 4.0, LENGTH)
    torch.testing.assert_close(guarded, expected, atol=1e-4, rtol=1e-4)


def test_rows_are_what_the_text_stream_gives_out(pipe: Any) -> None:
    family = models.match(pipe)
    rows = family.rows(pipe, ["a cat"])
    assert rows.shape == (1, 16 + 256, 2 * 16)
    torch.testing.assert_close(rows.unflatten(-1, (2, 16)).pow(2).mean(-1), torch.ones(1, 272, 2), atol=1e-3, rtol=1e-3)
    phrase = family.phrase_rows(pipe, "a cat")
    assert torch.equal(phrase, rows[0, 1:3])


def test_fused_norms_are_refused(pipe: Any) -> None:
    other = tiny_joint.sd3()
    token = firing(other)
    other.transformer.fuse_qkv_projections()
    with pytest.raises(GuardError, match="unfuse_qkv_projections"):
        token.guard().bind(other)


def test_without_norms_a_fused_one_is_the_same() -> None:
    other = tiny_joint.sd3(transformer=tiny_joint.sd3_transformer(qk_norm=None))
    token = firing(other)
    with token.guard().attach(other):
        plain = draw(other)
    other.transformer.fuse_qkv_projections()
    with token.guard().attach(other):
        torch.testing.assert_close(draw(other), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2}, "another architecture"),
        ({"attention_head_dim": 4, "caption_projection_dim": 8}, "was made for"),
    ],
)
def test_another_size_is_refused(pipe: Any, change: dict[str, Any], message: str) -> None:
    other = tiny_joint.sd3(transformer=tiny_joint.sd3_transformer(**change))
    with pytest.raises(GuardError, match=message):
        firing(pipe).guard().bind(other)
    if "num_layers" not in change:
        with pytest.raises(GuardError, match="rows of width"):
            firing(pipe).guard(allow_other_model=True).bind(other)


def test_other_weights_and_architectures_are_refused(pipe: Any) -> None:
    with pytest.raises(GuardError, match="weights differ"):
        firing(pipe).guard().bind(tiny_joint.sd3(seed=1))
    with pytest.raises(GuardError, match="another architecture"):
        firing(pipe).guard().bind(tiny_pipelines.sd())
    with pytest.raises(GuardError, match="another architecture"):
        tiny_pipelines.token(tiny_pipelines.sd()).guard().bind(pipe)


def test_bfloat16(pipe: Any) -> None:
    half = tiny_joint.sd3().to(torch.bfloat16)
    token = firing(pipe)
    with token.guard().attach(half) as trace:
        latents = draw(half)
    assert latents.dtype == torch.bfloat16
    assert bool(torch.isfinite(latents).all())
    assert trace.summary(0)["change"] > 0


def test_compiled_denoiser(pipe: Any) -> None:
    token = firing(pipe)
    with token.guard().attach(pipe):
        plain = draw(pipe)
    other = tiny_joint.sd3()
    other.transformer = torch.compile(other.transformer, backend="eager")
    with token.guard().attach(other):
        torch.testing.assert_close(draw(other), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("negative", "length"), [(("a dog", "water"), LENGTH), (("", ""), 7)])
def test_negative_prompt_and_text_length_are_the_runs_own(pipe: Any, negative: tuple[str, str], length: int) -> None:
    token = tiny_pipelines.token(pipe, thresholds=Thresholds(highlight=(0.2,), edit=(0.1,), min_area=0.02))
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe, negative_prompt=list(negative), max_sequence_length=length)
    assert max(trace.summary(sample)["change"] for sample in range(2)) > 0
    expected = tiny_joint.reference_sd3(pipe, token, PROMPTS, 4.0, length, negative)
    torch.testing.assert_close(guarded, expected, atol=1e-4, rtol=1e-4)


def test_a_safety_prompt_that_lists_things_is_one_text(pipe: Any) -> None:
    token = firing(pipe)
    record = token.record.model_copy(
        update={"safety_prompt": "a bomb and a knife", "safety_phrases": ["a bomb", "a knife"]}
    )
    bound = replace(token, record=record).guard().bind(pipe)
    assert bound.encoded(models.Encoding(max_sequence_length=LENGTH)).safety.hidden_states.shape[1] == 16 + LENGTH


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[models.BaseModel, GuidelineToken]:
    pipe = tiny_joint.sd3()
    how = models.Encoding(max_sequence_length=LENGTH)
    base = models.BaseModel(pipe, models.match(pipe), "tiny", "sha256:0", encoding=how)
    recipe = Recipe(initial_phrase="a bomb", num_tokens=2, num_background=6, num_steps=80, num_draws=4)
    result = optimize(base, [example(seed) for seed in range(24)], recipe=recipe, seed=0)
    made = result.token(base, concept="red", version="1.0.0", safety_prompt="a bomb")
    return base, GuidelineToken.load(made.save(tmp_path_factory.mktemp("token") / "1.0.0"))


def test_a_token_of_rows_for_each_site_is_learned(learned: tuple[models.BaseModel, GuidelineToken]) -> None:
    base, token = learned
    assert token.record.layers == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    assert token.guideline.shape == (2, 2 * 16)
    first, *_, last = (report["loss"] for report in token.record.optimization["history"])
    assert last < 0.98 * first  # of random weights little can be told
    with token.guard().attach(base.pipe) as trace:
        draw(base.pipe, num_inference_steps=14)
    assert len({record.step for record in trace.steps}) == 14


def test_words_are_looked_up_in_the_image(learned: tuple[models.BaseModel, GuidelineToken]) -> None:
    base, _ = learned
    one, other = (noised(base, example(seed)) for seed in (2, 4))
    rows = base.rows(["a bomb"], one)
    assert torch.equal(rows, base.rows(["a bomb"], one))
    assert not torch.allclose(rows, base.rows(["a bomb"], other), atol=1e-3)
    concept = load_concept("weapon")
    proposer = AttentionProposer.from_concept(concept, base)
    heat = proposer.heat_maps(example(2).image, "a bomb on sand", 0)
    assert heat["weapon"].shape == (32, 32)
    assert 0 <= float(heat["weapon"].min()) < float(heat["weapon"].max()) <= 1


def noised(base: models.BaseModel, one: Example) -> Seen:
    latents, timesteps = base.noised(base.latents([one.image]), torch.tensor([0.2], dtype=torch.float64), 0)
    return Seen(latents, timesteps[0])


def test_a_saved_model_is_loaded_with_the_parts_that_it_has(pipe: Any, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "sd3")
    base = models.load(tmp_path / "sd3")
    assert base.family.name == "sd3"
    assert base.pipe.text_encoder_3 is None
    assert base.family.fingerprints(base.pipe) == models.match(pipe).fingerprints(pipe)
    assert torch.equal(draw(base.pipe), draw(pipe))


def test_workers_encode_as_their_driver_does(pipe: Any, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "sd3")
    base = replace(models.load(tmp_path / "sd3"), encoding=models.Encoding(max_sequence_length=5))
    assert ModelSource.of(base).load().encode(["a cat"]).hidden_states.shape[1] == 16 + 5


@pytest.mark.parametrize("cls", [StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline])
def test_pictures_to_start_from(pipe: Any, cls: Any) -> None:
    parts = dict(pipe.components)
    if cls is StableDiffusion3InpaintPipeline:  # knows 16 channels, and 33
        parts |= {
            "vae": tiny_joint.vae(16),
            "transformer": tiny_joint.sd3_transformer(in_channels=16, out_channels=16),
        }
    other = tiny_pipelines.finish(cls(**parts))
    picture = example(2).image
    settings: dict[str, Any] = {"image": [picture] * 2, "strength": 0.8}
    if cls is StableDiffusion3InpaintPipeline:
        settings["mask_image"] = [Image.new("L", (32, 32), 255)] * 2
    token = firing(other)

    def drawn() -> Tensor:
        return draw(other, **settings)

    plain = drawn()
    with token.guard(strength=0).attach(other):
        assert torch.equal(drawn(), plain)
    with token.guard().attach(other) as trace:
        guarded = drawn()
    assert max(trace.summary(sample)["change"] for sample in range(2)) > 0
    assert not torch.equal(guarded, plain)


def test_model_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    token, other = firing(pipe), tiny_joint.sd3()
    with token.guard().attach(pipe):
        expected = draw(pipe)
    for part in (other.text_encoder, other.text_encoder_2, other.transformer):
        accelerate.cpu_offload_with_hook(part, torch.device("cpu"))
    with token.guard().attach(other):
        assert torch.equal(draw(other), expected)
    with token.guard().attach(other) as trace:
        for _ in range(2):
            assert torch.equal(draw(other), expected)
    assert {record.run for record in trace.steps} == {0, 1}


def test_a_lora_changes_what_is_seen_and_no_fingerprint(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    token, other = firing(pipe), tiny_joint.sd3()
    plain = draw(other)
    settings = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    other.transformer.add_adapter(settings)
    with token.guard().attach(other):
        guarded = draw(other)
        weak = draw(other, joint_attention_kwargs={"scale": 0.0})
    assert not torch.allclose(guarded, plain, atol=1e-2)
    with token.guard().attach(pipe):
        torch.testing.assert_close(weak, draw(pipe), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(diffusers, "FirstBlockCacheConfig"), reason="an older diffusers has no such cache")
def test_a_cache_that_the_denoiser_does_not_tell_of_is_refused() -> None:
    other = tiny_joint.sd3()
    with firing(other).guard().attach(other):
        diffusers.hooks.apply_first_block_cache(other.transformer, diffusers.FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(GuardError, match="keeps what its blocks computed"):
            draw(other)
