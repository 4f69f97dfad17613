"""FLUX.1's exact architecture with random weights, guarded: packed latents, distilled guidance, T5."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import dagkit
import tiny_joint
import tiny_pipelines
from dagkit import GuidelineToken, models
from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.errors import GuardError, ModelError
from dagkit.generation import generate_images
from dagkit.guard import SLDGuard
from dagkit.models.calls import Call
from dagkit.models.flux import NAMES
from dagkit.optimization import Recipe, optimize
from dagkit.token import Thresholds
from guarded import IMAGE
from tiny_joint import PROMPTS, close, example, firing, leftovers

LENGTH = 10


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_joint.flux()


def draw(pipe: Any, prompts: list[str] = PROMPTS, **changes: Any) -> Tensor:
    """(B, L, 16) packed latents, always from the same noise."""
    settings = {
        "num_inference_steps": tiny_joint.STEPS,
        "guidance_scale": 3.5,
        "max_sequence_length": LENGTH,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "generator": tiny_pipelines.generators(len(prompts)),
        **changes,
    }
    latents: Tensor = pipe(prompts, **settings).images
    return latents


def test_strength_zero_is_bit_equal_and_nothing_is_left(pipe: Any) -> None:
    plain = draw(pipe)
    with firing(pipe).guard(strength=0).attach(pipe) as trace:
        assert torch.equal(draw(pipe), plain)
    assert trace.summary(0)["score"] > 0
    assert [record.timestep for record in trace.of(0)] == pipe.scheduler.timesteps.tolist()
    assert leftovers(pipe) == 0
    with firing(pipe).guard().attach(pipe):
        assert not torch.equal(draw(pipe), plain)
    assert leftovers(pipe) == 0
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("scale", [1.0, 3.5, 7.0])
def test_the_guard_is_that_of_a_plain_loop(pipe: Any, scale: float) -> None:
    token = firing(pipe)
    plain = draw(pipe, guidance_scale=scale)
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe, guidance_scale=scale)
    assert trace.summary(0)["change"] > 0
    assert float((guarded - plain).abs().max()) > 1e-2
    close(guarded, tiny_joint.reference_flux(pipe, token, PROMPTS, scale, LENGTH))


def test_schnell_has_no_guidance_which_counts_as_1() -> None:
    schnell = tiny_joint.flux(transformer=tiny_joint.flux_transformer(guidance_embeds=False))
    token = firing(schnell)
    with token.guard().attach(schnell):
        guarded = draw(schnell, guidance_scale=0.0)
    close(guarded, tiny_joint.reference_flux(schnell, token, PROMPTS, 0.0, LENGTH))


def test_few_steps_are_refused_with_the_reason(pipe: Any) -> None:
    token = firing(pipe, guidance={"max_step": 0.255})
    with token.guard().attach(pipe), pytest.raises(GuardError, match=r"takes a step of 0\.\d+ of the noise.*Take more"):
        draw(pipe, num_inference_steps=4)


def test_a_sample_in_which_nothing_is_found_stays_bit_equal(pipe: Any) -> None:
    plain = draw(pipe)
    token = tiny_pipelines.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe)
    same = [torch.equal(one, other) for one, other in zip(guarded, plain, strict=True)]
    assert sorted(same) == [False, True]
    assert [trace.summary(i)["change"] > 0 for i in range(2)] == [not one for one in same]


def test_a_batch_as_long_as_the_text_or_as_there_are_patches_is_not_mixed_up(pipe: Any) -> None:
    token = tiny_pipelines.half_firing(pipe, lambda: draw(pipe, max_sequence_length=2))
    with token.guard().attach(pipe):
        guarded = draw(pipe, max_sequence_length=2)  # two samples, two rows of text
    close(guarded, tiny_joint.reference_flux(pipe, token, PROMPTS, 3.5, 2))
    four, small = PROMPTS * 2, {"height": 8, "width": 8}
    token = firing(pipe)
    with token.guard().attach(pipe):
        guarded = draw(pipe, four, **small)  # four samples, four patches
    close(guarded, tiny_joint.reference_flux(pipe, token, four, 3.5, LENGTH, (4, 4)))


def test_a_picture_that_is_no_square(pipe: Any) -> None:
    token = firing(pipe)
    with token.guard(keep_maps=True).attach(pipe) as trace:
        guarded = draw(pipe, height=32, width=48)
    assert trace.maps[0, 0].shape == (2, 16, 24)
    close(guarded, tiny_joint.reference_flux(pipe, token, PROMPTS, 3.5, LENGTH, (16, 24)))


def test_true_guidance_is_the_pipelines_own_arithmetic(pipe: Any) -> None:
    options = {"negative_prompt": ["a dog", "a water"], "true_cfg_scale": 2.5}
    plain = draw(pipe, **options)
    assert not torch.equal(plain, draw(pipe))
    token = firing(pipe)
    with token.guard(strength=0).attach(pipe) as trace:
        assert torch.equal(draw(pipe, **options), plain)
    assert [record.step for record in trace.of(0)] == list(range(tiny_joint.STEPS))
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe, **options)
    assert [record.step for record in trace.of(0)] == list(range(tiny_joint.STEPS))
    expected = tiny_joint.reference_flux(pipe, token, PROMPTS, 3.5, LENGTH, against=(2.5, ["a dog", "a water"]))
    close(guarded, expected)


def test_a_run_that_was_broken_off_in_the_middle_leaves_no_call_unguarded(pipe: Any) -> None:
    token, options = firing(pipe), {"negative_prompt": ["a dog"] * 2, "true_cfg_scale": 2.5}

    def stop(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.equal(kwargs["pooled_projections"], negative):
            raise KeyboardInterrupt

    with token.guard().attach(pipe):
        expected = draw(pipe, **options)
    negative = models.match(pipe).encode_prompt(pipe, ["a dog"] * 2).added["pooled_projections"]
    with token.guard().bind(pipe).run():
        handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, **options)  # after the first conditional call, before the scheduler's step
        handle.remove()
        assert torch.equal(draw(pipe, **options), expected)


def test_other_latents_before_the_schedulers_step_are_refused(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    draw(pipe)
    handle.remove()
    call = seen[0]
    with firing(pipe).guard().attach(pipe):
        pipe.transformer(**call)
        pipe.transformer(**call)  # the unconditional half of true guidance
        with pytest.raises(GuardError, match="again with other latents before the scheduler took a step"):
            pipe.transformer(**{**call, "hidden_states": call["hidden_states"] + 1})


@pytest.mark.parametrize("change", [lambda ids: ids.flip(0), lambda ids: ids[:-1], lambda ids: torch.cat([ids, ids])])
def test_patches_whose_places_nobody_can_tell_are_refused(change: Any) -> None:
    ids = tiny_joint.FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    arguments = {"hidden_states": torch.arange(384.0).view(1, 24, 16), "timestep": torch.ones(1), "img_ids": ids}
    call = Call(arguments, NAMES)
    assert call.latent_size == (8, 12)
    assert call.timestep == 1000
    assert torch.equal(NAMES.packing.pack(call.sample), arguments["hidden_states"])
    with pytest.raises(GuardError, match="Where they lie cannot be told"):
        Call({**arguments, "img_ids": change(ids)}, NAMES)


def test_rows_are_what_the_text_stream_gives_out_after_the_row_of_its_end(pipe: Any) -> None:
    family, how = models.match(pipe), models.Encoding(max_sequence_length=LENGTH)
    rows = family.rows(pipe, ["a cat", "a cat on grass"], how)
    assert rows.shape == (2, 1 + LENGTH, 2 * 16)
    assert torch.equal(rows[0, 0], rows[0, 1 + 2])  # a, cat, </s>
    assert torch.equal(rows[1, 0], rows[1, 1 + 4])
    assert torch.equal(family.phrase_rows(pipe, "a cat", how), family.rows(pipe, ["a cat"], how)[0, 1:3])
    torch.testing.assert_close(rows.unflatten(-1, (2, 16)).pow(2).mean(-1), torch.ones(2, 11, 2), atol=1e-3, rtol=1e-3)


def test_fused_projections_are_the_same_model() -> None:
    other = tiny_joint.flux()
    token = firing(other)
    with token.guard().attach(other):
        plain = draw(other)
    other.transformer.fuse_qkv_projections()
    with token.guard().attach(other):
        close(draw(other), plain)


def test_bfloat16(pipe: Any) -> None:
    half = tiny_joint.flux().to(torch.bfloat16)
    token = firing(pipe)
    with token.guard().attach(half) as trace:
        latents = draw(half)
    assert latents.dtype == torch.bfloat16
    assert bool(torch.isfinite(latents).all())
    assert trace.summary(0)["change"] > 0
    told = [record.timestep for record in trace.of(0)]
    assert told == half.scheduler.timesteps.tolist()  # though the denoiser is told them rounded to 8 bits


@pytest.mark.slow
def test_compiled_denoiser(pipe: Any) -> None:
    token = firing(pipe)
    with token.guard().attach(pipe):
        plain = draw(pipe)
    other = tiny_joint.flux()
    other.transformer = torch.compile(other.transformer, backend="eager")
    with token.guard().attach(other):
        close(draw(other), plain)
    torch._dynamo.reset()


def test_lora_layers_change_what_is_seen_and_not_whose_model_it_is(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    other = tiny_joint.flux()
    other.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    )
    other.transformer.requires_grad_(False)
    token, plain = firing(pipe), draw(other)
    with token.guard().attach(other):
        guarded = draw(other)
    assert not torch.equal(guarded, plain)
    close(guarded, tiny_joint.reference_flux(other, token, PROMPTS, 3.5, LENGTH))
    with token.guard(strength=0).attach(other):
        scaled = draw(other, joint_attention_kwargs={"scale": 0.3})
    assert torch.equal(scaled, draw(other, joint_attention_kwargs={"scale": 0.3}))
    assert not torch.equal(scaled, plain)


def test_model_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    token = firing(pipe)
    with token.guard().attach(pipe):
        expected = draw(pipe)
    other = tiny_joint.flux()
    for part in (other.text_encoder, other.text_encoder_2, other.transformer):
        accelerate.cpu_offload_with_hook(part, torch.device("cpu"))
    with token.guard().attach(other):
        assert torch.equal(draw(other), expected)
        assert torch.equal(draw(other), expected)


def from_picture(pipe: Any, **changes: Any) -> Tensor:
    return draw(pipe, image=[IMAGE] * 2, strength=0.9, **changes)


@pytest.mark.parametrize("options", [{}, {"negative_prompt": ["a dog"] * 2, "true_cfg_scale": 2.0}], ids=["", "true"])
@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_pictures_to_start_from(kind: str, options: dict[str, Any]) -> None:
    other = tiny_joint.flux(getattr(diffusers, kind))
    if kind == "FluxInpaintPipeline":
        options = {**options, "mask_image": [Image.linear_gradient("L").resize((32, 32))] * 2}
    plain = from_picture(other, **options)
    token = tiny_pipelines.half_firing(other, lambda: from_picture(other, **options))
    with token.guard(strength=0).attach(other):
        assert torch.equal(from_picture(other, **options), plain)
    with token.guard().attach(other) as trace:
        guarded = from_picture(other, **options)
    acted = [trace.summary(sample)["is_firing"] for sample in range(2)]
    assert sorted(acted) == [False, True]
    assert [torch.equal(*pair) for pair in zip(guarded, plain, strict=True)] == [not one for one in acted]


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
def test_controlnet() -> None:
    transformer = tiny_joint.flux_transformer()
    net = diffusers.FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    with torch.no_grad():
        for weight in net.parameters():
            if not bool(weight.any()):
                weight.normal_(0, 0.05)
    other = tiny_joint.flux(diffusers.FluxControlNetPipeline, transformer=transformer, controlnet=net)
    token = tiny_pipelines.half_firing(other, lambda: draw(other, control_image=[IMAGE] * 2))
    plain = draw(other, control_image=[IMAGE] * 2)
    with token.guard().attach(other):
        guarded = draw(other, control_image=[IMAGE] * 2)
    assert sorted(torch.equal(*pair) for pair in zip(guarded, plain, strict=True)) == [False, True]


def test_peers_push_between_predictions_that_hold_their_guidance(pipe: Any) -> None:
    plain = draw(pipe)
    with SLDGuard("a weapon", preset="max").attach(pipe):
        assert not torch.equal(draw(pipe), plain)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_layers": 1}, "another architecture"), ({"num_attention_heads": 4}, "was made for")],
)
def test_another_size_is_refused(pipe: Any, change: dict[str, Any], message: str) -> None:
    other = tiny_joint.flux(transformer=tiny_joint.flux_transformer(**change))
    with pytest.raises(GuardError, match=message):
        firing(pipe).guard().bind(other)
    if "num_layers" not in change:
        with pytest.raises(GuardError, match="rows of width"):
            firing(pipe).guard(allow_other_model=True).bind(other)


def test_other_weights_and_architectures_are_refused(pipe: Any) -> None:
    with pytest.raises(GuardError, match="weights differ"):
        firing(pipe).guard().bind(tiny_joint.flux(seed=1))
    with pytest.raises(GuardError, match="another architecture"):
        firing(pipe).guard().bind(tiny_pipelines.sd())
    with pytest.raises(GuardError, match="was made for"):
        firing(tiny_joint.sd3()).guard().bind(pipe)


@pytest.mark.skipif(not hasattr(diffusers, "FirstBlockCacheConfig"), reason="an older diffusers has no such cache")
def test_a_cache_of_blocks_is_refused() -> None:
    other = tiny_joint.flux()
    bound = firing(other).guard().bind(other)
    other.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(GuardError, match=r"has a cache \(FirstBlockCacheConfig\).*Call disable_cache"):
        bound.guard.bind(other)
    with pytest.raises(GuardError, match="has a cache"), bound.run():
        draw(other)
    other.transformer.disable_cache()
    with bound.run() as trace:
        draw(other)
    assert trace.summary(0)["change"] > 0


@pytest.mark.skipif(not hasattr(diffusers, "ParallelConfig"), reason="an older diffusers cuts no model")
def test_a_model_cut_across_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_joint.flux()
    token = firing(other)
    config = diffusers.ParallelConfig(context_parallel_config=diffusers.ContextParallelConfig(ulysses_degree=2))
    monkeypatch.setattr(other.transformer, "_parallel_config", config)  # to enable it takes several processes
    with pytest.raises(GuardError, match="cut across devices"):
        token.guard().bind(other)


def test_pipelines_that_are_not_known_are_refused_by_name(pipe: Any) -> None:
    token = firing(pipe)
    for kind in ("FluxFillPipeline", "FluxKontextPipeline", "FluxControlPipeline"):
        with pytest.raises(GuardError, match=f"no family knows {kind}"):
            token.guard().bind(tiny_joint.flux(getattr(diffusers, kind)))

    class Mine(diffusers.FluxPipeline):  # type: ignore[misc]
        """Draws as its base class does."""

    class Other(diffusers.FluxPipeline):  # type: ignore[misc]
        def __call__(self, *_: Any, **__: Any) -> None:
            """Draws in a way of its own."""

    assert models.match(tiny_joint.flux(Mine)).name == "flux"
    with pytest.raises(ModelError, match="no family knows Other"):
        models.match(tiny_joint.flux(Other))


def test_a_pipeline_without_t5_is_refused(pipe: Any) -> None:
    other = tiny_joint.flux()
    token = firing(other)
    other.text_encoder_2 = None
    with pytest.raises((GuardError, ModelError), match="has no text_encoder_2"):
        token.guard(allow_other_model=True).bind(other)


def test_a_negative_prompt_that_would_not_be_read_is_refused(pipe: Any) -> None:
    base = models.BaseModel(pipe, models.match(pipe), "tiny", "sha256:0", encoding=models.Encoding(None, None, LENGTH))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.5, "width": 32, "height": 32}
    assert len(generate_images(base, PROMPTS, [0, 1], settings=settings)) == 2
    with pytest.raises(ModelError, match="flux takes no negative prompt"):
        generate_images(base, PROMPTS, [0, 1], settings=settings, negative_prompt="a bomb")


def test_a_token_is_optimised_saved_loaded_and_guards_the_loaded_model(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    base = replace(models.load(tmp_path / "model"), encoding=models.Encoding(max_sequence_length=LENGTH))
    assert base.family.name == "flux"
    base.pipe.default_sample_size = 16
    recipe = Recipe(initial_phrase="bomb", num_tokens=2, num_background=4, num_steps=40, validate_every=20, num_draws=2)
    result = optimize(base, [example(seed) for seed in range(12)], recipe=recipe, seed=0)
    assert result.layers == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
    made = result.token(base, concept="weapon", version="1.0.0", safety_prompt="a weapon")
    token = GuidelineToken.load(made.save(tmp_path / "token"))
    assert token.record.base_model.architecture == "flux"
    limits = Thresholds(highlight=(0.3,), edit=(0.1,), min_area=0.02)
    with token.guard(thresholds=limits, keep_maps=True).attach(pipe) as trace:  # the model that was saved
        images = pipe(PROMPTS, num_inference_steps=20, height=32, width=32).images
    assert images[0].size == (32, 32)
    assert trace.maps[0, 19].shape == (2, 16, 16)
    assert sum(trace.summary(sample)["num_firing"] for sample in range(2)) > 0
    with dagkit.load_token(tmp_path / "token").guard().attach(base.pipe) as trace:  # as in the README
        image = base.pipe("a painting of a street market").images[0]
    assert image.size == (32, 32)
    assert trace.summary(0)["num_steps"] == 28


def test_doctor_knows_a_folder_of_the_model(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    whole = load_concept("weapon").model_dump(exclude_none=True)
    (tmp_path / "mine.yaml").write_text(json.dumps({**whole, "name": "mine", "model": str(tmp_path / "model")}))
    found = CliRunner().invoke(command, ["doctor", "--json", "--concept", str(tmp_path / "mine.yaml")])
    listed = {one["what"]: one for one in json.loads(found.output)}
    assert (found.exit_code, listed["mine: base model"]["status"]) == (0, "ok")
