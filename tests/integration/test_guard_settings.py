"""What a user sets must not take the protection away: it is made to work, or refused when the run begins."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import GuardError, TokenError
from dagkit.guard import SEGAGuard, SLDGuard
from dagkit.guidance import SLD_PRESETS
from dagkit.models import Encoding
from dagkit.token import GuidelineToken, Thresholds
from guarded import IMAGE, check, count_rows, draw, leftovers

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
ALWAYS = Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd()


def with_scheduler(pipe: Any, scheduler: Any, cls: Any = diffusers.StableDiffusionPipeline) -> Any:
    """Another pipeline with the parts of one."""
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    return tiny.sd(cls, **parts, scheduler=scheduler)


# what conditions the unconditional half


def conditioned(pipe: Any) -> Callback:
    """A callback that puts the safety prompt into the unconditional half."""
    hidden = models.match(pipe).encode_prompt(pipe, ["a weapon"]).hidden_states

    def change(_pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.cat([hidden.expand(2, -1, -1), values["prompt_embeds"].chunk(2)[1]])}

    return change


def negatives(pipe: Any) -> dict[str, dict[str, Any]]:
    embeddings = models.match(pipe).encode_prompt(pipe, ["a weapon"] * 2).hidden_states
    return {
        "the safety prompt": {"negative_prompt": ["a weapon"] * 2},
        "the prompt itself": {"negative_prompt": tiny.PROMPTS},
        "one of two": {"negative_prompt": ["", "a bomb"]},
        "embeddings": {"negative_prompt_embeds": embeddings},
        "zeros": {"negative_prompt_embeds": torch.zeros_like(embeddings)},
        "a callback": {
            "callback_on_step_end": conditioned(pipe),
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        },
    }


@pytest.mark.parametrize("form", ["drop", "subtract"])
@pytest.mark.parametrize("name", negatives(tiny.sd()))
def test_the_push_is_away_from_the_concept_whatever_is_negative(pipe: Any, name: str, form: str) -> None:
    trace = check(pipe, lambda: draw(pipe, **negatives(pipe)[name]), form=form)
    assert max(record.change for record in trace.steps) > 0.01


def test_a_negative_prompt_costs_a_row_more_where_it_fires_only(pipe: Any) -> None:
    for changes, rows in (({}, 1), ({"negative_prompt": [""] * 2}, 1), ({"negative_prompt": ["a weapon"] * 2}, 2)):
        run = lambda: draw(pipe, **changes)  # noqa: B023, E731
        token = tiny.half_firing(pipe, run)
        with token.guard().attach(pipe) as trace:
            run()
        num_firing = sum(record.strength > 0 for record in trace.steps)
        assert num_firing > 0
        assert count_rows(pipe, run, token.guard()) == tiny.STEPS * 4 + rows * num_firing


@pytest.mark.parametrize("negative", [["a weapon"] * 2, ["", ""], None])
def test_sdxl_with_a_negative_prompt(negative: list[str] | None) -> None:
    pipe = tiny.sdxl()
    run = lambda: draw(pipe, negative_prompt=negative)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    with token.guard().attach(pipe) as trace:
        run()
    num_firing = sum(record.strength > 0 for record in trace.steps)
    rows = 2 if negative and negative[0] else 1  # zeros and the empty prompt both ask for nothing
    assert count_rows(pipe, run, token.guard()) == tiny.STEPS * 4 + rows * num_firing
    if negative != ["", ""]:  # the reference takes zeros for nothing
        check(pipe, run, token=token)


def test_negative_sizes_of_sdxl_are_no_push() -> None:
    """Safety and neutral prediction differ in the text alone, whatever else the unconditional half is given."""
    pipe = tiny.sdxl()
    changes = {"negative_original_size": (64, 8), "negative_target_size": (8, 64)}

    def run(**changes: Any) -> Tensor:
        one = torch.Generator().manual_seed(100)
        latents: Tensor = pipe(tiny.PROMPTS[:1], generator=one, **{**tiny.SETTINGS, **changes}).images
        return latents

    token = tiny.token(pipe, thresholds=ALWAYS)
    assert count_rows(pipe, run, token.guard()) == tiny.STEPS * (2 + 1)
    assert count_rows(pipe, lambda: run(**changes), token.guard()) == tiny.STEPS * (2 + 2)


@pytest.mark.parametrize("guard", [SLDGuard("a weapon", "max"), SEGAGuard("a weapon")], ids=["sld", "sega"])
def test_peers_push_too_where_the_safety_prompt_is_the_negative_prompt(pipe: Any, guard: Any) -> None:
    changes: dict[str, Any] = {"negative_prompt": ["a weapon"] * 2, "num_inference_steps": 12}
    plain = draw(pipe, **changes)
    with guard.attach(pipe):
        assert not torch.equal(draw(pipe, **changes), plain)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("negative", [None, ["a weapon", "a bomb"]])
def test_several_phrases_stand_side_by_side(name: str, negative: list[str] | None) -> None:
    pipe = getattr(tiny, name)()
    run = lambda: draw(pipe, negative_prompt=negative)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    phrases = ("a bomb", "a knife and a cat", "a dog")
    many = replace(token, record=token.record.model_copy(update={"safety_phrases": phrases}))
    check(pipe, run, token=many)
    one, twice = (
        replace(token, record=token.record.model_copy(update={"safety_phrases": ("a bomb",) * count}))
        for count in (1, 2)
    )
    guarded = [run_guarded(one, pipe, negative_prompt=negative), run_guarded(twice, pipe, negative_prompt=negative)]
    assert (guarded[0] - guarded[1]).abs().max() < 1e-4
    assert (guarded[0] - run_guarded(many, pipe, negative_prompt=negative)).abs().max() > 1e-3


def test_several_guards_under_a_negative_prompt(pipe: Any) -> None:
    run = lambda: draw(pipe, negative_prompt=["a weapon", "a knife"])  # noqa: E731
    token = tiny.half_firing(pipe, run)
    with tiny.reference_guard(pipe, token, sld=("a knife", SLD_PRESETS["weak"])):
        expected = run()
    guards = (token.guard(), SLDGuard("a knife", "weak"))
    for one, other in (guards, guards[::-1]):
        with one.attach(pipe), other.attach(pipe):
            assert (run() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_safety_prompt_that_says_nothing_is_refused(pipe: Any) -> None:
    token = tiny.token(pipe)
    silent = replace(token, record=token.record.model_copy(update={"safety_prompt": " "}))
    with pytest.raises(GuardError, match="safety prompt ' ' says as much to StableDiffusionPipeline as an empty one"):
        silent.guard().attach(pipe).__enter__()
    assert leftovers(pipe) == 0


# what the trace says


def test_the_trace_tells_what_was_really_changed(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    kept: list[Tensor] = []
    forward = pipe.unet.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if len(output[0]) == 4:
            kept.append(output[0].clone())
        return output

    pipe.unet.forward = keep
    guided: list[Tensor] = []
    try:
        with token.guard().attach(pipe) as trace:
            handle = pipe.unet.register_forward_hook(lambda _module, _args, output: guided.append(output[0]))
            draw(pipe)
            handle.remove()
    finally:
        del pipe.unet.forward
    assert len(kept) == len(guided) == tiny.STEPS
    for record in trace.steps:
        before, after = (values[record.step].chunk(2)[1][record.sample] for values in (kept, guided))
        assert record.change == pytest.approx(float((after - before).norm() / before.norm()), abs=1e-6)
    assert {record.change > 0 for record in trace.steps} == {True, False}
    assert max(trace.summary(sample)["change"] for sample in range(2)) == max(r.change for r in trace.steps)


def test_a_change_that_is_not_finite_is_refused(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))

    def overflow(_module: nn.Module, args: Any, output: Any) -> Any:
        return output if len(args[0]) == 4 else output * float("inf")  # of a safety forward

    handle = pipe.unet.conv_out.register_forward_hook(overflow)
    with pytest.raises(GuardError, match=r"the change at timestep .* holds inf or nan"), token.guard().attach(pipe):
        draw(pipe)
    handle.remove()


def test_a_denoiser_that_does_not_listen_is_refused(pipe: Any) -> None:
    """A safety forward that says what the unconditional half says pushes nowhere."""
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    last: list[Tensor] = []

    def deaf(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if len(args[0]) == 4:
            last[:] = [output.chunk(2)[0]]
            return output
        return torch.cat([last[0]] * len(output))[: len(output)] if len(output) == 2 else last[0][acted : acted + 1]

    with token.guard().attach(pipe) as trace:
        draw(pipe)
    acted = [trace.summary(sample)["is_firing"] for sample in range(2)].index(True)
    handle = pipe.unet.conv_out.register_forward_hook(deaf)
    with pytest.raises(GuardError, match="predicts the same under the safety prompt as under none"):
        run_guarded(token, pipe)
    handle.remove()


def run_guarded(token: GuidelineToken, pipe: Any, **changes: Any) -> Tensor:
    with token.guard().attach(pipe):
        return draw(pipe, **changes)


def test_what_a_safety_checker_draws_black_is_told(pipe: Any) -> None:
    def blacken(image: Any, *_: Any) -> tuple[Any, list[bool]]:
        return image, [False, True]

    pipe.run_safety_checker = blacken
    try:
        with (
            pytest.warns(UserWarning, match="draws 1 of 2 images black"),
            tiny.token(pipe).guard(mode="monitor").attach(pipe) as trace,
        ):
            draw(pipe, output_type="np")
    finally:
        del pipe.run_safety_checker
    assert trace.blackened == {0: [False, True]}
    assert [trace.summary(sample)["is_blackened"] for sample in range(2)] == [False, True]
    trace.clear()
    assert trace.blackened == {}


# guidance scale


@pytest.mark.parametrize(("scale", "factor"), [(1.25, 4.0), (2.5, 2.0), (5.0, 1.0), (12.0, 1.0)])
def test_the_push_reaches_as_far_at_weak_guidance(pipe: Any, scale: float, factor: float) -> None:
    token = tiny.token(pipe, thresholds=ALWAYS, guidance={"insistence": 0.0})
    with token.guard().attach(pipe) as trace:
        draw(pipe, guidance_scale=scale)
    assert trace.of(0)[0].strength == pytest.approx(2 * factor)
    check(pipe, lambda: draw(pipe, guidance_scale=scale))


def test_a_callback_that_lowers_the_guidance_is_made_up_for(pipe: Any) -> None:
    def lower(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.25
        return values

    token = tiny.token(pipe, thresholds=ALWAYS, guidance={"insistence": 0.0})
    with token.guard().attach(pipe) as trace:
        draw(pipe, callback_on_step_end=lower)
    assert [record.strength for record in trace.of(0)] == pytest.approx([2.0, 8.0, 8.0])


# steps


def coarse(pipe: Any, **guidance: Any) -> GuidelineToken:
    return tiny.token(pipe, thresholds=ALWAYS, guidance={"max_step": 0.255, "max_level": 0.77, **guidance})


@pytest.mark.parametrize("num_steps", [2, 3])
def test_too_few_steps_are_refused_when_the_run_begins(pipe: Any, num_steps: int) -> None:
    with pytest.raises(
        GuardError,
        match=r"DDIMScheduler takes a step of 0\.\d+ of the noise, at noise level 0\.\d+; weapon.* at most 0.255",
    ):
        run_guarded(coarse(pipe), pipe, num_inference_steps=num_steps)
    run_guarded(coarse(pipe), pipe, num_inference_steps=4)
    for mode in ("monitor", "stop"):  # these change nothing
        never = Thresholds(highlight=(1.0,), edit=(0.5,), certain=(0.999,))
        with coarse(pipe).guard(mode=mode, thresholds=never).attach(pipe):
            draw(pipe, num_inference_steps=num_steps)


@pytest.mark.parametrize(("num_steps", "scale", "is_weak"), [(8, 12.0, True), (8, 7.5, False), (20, 12.0, False)])
def test_few_steps_of_strong_guidance_are_warned_of(pipe: Any, num_steps: int, scale: float, is_weak: bool) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_guarded(coarse(pipe), pipe, num_inference_steps=num_steps, guidance_scale=scale)
    found = [str(one.message) for one in told if "guards less well" in str(one.message)]
    assert len(found) == is_weak
    assert all("guidance scale (12)" in text and "num_inference_steps" in text for text in found)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([999, 400, 200, 1], "a step of 0.599 of the noise, at noise level 0.999"),
        ([999, 900, 800, 700, 600], "a step of 0.6 of the noise, at noise level 0.6"),
        ([999, 950, 900, 850], "a step of 0.85 of the noise, at noise level 0.85"),
        ([999, 900, 800, 600, 400, 200, 1], None),
    ],
)
def test_timesteps_of_ones_own(pipe: Any, timesteps: list[int], message: str | None) -> None:
    own = with_scheduler(pipe, tiny.scheduler(diffusers.EulerDiscreteScheduler))
    if message is None:
        run_guarded(coarse(pipe), own, timesteps=timesteps)
        return
    with pytest.raises(GuardError, match=message):
        run_guarded(coarse(pipe), own, timesteps=timesteps)


def test_the_guard_acts_in_a_long_step_that_begins_a_little_early(pipe: Any) -> None:
    """At 831 of six steps: more than half of the step to 665 lies below 770. Of that at 853 of seven less than half."""
    for num_steps, first in ((7, 711.0), (6, 831.0), (4, 751.0)):
        with coarse(pipe).guard().attach(pipe) as trace:
            draw(pipe, num_inference_steps=num_steps)
        assert trace.summary(0)["first_timestep"] == first


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (0.2, "would never act"),
        (0.6, r"would come back.*Set denoising_end to 0\.75 or more"),
        (0.75, None),
        (0.8, None),
    ],
)
def test_sdxls_denoising_end(end: float, message: str | None) -> None:
    pipe = tiny.sdxl()
    changes = {"denoising_end": end, "num_inference_steps": 20}
    if message is None:
        run_guarded(coarse(pipe), pipe, **changes)
        return
    with pytest.raises(GuardError, match=message):
        run_guarded(coarse(pipe), pipe, **changes)


@pytest.mark.parametrize("shows", [True, False])
def test_a_picture_that_shows_the_concept_is_refused_where_it_is_too_late(shows: bool) -> None:
    pipe = tiny.sd(diffusers.StableDiffusionImg2ImgPipeline)
    never = Thresholds(highlight=(1.0,), edit=(0.5,), certain=(0.999,))
    token = tiny.token(pipe, thresholds=ALWAYS if shows else never, guidance={"min_start": 0.35})

    def guarded(strength: float) -> Any:
        with token.guard().attach(pipe) as trace:
            pipe(tiny.PROMPTS, image=[IMAGE] * 2, strength=strength, num_inference_steps=20, output_type="latent")
        return trace

    if shows:
        with pytest.raises(
            GuardError, match=r"starts from, at noise level 0.151, shows the concept .*sample 0, 1.* too late"
        ):
            guarded(0.2)
        assert guarded(0.5).of(0)[0].strength == pytest.approx(4.0)  # found late, so pushed twice as hard
    else:
        assert guarded(0.2).of(0)
    assert leftovers(pipe) == 0


def test_without_guidance_the_reason_is_named() -> None:
    distilled = tiny.sd(unet=tiny.unet(time_cond_proj_dim=8))
    with pytest.raises(GuardError, match="UNet2DConditionModel was distilled with its guidance built in"):
        run_guarded(tiny.token(distilled), distilled)


@pytest.mark.parametrize("cls", [diffusers.DDIMScheduler, diffusers.LCMScheduler])
def test_zero_terminal_snr(pipe: Any, cls: Any) -> None:
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    divides = with_scheduler(pipe, tiny.scheduler(cls, **changes))
    with pytest.raises(GuardError, match=r"rescale_betas_zero_snr with prediction_type 'epsilon' and divides by 0"):
        run_guarded(tiny.token(pipe), divides, num_inference_steps=10)
    works = with_scheduler(pipe, tiny.scheduler(cls, prediction_type="v_prediction", **changes))
    token = tiny.token(pipe, thresholds=ALWAYS)
    assert not torch.equal(run_guarded(token, works), draw(works))


@pytest.mark.parametrize(
    ("guidance", "thresholds", "message"),
    [
        ({"max_level": 0.001}, {}, "max_level is 0.001, but a guard that acts below 0.35 only comes too late"),
        ({"max_level": 0.349}, {}, "max_level is 0.349"),
        ({}, {"highlight": (1.0,)}, "thresholds.certain or thresholds.min_area is 1"),
        ({}, {"min_area": 1.0}, "thresholds.certain or thresholds.min_area is 1"),
        ({}, {"edit": (1.0,), "highlight": (1.0,), "certain": (0.5,)}, "thresholds.edit is 1"),
        ({"form": "subtract", "strength": 0.0}, {}, "guidance.strength is 0"),
        ({"form": "paper", "strength": 0.0}, {}, "guidance.strength or thresholds.max_area is 0"),
        ({"form": "paper"}, {"max_area": 0.0}, "guidance.strength or thresholds.max_area is 0"),
    ],
    ids=str,
)
def test_a_token_that_never_acts_is_refused_when_it_is_loaded(
    pipe: Any, guidance: dict[str, Any], thresholds: dict[str, Any], message: str, tmp_path: Any
) -> None:
    token = tiny.token(pipe, thresholds=Thresholds(**thresholds), guidance={"min_start": 0.35, **guidance})
    with pytest.raises(TokenError, match=rf"token.json: .*{message}.*would guard nothing"):
        GuidelineToken.load(token.save(tmp_path / "token"))


# processors


class First:
    """Projects something else before the queries."""

    def __init__(self, plain: Any, other: Callable[[Tensor], Tensor]) -> None:
        self.plain, self.other = plain, other

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attn.to_q(self.other(hidden_states))
        result: Tensor = self.plain(attn, hidden_states, *args, **kwargs)
        return result


class RowByRow(First):
    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = zip(hidden_states.split(1), text.split(1), strict=True)
        return torch.cat([self.plain(attn, row, own) for row, own in rows])


class Merging(First):
    """A quarter of the positions, as token merging leaves them: as many as the next level has."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        merged = hidden_states.unflatten(1, (-1, 4)).mean(2)
        result: Tensor = self.plain(attn, merged, *args, **kwargs)
        return result.repeat_interleave(4, 1)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda plain: First(plain, torch.zeros_like), "processor First projected queries 2 times"),
        (lambda plain: First(plain, lambda hidden: hidden[:1]), "processor First projected queries 2 times"),
        (lambda plain: RowByRow(plain, torch.zeros_like), "processor RowByRow projected queries 4 times"),
        (
            lambda plain: Merging(plain, torch.zeros_like),
            r"processor Merging .* of shape \(4, 64, 32\).*\(4, 256, chann",
        ),
    ],
    ids=["first", "fewer rows first", "row by row", "merged"],
)
def test_processors_that_do_something_else_are_refused(processor: Callable[[Any], Any], message: str) -> None:
    pipe = tiny.sd()
    token = tiny.token(pipe)
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.set_processor(processor(layer.processor))
    draw(pipe)  # unguarded it runs
    with pytest.raises(GuardError, match=message):
        run_guarded(token, pipe)
    assert leftovers(pipe) == 0


def test_odd_sizes_have_the_positions_of_their_level() -> None:
    pipe = tiny.sd()
    token = tiny.token(pipe, thresholds=ALWAYS)
    with token.guard(keep_maps=True).attach(pipe) as trace:
        draw(pipe, height=40, width=24)
    assert trace.maps[0, 0].shape == (2, 20, 12)


# attach


def test_a_guard_that_is_not_entered_warns() -> None:
    pipe = tiny.sd()
    with pytest.warns(RuntimeWarning, match=r"StableDiffusionPipeline is not guarded: .* with guard\.attach"):
        tiny.token(pipe).guard().attach(pipe)
    assert leftovers(pipe) == 0


def test_a_guard_that_waits_to_be_entered_lets_nothing_be_drawn() -> None:
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    waiting = token.guard().attach(pipe)
    with pytest.raises(GuardError, match="made for this pipeline by attach, but not entered"):
        draw(pipe)
    with waiting:
        expected = draw(pipe)
    with pytest.raises(GuardError, match="attached before; call attach again"):
        waiting.__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del waiting
        gc.collect()
    assert torch.equal(run_guarded(token, pipe), expected)
    assert leftovers(pipe) == 0


# precision and text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_stay_float32_under_autocast(pipe: Any, dtype: torch.dtype) -> None:
    token = tiny.token(pipe, thresholds=ALWAYS)
    layers = {name: site.layer for name, site in models.match(pipe).sites(pipe, token.record.layers).items()}
    kept: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def heads(values: Tensor, layer: Any) -> Tensor:
        return values.unflatten(-1, (layer.heads, -1)).transpose(-2, -3)

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            assert output.dtype == dtype  # the denoiser itself is in half precision
            layer = layers[name]
            with torch.autocast("cpu", enabled=False):
                kept[name] = heads(output[2:].float(), layer), [heads(layer.to_k(token.sequence), layer)]

        return hook

    handles = [layer.to_q.register_forward_hook(keep(name)) for name, layer in layers.items()]
    with torch.autocast("cpu", dtype=dtype), token.guard(mode="monitor", keep_maps=True).attach(pipe) as trace:
        draw(pipe, num_inference_steps=1)
    for handle in handles:
        handle.remove()
    assert trace.maps[0, 0].dtype == torch.float32
    torch.testing.assert_close(trace.maps[0, 0], tiny._cam(pipe, token, 0, kept, (16, 16)), atol=1e-5, rtol=0)


def test_the_safety_prompt_is_encoded_as_the_prompts_are() -> None:
    pipe = tiny.sdxl()
    family, token = models.match(pipe), tiny.token(pipe, thresholds=ALWAYS)
    wanted = {
        skip: family.encode_prompt(pipe, ["a weapon"], Encoding(clip_skip=skip)).hidden_states for skip in (None, 1)
    }
    assert not torch.allclose(wanted[None], wanted[1])
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1:] == wanted[1].shape[1:] and len(args[0]) != 4:  # a safety forward
            seen.append(args[0])

    handle = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.register_forward_pre_hook(keep)
    for skip in (1, None, 1):
        seen.clear()
        run_guarded(token, pipe, clip_skip=skip)
        assert len(seen) == tiny.STEPS
        assert all(torch.equal(hidden, wanted[skip].expand_as(hidden)) for hidden in seen)
    handle.remove()


def test_a_lora_of_the_text_encoder_has_the_scale_of_the_call() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny.sd()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), pipe.text_encoder
    )
    pipe.text_encoder.requires_grad_(False)
    family = models.match(pipe)
    half, whole = (
        family.encode_prompt(pipe, ["a weapon"], Encoding(lora_scale=scale)).hidden_states for scale in (0.5, None)
    )
    assert not torch.allclose(half, whole)
    token = tiny.half_firing(pipe, lambda: draw(pipe, cross_attention_kwargs={"scale": 0.5}))
    seen: list[Tensor] = []
    handle = (
        pipe.unet.mid_block.attentions[0]
        .transformer_blocks[0]
        .attn2.to_k.register_forward_pre_hook(
            lambda _module, args: seen.append(args[0]) if len(args[0]) in (1, 2) else None
        )
    )
    run_guarded(token, pipe, cross_attention_kwargs={"scale": 0.5})
    handle.remove()
    safety = [hidden for hidden in seen if hidden.shape[1] == 16]
    assert safety
    assert all(torch.allclose(hidden, half.expand_as(hidden), atol=1e-6) for hidden in safety)


# pictures as prompts


def ip_adapter(pipe: Any) -> None:
    """An IP-Adapter of the exact architecture with random weights."""
    torch.manual_seed(3)
    weights: dict[str, Tensor] = {}
    for index, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for side in ("k", "v"):
                weights[f"{index}.to_{side}_ip.weight"] = torch.randn(layer.to_k.out_features, tiny.WIDTH) * 0.1
    projection = {
        "proj.weight": torch.randn(4 * tiny.WIDTH, 8) * 0.1,
        "proj.bias": torch.zeros(4 * tiny.WIDTH),
        "norm.weight": torch.ones(tiny.WIDTH),
        "norm.bias": torch.zeros(tiny.WIDTH),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    pipe.unet.eval().requires_grad_(False)


@pytest.mark.parametrize("is_negative_alike", [False, True])
def test_ip_adapter(is_negative_alike: bool) -> None:
    pipe = tiny.sd()
    ip_adapter(pipe)
    picture = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(4))
    halves = torch.cat([picture if is_negative_alike else torch.zeros_like(picture), picture])

    def run(**changes: Any) -> Tensor:
        return draw(pipe, ip_adapter_image_embeds=[halves], **changes)

    assert not torch.equal(run(), draw(pipe, ip_adapter_image_embeds=[torch.zeros_like(halves)]))
    token = tiny.half_firing(pipe, run)
    plain = run()
    with token.guard(strength=0).attach(pipe):
        assert torch.equal(run(), plain)
    with token.guard().attach(pipe) as trace:
        guarded = run()
    acted = [trace.summary(sample)["is_firing"] for sample in range(2)].index(True)
    assert torch.equal(guarded[1 - acted], plain[1 - acted])
    assert (guarded[acted] - plain[acted]).abs().max() > 1e-3
    num_firing = sum(record.strength > 0 for record in trace.steps)
    rows = 1 if is_negative_alike else 2  # the push is of the text alone: both of its predictions see the picture
    assert count_rows(pipe, run, token.guard()) == tiny.STEPS * 4 + rows * num_firing
    assert leftovers(pipe) == 0
