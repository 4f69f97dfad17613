"""The guard on real pipelines of exact architectures with small random weights.

For each: with strength 0 the output is bit-equal; guided it equals ``reference_guard``, which is written apart from
dagkit; the sample that does not fire stays bit-equal; nothing is left on the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny_pipelines as tiny
from dagkit.errors import GuardError
from dagkit.guard import ConceptFound, SEGAGuard, SLDGuard, Trace
from dagkit.token import GuidelineToken, Thresholds

IMAGE = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.linear_gradient("L").resize((32, 32))


def draw(pipe: Any, **changes: Any) -> Tensor:
    """(2, 4, 16, 16) latents of two prompts, always from the same noise."""
    latents: Tensor = pipe(tiny.PROMPTS, generator=tiny.generators(), **{**tiny.SETTINGS, **changes}).images
    return latents


def hooks(pipe: Any) -> int:
    """Hooks on the denoiser and all below it."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in pipe.unet.modules())


def check(pipe: Any, run: Callable[[], Tensor], *, tolerance: float = 1e-4, **options: Any) -> Trace:
    """All that must hold for a pipeline, with one firing and one silent sample."""
    token = tiny.half_firing(pipe, run, **options)
    plain = run()
    with token.guard(strength=0).attach(pipe):
        assert torch.equal(run(), plain)
    with token.guard().attach(pipe) as trace:
        guarded = run()
    with tiny.reference_guard(pipe, token):
        expected = run()
    firing = [trace.summary(sample)["is_firing"] for sample in range(2)]
    assert sorted(firing) == [False, True]
    acted, silent = firing.index(True), firing.index(False)
    assert torch.equal(guarded[silent], plain[silent])
    assert (guarded[acted] - plain[acted]).abs().max() > 1e-3
    assert (guarded - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    assert hooks(pipe) == 0
    assert torch.equal(run(), plain)
    return trace


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd()


@pytest.mark.parametrize("form", ["drop", "subtract"])
@pytest.mark.parametrize("is_learned", [True, False])
def test_equals_the_plain_form(pipe: Any, form: str, is_learned: bool) -> None:
    trace = check(pipe, lambda: draw(pipe), form=form, is_learned=is_learned)
    assert [record.step for record in trace.of(0)] == list(range(tiny.STEPS))


def test_equals_the_papers_form(pipe: Any) -> None:
    token = tiny.token(pipe, form="paper", thresholds=Thresholds(highlight=(0.5,), edit=(0.47,)))
    plain = draw(pipe)
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe)
    with tiny.reference_guard(pipe, token):
        expected = draw(pipe)
    assert any(record.is_firing for record in trace.steps)
    assert not torch.equal(guarded, plain)
    assert (guarded - expected).abs().max() < 1e-4 * expected.abs().max()


SCHEDULERS = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "ddim-v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
    "dpm++-v": (diffusers.DPMSolverMultistepScheduler, {"prediction_type": "v_prediction"}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_and_prediction_types(pipe: Any, name: str) -> None:
    cls, changes = SCHEDULERS[name]
    sampler = tiny.sd(
        **{key: pipe.components[key] for key in ("vae", "text_encoder", "tokenizer", "unet")},
        scheduler=tiny.scheduler(cls, **changes),
    )
    trace = check(sampler, lambda: draw(sampler))
    assert {record.run for record in trace.steps} == {0}
    assert [record.step for record in trace.of(0)] == list(range(len(trace.of(0))))
    assert len(trace.of(0)) >= tiny.STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"negative_prompt": ["a dog", "a cat"]},
        {"guidance_rescale": 0.7},
        {"height": 32, "width": 48},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_options_of_the_pipeline(pipe: Any, changes: dict[str, Any]) -> None:
    if "width" in changes:  # the reference knows squares only
        token = tiny.half_firing(pipe, lambda: draw(pipe, **changes))
        plain = draw(pipe, **changes)
        with token.guard(keep_maps=True).attach(pipe) as trace:
            guarded = draw(pipe, **changes)
        assert trace.maps[0, 0].shape == (2, 16, 24)
        assert sorted(torch.equal(a, b) for a, b in zip(guarded, plain, strict=True)) == [False, True]
        return
    check(pipe, lambda: draw(pipe, **changes))


def test_several_images_per_prompt(pipe: Any) -> None:
    def run() -> Tensor:
        latents: Tensor = pipe(
            tiny.PROMPTS[:1], num_images_per_prompt=2, generator=tiny.generators(), **tiny.SETTINGS
        ).images
        return latents

    check(pipe, run)


def test_image_to_image() -> None:
    pipe = tiny.sd(diffusers.StableDiffusionImg2ImgPipeline)
    settings = {key: value for key, value in tiny.SETTINGS.items() if key not in ("height", "width")}
    check(
        pipe,
        lambda: pipe(tiny.PROMPTS, image=[IMAGE] * 2, strength=0.8, generator=tiny.generators(), **settings).images,
    )


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int) -> None:
    pipe = tiny.sd(diffusers.StableDiffusionInpaintPipeline, unet=tiny.unet(in_channels=channels))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, mask_image=[MASK] * 2))


@pytest.mark.parametrize("is_guessing", [False, True])
def test_controlnet(is_guessing: bool) -> None:
    unet = tiny.unet()
    pipe = tiny.sd(diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, guess_mode=is_guessing))


def test_t2i_adapter() -> None:
    pipe = tiny.sd(diffusers.StableDiffusionAdapterPipeline, adapter=tiny.adapter())
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2))


def test_sdxl() -> None:
    pipe = tiny.sdxl()
    check(pipe, lambda: draw(pipe))


def test_sdxl_image_to_image() -> None:
    pipe = tiny.sdxl(diffusers.StableDiffusionXLImg2ImgPipeline)
    settings = {key: value for key, value in tiny.SETTINGS.items() if key not in ("height", "width")}
    check(
        pipe,
        lambda: pipe(tiny.PROMPTS, image=[IMAGE] * 2, strength=0.8, generator=tiny.generators(), **settings).images,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision(dtype: torch.dtype) -> None:
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe, num_inference_steps=2))
    pipe.to(dtype)
    plain = draw(pipe, num_inference_steps=2)
    with token.guard(strength=0).attach(pipe):  # the token's fingerprints hold in every precision
        assert torch.equal(draw(pipe, num_inference_steps=2), plain)
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe, num_inference_steps=2)
    assert guarded.dtype == dtype
    assert torch.isfinite(guarded).all()
    for sample in range(2):
        assert torch.equal(guarded[sample], plain[sample]) is not trace.summary(sample)["is_firing"]


def test_attention_slicing_and_fused_projections() -> None:
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe):
        expected = draw(pipe)
    pipe.enable_attention_slicing(1)
    with token.guard().attach(pipe):
        assert (draw(pipe) - expected).abs().max() < 1e-4 * expected.abs().max()
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections()
    with token.guard().attach(pipe):
        assert (draw(pipe) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_lora_layers_are_read_and_do_not_change_the_fingerprint() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny.sd()
    token = tiny.token(pipe)
    with token.guard(keep_maps=True, strength=0).attach(pipe) as before:
        draw(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    pipe.unet.requires_grad_(False)
    run = lambda: draw(pipe)  # noqa: E731
    with token.guard(keep_maps=True, strength=0).attach(pipe) as after:
        draw(pipe)
    assert (before.maps[0, 0] - after.maps[0, 0]).abs().max() > 1e-4
    check(pipe, run)


def test_model_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe):
        expected = draw(pipe)
    for part in (pipe.text_encoder, pipe.unet):
        accelerate.cpu_offload_with_hook(part, torch.device("cpu"))
    with token.guard().attach(pipe) as trace:
        for _ in range(2):  # the second image is guarded like the first
            assert torch.equal(draw(pipe), expected)
    assert {record.run for record in trace.steps} == {0, 1}


@pytest.mark.slow
def test_compiled_denoiser() -> None:
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe, num_inference_steps=2))
    with token.guard().attach(pipe):
        expected = draw(pipe, num_inference_steps=2)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with token.guard().attach(pipe):
        assert (draw(pipe, num_inference_steps=2) - expected).abs().max() < 1e-4 * expected.abs().max()
    draw(pipe, num_inference_steps=2)  # compiled anew without hooks, or still with idle ones
    try:
        with token.guard().attach(pipe):  # either it is guarded, or it is refused: never silently unguarded
            assert (draw(pipe, num_inference_steps=2) - expected).abs().max() < 1e-4 * expected.abs().max()
    except GuardError as error:
        assert "torch._dynamo.reset()" in str(error)  # noqa: PT017
    torch._dynamo.reset()


def test_a_denoiser_compiled_in_place_is_refused(pipe: Any) -> None:
    other = tiny.sd()
    token = tiny.token(other)
    other.unet.compile(backend="eager")
    with pytest.raises(GuardError, match=r"UNet2DConditionModel was compiled in place"), token.guard().attach(other):
        pass


def test_without_classifier_free_guidance_nothing_is_generated(pipe: Any) -> None:
    token = tiny.token(pipe)
    with pytest.raises(GuardError, match="without classifier-free guidance"), token.guard().attach(pipe):
        draw(pipe, guidance_scale=1.0)
    assert hooks(pipe) == 0


def test_a_callback_that_turns_guidance_off_stops_the_run(pipe: Any) -> None:
    token = tiny.token(pipe)

    def turn_off(pipe: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[1]}

    with pytest.raises(GuardError, match="without classifier-free guidance"), token.guard().attach(pipe):
        draw(pipe, callback_on_step_end=turn_off, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_an_unknown_batch_layout_is_refused() -> None:
    pipe = tiny.sd()
    token = tiny.token(pipe)
    hidden = torch.zeros(2, 16, tiny.WIDTH)
    with (
        token.guard().attach(pipe),
        pytest.raises(GuardError, match=r"batch of 2 that is not \[unconditional; conditional\]"),
    ):
        pipe.unet(torch.randn(2, 4, 16, 16), 10, hidden)
    with token.guard().attach(pipe), pytest.raises(GuardError, match="batch of 3 that is not"):
        pipe.unet(torch.zeros(3, 4, 16, 16), 10, hidden)


def test_an_unknown_pipeline_is_refused_by_name(pipe: Any) -> None:
    parts = {key: pipe.components[key] for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    other = tiny.sd(diffusers.StableDiffusionInstructPix2PixPipeline, **{**parts, "unet": tiny.unet(in_channels=8)})
    with (
        pytest.raises(GuardError, match="StableDiffusionInstructPix2PixPipeline cannot be guarded"),
        tiny.token(pipe).guard().attach(other),
    ):
        pass


def test_an_unknown_attention_class_is_refused(pipe: Any) -> None:
    class Other(nn.Module):
        pass

    other = tiny.sd()
    token = tiny.token(other)
    block = other.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = Other()
    guard = token.guard(allow_other_model=True)
    with (
        pytest.raises(GuardError, match=r"mid_block.*is a Other without to_q, to_k, heads, scale"),
        guard.attach(other),
    ):
        pass


def test_a_replaced_denoiser_is_noticed() -> None:
    pipe = tiny.sd()

    def swap_and_draw() -> None:
        with tiny.token(pipe).guard().attach(pipe):
            pipe.unet = tiny.unet().eval().requires_grad_(False)
            draw(pipe)

    with pytest.raises(GuardError, match="its denoiser was never seen"):
        swap_and_draw()


def test_the_wrong_base_model_is_refused_and_both_are_named(pipe: Any) -> None:
    token = tiny.token(pipe)
    other = tiny.sd(seed=1)
    with (
        pytest.raises(GuardError, match=r"weapon@1.0.0 was made for tiny \(text_encoder .*but this pipeline"),
        token.guard().attach(other),
    ):
        pass
    with token.guard(allow_other_model=True, mode="monitor").attach(other) as trace:
        draw(other)
    assert trace.steps
    swapped = tiny.sd(text_encoder=pipe.text_encoder, seed=1)
    with pytest.raises(GuardError, match="key_projections"), token.guard().attach(swapped):
        pass


@pytest.mark.parametrize("sketch", ["", "sketch1:", "sketch1:no base64", "sketch1:AAAA"])
def test_a_token_without_a_readable_fingerprint_is_refused(pipe: Any, sketch: str) -> None:
    token = tiny.token(pipe)
    model = token.record.base_model.model_copy(update={"text_encoder": sketch})
    broken = replace(token, record=token.record.model_copy(update={"base_model": model}))
    with (
        pytest.raises(GuardError, match=r"weapon@1.0.0: base_model.text_encoder of its record is no fingerprint"),
        broken.guard().attach(pipe),
    ):
        pass


def test_a_token_of_another_width_is_refused(pipe: Any) -> None:
    wide = tiny.sdxl()
    layers = tiny.token(wide).record.layers
    token = tiny.token(pipe)
    assert token.guideline.shape[1] == tiny.WIDTH
    narrow = replace(
        token,
        guideline=token.guideline[:, :8],
        start_of_text=token.start_of_text[:, :8],
        background=None,
        record=token.record.model_copy(update={"layers": layers}),
    )
    with pytest.raises(GuardError, match="rows of width 8"), narrow.guard(allow_other_model=True).attach(wide):
        pass


def test_options_out_of_range_are_refused(pipe: Any) -> None:
    token = tiny.token(pipe)
    for options, message in (
        ({"mode": "watch"}, "mode must be one of guide, monitor, stop, but got 'watch'"),
        ({"form": "push"}, "form must be one of drop, paper, subtract, but got 'push'"),
        ({"strength": -1}, "strength must be a number >= 0, but got -1"),
        ({"strength": float("nan")}, "strength must be a number >= 0, but got nan"),
        ({"reuse_steps": 0}, "reuse_steps must be >= 1, but got 0"),
    ):
        with pytest.raises(GuardError, match=message):
            token.guard(**options)
    with pytest.raises(GuardError, match="preset must be one of weak, medium, strong, max, but got 'huge'"):
        SLDGuard("a weapon", "huge")


def test_monitor_only_watches(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    plain = draw(pipe)
    with token.guard(mode="monitor", keep_maps=True).attach(pipe) as trace:
        assert torch.equal(draw(pipe), plain)
    assert sorted(trace.summary(i)["is_firing"] for i in range(2)) == [False, True]
    assert all(record.strength == 0 for record in trace.steps)
    assert set(trace.maps) == {(0, step) for step in range(tiny.STEPS)}
    assert all(
        values.shape == (2, 16, 16) and values.min() >= 0 and values.max() <= 1 for values in trace.maps.values()
    )


def test_stop_ends_the_run(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with (
        pytest.raises(ConceptFound, match=r"weapon@1.0.0 was found at timestep \d+ in sample [01]") as caught,
        token.guard(mode="stop").attach(pipe),
    ):
        draw(pipe)
    assert any(record.is_firing for record in caught.value.trace.steps)
    assert hooks(pipe) == 0


def count_rows(pipe: Any, run: Callable[[], Tensor], guard: Any) -> int:
    """Rows that went through the first convolution under guard: a measure of all forwards, the guard's own included."""
    rows = 0

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = pipe.unet.conv_in.register_forward_pre_hook(count)
    with guard.attach(pipe):
        run()
    handle.remove()
    return rows


def test_the_safety_forward_runs_for_firing_samples_only_and_is_reused(pipe: Any) -> None:
    run = lambda: draw(pipe, num_inference_steps=6)  # noqa: E731
    token = tiny.half_firing(pipe, run, guidance={"memory": 1.0})
    with token.guard().attach(pipe) as trace:
        run()
    firing = sum(record.is_firing for record in trace.steps)
    assert 0 < firing <= 6
    assert count_rows(pipe, run, token.guard()) == 6 * 4 + firing
    assert count_rows(pipe, run, token.guard(reuse_steps=2)) == 6 * 4 + -(-firing // 2)
    assert count_rows(pipe, run, token.guard(reuse_steps=100)) == 6 * 4 + 1
    assert count_rows(pipe, run, token.guard(mode="monitor")) == 6 * 4


def test_two_guards_act_one_after_the_other(pipe: Any) -> None:
    first = tiny.token(
        pipe, form="subtract", thresholds=Thresholds(highlight=(0.45,), edit=(0.3,)), guidance={"memory": 0.0}
    )
    second = tiny.token(pipe, form="subtract", thresholds=Thresholds(highlight=(0.45,), edit=(0.3,)), seed=9)
    second = replace(second, record=second.record.model_copy(update={"safety_prompt": "a knife", "concept": "knife"}))
    latents, hidden = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1), torch.randn(2, 16, tiny.WIDTH)

    def push(token: GuidelineToken) -> Tensor:
        with torch.no_grad(), token.guard().attach(pipe):
            return pipe.unet(latents, 10, hidden).sample - pipe.unet.forward(latents, 10, hidden).sample

    with torch.no_grad(), first.guard().attach(pipe) as one, second.guard().attach(pipe) as two:
        both = pipe.unet(latents, 10, hidden).sample - pipe.unet.forward(latents, 10, hidden).sample
    assert one.steps[0].concept == "weapon@1.0.0"
    assert two.steps[0].concept == "knife@1.0.0"
    assert one.steps[0].is_firing
    assert two.steps[0].is_firing
    torch.testing.assert_close(both, push(first) + push(second), atol=1e-4, rtol=1e-4)


def test_a_run_ends_where_the_next_begins(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe) as trace:
        first, second = draw(pipe), draw(pipe)
    assert torch.equal(first, second)  # nothing of the first run leaks into the second
    assert [(record.run, record.step) for record in trace.steps if record.sample == 0] == [
        (r, s) for r in range(2) for s in range(tiny.STEPS)
    ]


@pytest.mark.parametrize(("preset", "num_steps"), [("weak", 17), ("medium", 12), ("strong", 9), ("max", 5)])
def test_sld_equals_diffusers_own_pipeline(preset: str, num_steps: int) -> None:
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig, StableDiffusionPipelineSafe

    pipe = tiny.sd()
    pipe.to(torch.float64)  # the equations have steps, at which rounding would be amplified
    safe = StableDiffusionPipelineSafe(**{**pipe.components, "requires_safety_checker": False})
    safe.safety_concept = "a weapon"
    safe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"num_inference_steps": num_steps, "guidance_scale": 5.0, "height": 32, "width": 32}
    kept: list[Tensor] = []
    safe(
        tiny.PROMPTS, latents=latents.clone(), callback=lambda step, t, values: kept.append(values), **settings,
        **getattr(SafetyConfig, preset.upper()),
    )  # fmt: skip
    plain = pipe(tiny.PROMPTS, latents=latents.clone(), output_type="latent", **settings).images
    with SLDGuard("a weapon", preset).attach(pipe):
        ours = pipe(tiny.PROMPTS, latents=latents.clone(), output_type="latent", **settings).images
    scale = float(kept[-1].abs().max())
    assert (ours - kept[-1]).abs().max() < 1e-5 * scale
    assert not torch.equal(ours, plain)


def test_sega_equals_diffusers_own_pipeline() -> None:
    from diffusers.pipelines.deprecated.semantic_stable_diffusion import SemanticStableDiffusionPipeline

    pipe = tiny.sd()
    pipe.to(torch.float64)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    sega = SemanticStableDiffusionPipeline(**parts, requires_safety_checker=False)
    sega.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"num_inference_steps": 12, "guidance_scale": 5.0, "height": 32, "width": 32, "output_type": "latent"}
    theirs = sega(
        tiny.PROMPTS, latents=latents.clone(), editing_prompt="a weapon", reverse_editing_direction=True, **settings
    ).images
    with SEGAGuard("a weapon").attach(pipe):
        ours = pipe(tiny.PROMPTS, latents=latents.clone(), **settings).images
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_dag_and_sld_combine(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with SLDGuard("a weapon", "max").attach(pipe):
        sld = draw(pipe)
    with token.guard().attach(pipe) as trace, SLDGuard("a weapon", "max").attach(pipe):
        both = draw(pipe)
    acted = [trace.summary(i)["is_firing"] for i in range(2)].index(True)
    assert (both[acted] - sld[acted]).abs().max() > 0.01
