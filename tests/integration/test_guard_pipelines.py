"""The guard on real pipelines of exact architectures with small random weights.

For each: with strength 0 the output is bit-equal; guided it equals ``reference_guard``, which is written apart from
dagkit; the sample that does not fire stays bit-equal; nothing is left on the model.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import GuardError
from dagkit.guard import ConceptFound, SEGAGuard, SLDGuard
from dagkit.guidance import SLD_PRESETS
from dagkit.token import GuidelineToken, Thresholds
from guarded import IMAGE, check, count_rows, draw, leftovers, redraw

MASK = Image.linear_gradient("L").resize((32, 32))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd()


@pytest.mark.parametrize("form", ["drop", "subtract"])
@pytest.mark.parametrize("is_learned", [True, False])
def test_equals_the_plain_form(pipe: Any, form: str, is_learned: bool) -> None:
    trace = check(pipe, lambda: draw(pipe), form=form, is_learned=is_learned)
    assert [record.step for record in trace.of(0)] == list(range(tiny.STEPS))


@pytest.mark.parametrize("guidance_scale", [3.0, 7.5])
def test_equals_a_ddim_loop_of_our_own(pipe: Any, guidance_scale: float) -> None:
    run = lambda: draw(pipe, guidance_scale=guidance_scale)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    check(pipe, run, token=token, expected=tiny.reference_ddim(pipe, token, guidance_scale))


@pytest.mark.parametrize("mask", ["sld", "sega"])
def test_equals_the_plain_form_with_a_peers_mask(pipe: Any, mask: str) -> None:
    run = lambda: draw(pipe)  # noqa: E731
    token = tiny.half_firing(pipe, run, form="subtract", guidance={"insistence": 0.0})
    check(pipe, run, token=token, guard={"mask": mask})
    with token.guard().attach(pipe):
        unmasked = run()
    with token.guard(mask=mask).attach(pipe) as trace:
        assert not torch.equal(run(), unmasked)
    acted = [trace.summary(i)["is_firing"] for i in range(2)].index(True)
    assert 0 < trace.summary(acted)["strength"] <= 2


@pytest.mark.parametrize("form", ["drop", "subtract"])
@pytest.mark.parametrize("strength", [0.3, 1.7])
def test_equals_the_plain_form_at_any_strength(pipe: Any, form: str, strength: float) -> None:
    trace = check(pipe, lambda: draw(pipe), form=form, guidance={"insistence": 0.0}, guard={"strength": strength})
    acted = [trace.summary(i)["is_firing"] for i in range(2)].index(True)
    assert trace.summary(acted)["strength"] == pytest.approx(2 * strength)  # the token's own is 2, and its gate is open


def test_a_strength_close_to_0_is_close_to_unguarded(pipe: Any) -> None:
    token, plain = tiny.half_firing(pipe, lambda: draw(pipe)), draw(pipe)
    with token.guard(strength=1e-6).attach(pipe) as trace:
        guarded = draw(pipe)
    assert any(trace.summary(sample)["is_firing"] for sample in range(2))
    assert 0 < (guarded - plain).abs().max() < 1e-3


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
    "edm": (diffusers.EDMEulerScheduler, {}),
    "edm-dpm++": (diffusers.EDMDPMSolverMultistepScheduler, {}),
    "karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
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


def test_stable_diffusion_2() -> None:
    unet = tiny.unet(attention_head_dim=(4, 8), use_linear_projection=True)
    pipe = tiny.sd(unet=unet, scheduler=tiny.scheduler(prediction_type="v_prediction"))
    check(pipe, lambda: draw(pipe))


def test_a_timestep_that_is_none_of_the_schedule_is_refused(pipe: Any) -> None:
    for timestep in (-0.5, 1000.0, float("nan")):
        with tiny.token(pipe).guard().attach(pipe), pytest.raises(GuardError, match="calls its denoiser at timestep"):
            pipe.unet(torch.zeros(2, 4, 16, 16), timestep, torch.zeros(2, 16, tiny.WIDTH))


def test_a_callback_that_only_looks(pipe: Any) -> None:
    seen = []

    def look(pipe: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return values

    check(pipe, lambda: draw(pipe, callback_on_step_end=look))
    assert seen[: tiny.STEPS] == list(range(tiny.STEPS))


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
    check(pipe, lambda: redraw(pipe))


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int) -> None:
    pipe = tiny.sd(diffusers.StableDiffusionInpaintPipeline, unet=tiny.unet(in_channels=channels))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, mask_image=[MASK] * 2))


@pytest.mark.parametrize("is_guessing", [False, True])
def test_controlnet(is_guessing: bool) -> None:
    unet = tiny.unet()
    pipe = tiny.sd(diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, guess_mode=is_guessing))


def test_controlnet_image_to_image() -> None:
    unet = tiny.unet()
    pipe = tiny.sd(diffusers.StableDiffusionControlNetImg2ImgPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: redraw(pipe, control_image=[IMAGE] * 2))


def test_controlnet_inpainting() -> None:
    unet = tiny.unet()
    pipe = tiny.sd(diffusers.StableDiffusionControlNetInpaintPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, mask_image=[MASK] * 2, control_image=[IMAGE] * 2))


def test_t2i_adapter() -> None:
    pipe = tiny.sd(diffusers.StableDiffusionAdapterPipeline, adapter=tiny.adapter())
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2))


def test_sdxl() -> None:
    pipe = tiny.sdxl()
    check(pipe, lambda: draw(pipe))


def test_sdxl_image_to_image() -> None:
    pipe = tiny.sdxl(diffusers.StableDiffusionXLImg2ImgPipeline)
    check(pipe, lambda: redraw(pipe))


@pytest.mark.parametrize("channels", [4, 9])
def test_sdxl_inpainting(channels: int) -> None:
    pipe = tiny.sdxl(diffusers.StableDiffusionXLInpaintPipeline, unet=tiny.sdxl_unet(in_channels=channels))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, mask_image=[MASK] * 2, strength=1.0))


def test_sdxl_controlnet() -> None:
    unet = tiny.sdxl_unet()
    pipe = tiny.sdxl(diffusers.StableDiffusionXLControlNetPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2))


def test_sdxl_controlnet_image_to_image() -> None:
    unet = tiny.sdxl_unet()
    pipe = tiny.sdxl(diffusers.StableDiffusionXLControlNetImg2ImgPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: redraw(pipe, control_image=[IMAGE] * 2))


def test_sdxl_controlnet_inpainting() -> None:
    unet = tiny.sdxl_unet()
    pipe = tiny.sdxl(diffusers.StableDiffusionXLControlNetInpaintPipeline, unet=unet, controlnet=tiny.controlnet(unet))
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2, mask_image=[MASK] * 2, control_image=[IMAGE] * 2, strength=1.0))


def test_sdxl_t2i_adapter() -> None:
    pipe = tiny.sdxl(diffusers.StableDiffusionXLAdapterPipeline, adapter=tiny.adapter())
    check(pipe, lambda: draw(pipe, image=[IMAGE] * 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_reduced_precision(dtype: torch.dtype, tolerance: float) -> None:
    pipe = tiny.sd()
    run = lambda: draw(pipe, num_inference_steps=2)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    pipe.to(dtype)  # the token's fingerprints hold in every precision
    check(pipe, run, token=token, tolerance=tolerance)


def test_attention_slicing_and_fused_projections() -> None:
    pipe = tiny.sd()
    run = lambda: draw(pipe)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    with token.guard().attach(pipe):
        expected = run()
    pipe.enable_attention_slicing(1)
    check(pipe, run, token=token, expected=expected)
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections()
    check(pipe, run, token=token, expected=expected)


def lora_pipeline() -> Any:
    peft = pytest.importorskip("peft")
    pipe = tiny.sd()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    pipe.unet.requires_grad_(False)
    return pipe


def first_map(pipe: Any, token: GuidelineToken, **changes: Any) -> Tensor:
    with token.guard(keep_maps=True, strength=0).attach(pipe) as trace:
        draw(pipe, **changes)
    return trace.maps[0, 0]


def test_lora_layers_are_read_and_do_not_change_the_fingerprint() -> None:
    plain, pipe = tiny.sd(), lora_pipeline()
    token = tiny.token(plain)
    assert (first_map(plain, token) - first_map(pipe, token)).abs().max() > 1e-4
    check(pipe, lambda: draw(pipe))


def test_keys_have_the_scale_that_the_pipeline_gives_its_lora_layers() -> None:
    plain, pipe = tiny.sd(), lora_pipeline()
    token, scaling = tiny.token(plain), dict(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.scaling)
    maps = [first_map(pipe, token, cross_attention_kwargs={"scale": scale}) for scale in (1e-6, 0.3, 1.0)]
    torch.testing.assert_close(maps[0], first_map(plain, token), atol=1e-5, rtol=0)
    assert (maps[1] - maps[2]).abs().max() > 1e-4
    check(pipe, lambda: draw(pipe, cross_attention_kwargs={"scale": 0.3}))
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.scaling == pytest.approx(scaling)


def test_model_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.sd()
    run = lambda: draw(pipe)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    with token.guard().attach(pipe):
        expected = run()
    for part in (pipe.text_encoder, pipe.unet):
        accelerate.cpu_offload_with_hook(part, torch.device("cpu"))
    check(pipe, run, token=token, expected=expected, tolerance=0)
    check(pipe, run, token=token)
    with token.guard().attach(pipe) as trace:
        for _ in range(2):  # the second image is guarded like the first
            assert torch.equal(run(), expected)
    assert {record.run for record in trace.steps} == {0, 1}


@pytest.mark.slow
def test_compiled_denoiser() -> None:
    pipe = tiny.sd()
    run = lambda: draw(pipe, num_inference_steps=2)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    with token.guard().attach(pipe):
        expected = run()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with token.guard().attach(pipe):
        assert (run() - expected).abs().max() < 1e-4 * expected.abs().max()
    run()  # compiled anew without hooks, or still with idle ones
    try:
        with token.guard().attach(pipe):  # either it is guarded, or it is refused: never silently unguarded
            assert (run() - expected).abs().max() < 1e-4 * expected.abs().max()
    except GuardError as error:
        assert "torch._dynamo.reset()" in str(error)  # noqa: PT017
    torch._dynamo.reset()
    with token.guard(strength=0).attach(pipe):
        watched = run()
    torch._dynamo.reset()
    with token.guard().attach(pipe) as trace:
        guarded = run()
    torch._dynamo.reset()
    plain = run()
    assert torch.equal(watched, plain)
    silent = [trace.summary(sample)["is_firing"] for sample in range(2)].index(False)
    assert torch.equal(guarded[silent], plain[silent])
    assert leftovers(pipe) == len(token.record.layers)  # idle, so that nothing is compiled anew
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
    assert leftovers(pipe) == 0


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


def test_a_replaced_denoiser_is_noticed_before_an_image_is_made() -> None:
    pipe = tiny.sd()
    token, own, other = tiny.half_firing(pipe, lambda: draw(pipe)), pipe.unet, tiny.unet().eval().requires_grad_(False)
    with token.guard().attach(pipe):
        expected = draw(pipe)

    def swap(pipe: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = other
        return values

    for changes in ({}, {"callback_on_step_end": swap}):  # from the first step on, or from the second
        with token.guard().attach(pipe) as trace:
            pipe.unet = own if changes else other
            with pytest.raises(GuardError, match="took a step, but its denoiser was never seen"):
                draw(pipe, **changes)
            pipe.unet = own
            assert torch.equal(draw(pipe), expected)
        assert trace.steps
    assert leftovers(pipe) == 0


def test_a_replaced_scheduler_is_refused() -> None:
    pipe = tiny.sd()
    guard, own = tiny.token(pipe).guard(), pipe.scheduler

    def replace_and_draw(is_drawing: bool) -> None:
        with guard.attach(pipe):
            pipe.scheduler = tiny.scheduler()
            if is_drawing:
                draw(pipe)

    for is_drawing in (True, False):
        with pytest.raises(GuardError, match="got another scheduler while a guard was attached"):
            replace_and_draw(is_drawing)
        assert "step" not in vars(own)
        pipe.scheduler = own


def test_a_copied_scheduler_steps_itself_and_is_let_go_of() -> None:
    pipe = tiny.sd()
    plain = draw(pipe)
    with tiny.token(pipe).guard(strength=0).attach(pipe):
        copied = copy.deepcopy(pipe.scheduler)
        copied.set_timesteps(2)
        with pytest.raises(GuardError, match="took a step"):
            copied.step(torch.zeros(1), copied.timesteps[0], torch.zeros(1))
    pipe.scheduler = copied
    assert torch.equal(draw(pipe), plain)


def test_a_schedulers_own_patch_is_kept() -> None:
    pipe = tiny.sd()
    taken: list[int] = []
    step = pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    with tiny.token(pipe).guard(strength=0).attach(pipe):
        draw(pipe)
    assert len(taken) == tiny.STEPS
    assert pipe.scheduler.step is counted


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


@pytest.mark.parametrize("mask", ["sld", "sega"])
def test_a_mask_that_does_not_fit_is_refused(pipe: Any, mask: str) -> None:
    with pytest.raises(GuardError, match=f"mask '{mask}' fits no form 'drop'.*Use form='subtract' or 'paper'"):
        tiny.token(pipe).guard(mask=mask)
    with pytest.raises(GuardError, match="mask must be one of sld, sega or None, but got 'sdl'"):
        tiny.token(pipe).guard(mask="sdl", form="subtract")


def test_a_token_that_can_never_be_sure_is_refused(pipe: Any) -> None:
    thresholds = Thresholds(levels=(0, 0.5), highlight=(0.5, 0.5), edit=(0.1, 0.1), certain=(1.0, 1.0))
    token = tiny.token(pipe, thresholds=thresholds)
    for form in ("drop", "subtract"):
        with (
            pytest.raises(GuardError, match=r"weapon@1.0.0 can never be sure: its certainty threshold is 1"),
            token.guard(form=form).attach(pipe),
        ):
            pass
    sure_late = thresholds.model_copy(update={"certain": (0.5, 1.0)})
    for guard in (
        token.guard(thresholds=thresholds),
        token.guard(form="paper"),
        tiny.token(pipe, thresholds=sure_late).guard(),
    ):
        with guard.attach(pipe):
            pass


def test_the_papers_form_needs_an_edit_threshold(pipe: Any) -> None:
    token = tiny.token(pipe, thresholds=Thresholds(highlight=(0.5,), edit=(0.0,)))
    with pytest.raises(GuardError, match="'paper' divides by the edit threshold, which must be above 0"):
        token.guard(form="paper")
    token.guard(form="drop")


@pytest.mark.parametrize("change", [1, -1])
def test_head_weights_that_fit_no_heads_are_refused(pipe: Any, change: int) -> None:
    token = tiny.token(pipe)
    weights = token.head_weights
    assert weights is not None
    count = len(weights) + change
    wrong = replace(token, head_weights=torch.full((count,), 1 / count))
    with (
        pytest.raises(GuardError, match=rf"has {count} head weights, but its 7 layers have {len(weights)} heads"),
        wrong.guard().attach(pipe),
    ):
        pass


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
    assert leftovers(pipe) == 0


@pytest.mark.parametrize("form", ["drop", "subtract"])
def test_certainty_alone_decides_what_fires(pipe: Any, form: str) -> None:
    """Sure below the edit threshold: the concept is found, though the gate has nothing to open for."""
    token = tiny.token(pipe, form=form)
    sure = Thresholds(highlight=(1.0,), edit=(1.0,), certain=(0.01,))
    plain = draw(pipe)
    with token.guard(thresholds=sure).attach(pipe) as trace:
        assert torch.equal(draw(pipe), plain)
    assert {(record.is_firing, record.reason, record.strength) for record in trace.steps} == {
        (True, "concept found", 0.0)
    }
    with pytest.raises(ConceptFound), token.guard(mode="stop", thresholds=sure).attach(pipe):
        draw(pipe)
    unsure = Thresholds(highlight=(0.2,), edit=(0.01,), certain=(1.0,))
    with token.guard(mode="stop", thresholds=unsure).attach(pipe) as trace:
        assert torch.equal(draw(pipe), plain)
    assert {(record.is_firing, record.reason) for record in trace.steps} == {(False, "below threshold")}


def test_the_papers_form_acts_on_less_than_it_stops_for(pipe: Any) -> None:
    token, plain = tiny.token(pipe, form="paper"), draw(pipe)
    with token.guard(mode="monitor", keep_maps=True).attach(pipe) as trace:
        draw(pipe)
    least, most = (float(f(trace.maps[0, 0])) for f in (torch.min, torch.max))
    limits = {"max_area": 1.0, "edit": ((least + most) / 2,)}
    with token.guard(mode="stop", thresholds=Thresholds(highlight=(1.0,), **limits)).attach(pipe):
        assert torch.equal(draw(pipe), plain)
    with token.guard(thresholds=Thresholds(highlight=(1.0,), **limits)).attach(pipe) as trace:
        assert not torch.equal(draw(pipe), plain)
    edited = [record for record in trace.steps if record.strength > 0]
    assert edited
    assert {(record.is_firing, record.reason) for record in edited} == {(False, "edited, but nothing highlighted")}
    with (
        pytest.raises(ConceptFound),
        token.guard(mode="stop", thresholds=Thresholds(highlight=(most,), **limits)).attach(pipe),
    ):
        draw(pipe)
    wide = Thresholds(highlight=(least,), edit=(least,), max_area=0.5)
    with token.guard(thresholds=wide).attach(pipe) as trace:
        draw(pipe)
    assert trace.steps[0].is_firing
    assert trace.steps[0].strength == 0
    assert trace.steps[0].reason == "gate covers 100%, above 50%"


def test_a_trace_can_be_cleared_between_images(pipe: Any) -> None:
    with tiny.token(pipe).guard(mode="monitor", keep_maps=True).attach(pipe) as trace:
        for run in range(3):
            draw(pipe)
            assert len(trace.steps) == 2 * tiny.STEPS
            assert trace.summary(1, run)["num_steps"] == tiny.STEPS
            trace.clear()
            assert (trace.steps, trace.maps) == ([], {})


def test_queries_are_let_go_of_before_the_safety_forward(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        alive.append(weakref.ref(output))

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) != 4:  # a safety forward
            held.append(sum(ref() is not None for ref in alive))

    handles = [layer.to_q.register_forward_hook(keep), pipe.unet.conv_in.register_forward_pre_hook(count)]
    with token.guard().attach(pipe), SLDGuard("a weapon").attach(pipe):
        draw(pipe)
    for handle in handles:
        handle.remove()
    assert held
    assert set(held) == {0}


def test_the_safety_forward_runs_for_firing_samples_only_and_is_reused(pipe: Any) -> None:
    run = lambda: draw(pipe, num_inference_steps=14)  # noqa: E731
    token = tiny.half_firing(pipe, run, guidance={"memory": 1.0})
    with token.guard().attach(pipe) as trace:
        run()
    firing = [record.step for record in trace.steps if record.is_firing]
    assert 0 < len(firing) <= 14
    assert firing == list(range(firing[0], 14))
    assert count_rows(pipe, run, token.guard()) == 14 * 4 + len(firing)
    due = {step for step in firing if step % 2 == 0} | {firing[0]}
    assert count_rows(pipe, run, token.guard(reuse_steps=2)) == 14 * 4 + len(due)
    assert count_rows(pipe, run, token.guard(reuse_steps=100)) == 14 * 4 + 1
    assert count_rows(pipe, run, token.guard(mode="monitor")) == 14 * 4


def test_in_few_steps_a_safety_prediction_is_not_kept(pipe: Any) -> None:
    """One of 166 timesteps ago, in 6 steps, says little about now."""
    run = lambda: draw(pipe, num_inference_steps=6)  # noqa: E731
    token = tiny.half_firing(pipe, run, guidance={"memory": 1.0})
    assert count_rows(pipe, run, token.guard(reuse_steps=2)) == count_rows(pipe, run, token.guard())


def second_token(pipe: Any, **options: Any) -> GuidelineToken:
    """Another concept, with another safety prompt, found in every sample."""
    token = tiny.token(pipe, seed=9, thresholds=Thresholds(highlight=(0.45,), edit=(0.3,), certain=(0.3,)), **options)
    return replace(token, record=token.record.model_copy(update={"safety_prompt": "a knife", "concept": "knife"}))


def first_modules(pipe: Any) -> tuple[nn.Module, nn.Module]:
    """The first ResNet block and the first self-attention."""
    down = pipe.unet.down_blocks[0]
    return down.resnets[0], down.attentions[0].transformer_blocks[0].attn1


def calls_of(pipe: Any, token: GuidelineToken, *modules: nn.Module) -> tuple[list[int], Tensor]:
    """How often parts of the denoiser run in a guarded run, and its latents."""
    counts = [0] * len(modules)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(index)) for index, module in enumerate(modules)]
    with token.guard(reuse_steps=1).attach(pipe):
        latents = draw(pipe)
    for handle in handles:
        handle.remove()
    return counts, latents


def test_what_comes_before_the_text_is_computed_once(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    resnet, attention = first_modules(pipe)
    parts = (resnet.conv1, attention.to_q, pipe.unet.up_blocks[-1].resnets[0].conv1)
    counts, shared = calls_of(pipe, token, *parts)
    assert counts[0] == counts[1] == tiny.STEPS < counts[2]
    handle = attention.register_forward_hook(lambda *_: None)  # nobody knows what another's hook does
    again, whole = calls_of(pipe, token, *parts)
    handle.remove()
    assert again == [counts[2]] * 3
    assert torch.allclose(shared, whole, atol=1e-5 * float(whole.abs().max()))
    assert leftovers(pipe) == 0


def patched(pipe: Any) -> None:
    attention = first_modules(pipe)[1]
    attention.forward = attention.forward


def merged(pipe: Any) -> None:
    """As token merging does: the block is of a class of its own."""
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.__class__ = type("MergingBlock", (type(block),), {})


def compiled(pipe: Any) -> None:
    first_modules(pipe)[1].compile()


@pytest.mark.parametrize("change", [patched, merged, compiled])
def test_modules_that_others_changed_are_left_alone(change: Callable[[Any], None]) -> None:
    pipe = tiny.sd()
    family = models.match(pipe)
    assert list(family.before_condition(pipe)) == list(first_modules(pipe))
    change(pipe)
    assert family.before_condition(pipe) == []


def test_sdxls_text_enters_with_the_timestep_so_nothing_comes_before_it() -> None:
    pipe = tiny.sdxl()
    assert models.match(pipe).before_condition(pipe) == []


def test_a_safety_forward_that_fails_leaves_the_denoiser_as_it_was(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    resnet, plain = first_modules(pipe)[0], draw(pipe)
    output = pipe.unet.conv_out

    def fail(_module: Any, _args: Any, _output: Any) -> None:
        if "forward" in vars(resnet):
            raise RuntimeError("out of memory")

    handle = output.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), token.guard().attach(pipe):
        draw(pipe)
    handle.remove()
    assert leftovers(pipe) == 0
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("forms", [("drop", "drop"), ("drop", "subtract"), ("subtract", "subtract")], ids="+".join)
def test_several_guards_add_up_in_any_order(pipe: Any, forms: tuple[str, str]) -> None:
    first, second = tiny.half_firing(pipe, lambda: draw(pipe), form=forms[0]), second_token(pipe, form=forms[1])
    with tiny.reference_guard(pipe, first, second):
        expected = draw(pipe)
    drawn = []
    for one, other in ((first, second), (second, first)):
        with one.guard().attach(pipe) as trace, other.guard().attach(pipe) as trace_other:
            drawn.append(draw(pipe))
        for token, its in ((one, trace), (other, trace_other)):
            assert {record.concept for record in its.steps} == {token.name}
            assert len(its.steps) == 2 * tiny.STEPS
    assert torch.equal(*drawn)
    assert (drawn[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    with second.guard().attach(pipe):
        assert not torch.equal(draw(pipe), drawn[0])


def test_a_guard_beside_one_that_is_silent_changes_what_it_changes_alone(pipe: Any) -> None:
    first = tiny.half_firing(pipe, lambda: draw(pipe))
    silent = tiny.token(pipe, seed=9)
    never = Thresholds(highlight=(1.0,), edit=(0.5,))
    with first.guard().attach(pipe):
        alone = draw(pipe)
    with first.guard().attach(pipe), silent.guard(thresholds=never).attach(pipe):
        assert torch.equal(draw(pipe), alone)


@pytest.mark.parametrize(("preset", "num_steps"), [("weak", 17), ("strong", 9)])  # "max" amplifies rounding by 5000
def test_dag_and_sld_add_up_in_any_order(pipe: Any, preset: str, num_steps: int) -> None:
    token, run = tiny.half_firing(pipe, lambda: draw(pipe)), lambda: draw(pipe, num_inference_steps=num_steps)
    with tiny.reference_guard(pipe, token, sld=("a knife", SLD_PRESETS[preset])):
        expected = run()
    guards = (token.guard(), SLDGuard("a knife", preset))
    for one, other in (guards, guards[::-1]):
        with one.attach(pipe), other.attach(pipe):
            assert (run() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_each_guard_has_its_own_safety_condition_and_rows(pipe: Any) -> None:
    first, second = tiny.half_firing(pipe, lambda: draw(pipe)), second_token(pipe)
    prompts = [token.record.safety_prompt for token in (first, second)]
    conditions = models.match(pipe).encode_prompt(pipe, prompts).hidden_states
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1:] == conditions.shape[1:] and len(args[0]) != 4:  # a safety forward
            seen.append(args[0])

    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    handle = layer.to_k.register_forward_pre_hook(keep)
    with first.guard().attach(pipe) as one, second.guard().attach(pipe) as two:
        draw(pipe)
    handle.remove()
    for condition, trace in zip(conditions, (one, two), strict=True):
        rows = [sum(record.strength > 0 for record in trace.steps if record.step == step) for step in range(tiny.STEPS)]
        own = [len(hidden) for hidden in seen if torch.equal(hidden, condition.expand_as(hidden))]
        assert own == [count for count in rows if count]
    assert {record.sample for record in one.steps if record.strength > 0} < {0, 1}


@pytest.mark.parametrize("is_first_first", [True, False])
def test_guards_are_detached_in_any_order(pipe: Any, is_first_first: bool) -> None:
    token, plain = tiny.half_firing(pipe, lambda: draw(pipe)), draw(pipe)
    guards = [token.guard(), SLDGuard("a knife", "max")]
    open_guards = [guard.attach(pipe) for guard in guards]
    for context in open_guards:
        context.__enter__()
    gone = 0 if is_first_first else 1
    open_guards[gone].__exit__(None, None, None)
    left = draw(pipe)
    open_guards[1 - gone].__exit__(None, None, None)
    assert leftovers(pipe) == 0
    assert torch.equal(draw(pipe), plain)
    with guards[1 - gone].attach(pipe):
        assert torch.equal(draw(pipe), left)


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


def test_nothing_is_changed_above_the_tokens_first_level(pipe: Any) -> None:
    thresholds = Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0)
    token = tiny.token(pipe, thresholds=thresholds, guidance={"max_level": 0.4})
    with token.guard().attach(pipe) as trace:
        draw(pipe)
    decided = [(record.timestep, record.reason, record.is_firing, record.strength > 0) for record in trace.of(0)]
    assert decided == [
        (667.0, "concept found, too early to act", False, False),
        (334.0, "concept found", True, True),
        (1.0, "concept found", True, True),
    ]


@pytest.mark.parametrize("form", ["drop", "subtract"])
def test_a_concept_that_stays_is_pushed_harder(pipe: Any, form: str) -> None:
    thresholds = Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0)
    token = tiny.token(pipe, thresholds=thresholds, form=form, guidance={"insistence": 2.0})
    with token.guard().attach(pipe) as trace:
        draw(pipe)
    # from t = 667 on, of strength 2: 0, 333 and 666 timesteps later
    expected = [2.0, 2 * (1 + 2 * 183 / 200), 2 * (1 + 2 * 516 / 200)]
    assert [record.strength for record in trace.of(0)] == pytest.approx(expected)


def test_a_concept_that_is_gone_is_not_pushed_harder(pipe: Any) -> None:
    """Seen at the first of three steps only: later ones keep to the token's own strength, on what is remembered."""
    thresholds = Thresholds(
        levels=(0.4, 0.6), highlight=(1e-6, 1e-6), edit=(0.0, 0.0), certain=(1.0, 0.0), min_area=0.0
    )
    token = tiny.token(pipe, thresholds=thresholds, guidance={"insistence": 2.0, "memory": 1.0})
    with token.guard().attach(pipe) as trace:
        draw(pipe)
    assert [record.reason for record in trace.of(0)] == ["concept found", "found before", "found before"]
    assert [record.strength for record in trace.of(0)] == pytest.approx([2.0, 2.0, 2.0])


def test_a_run_that_ends_before_the_guard_acts_is_refused(pipe: Any) -> None:
    token = tiny.token(pipe, guidance={"max_level": 0})
    with (
        pytest.raises(GuardError, match=r"acts from noise level 0 down, but DDIMScheduler ends at 0.001"),
        token.guard().attach(pipe),
    ):
        draw(pipe)
