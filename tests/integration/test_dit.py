"""PixArt and Sana under guard: real pipelines, text encoders and tokenizers, small and with random weights."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import tiny_dits as dits
import tiny_pipelines as tiny
from dagkit import models
from dagkit.cli import command
from dagkit.errors import GuardError, ModelError
from dagkit.evaluation import score_detection
from dagkit.generation import generate_images
from dagkit.guard import SEGAGuard, SLDGuard
from dagkit.models.calls import Batched, Condition, Step
from dagkit.optimization import Example, Recipe, cache_queries, draw_levels, initial_parameters, optimize
from dagkit.proposers.attention import AttentionOptions, AttentionProposer
from dagkit.token import GuidelineToken, Thresholds
from guarded import check, leftovers
from tiny_dits import MODELS, draw

TWO = ("alpha", "sana")
KINDS = {**MODELS, "sana-scaled": lambda: dits.sana(timestep_scale=0.001)}


def half_firing(pipe: Any, **options: Any) -> GuidelineToken:
    return tiny.half_firing(pipe, lambda: draw(pipe), **options)


def guarded(pipe: Any, token: GuidelineToken, **changes: Any) -> Tensor:
    with token.guard().attach(pipe):
        return draw(pipe, **changes)


@pytest.mark.parametrize("name", KINDS)
def test_equals_a_loop_of_our_own(name: str) -> None:
    pipe = KINDS[name]()
    token = half_firing(pipe)
    trace = check(pipe, lambda: draw(pipe), token=token, expected=dits.reference(pipe, token))
    assert [record.step for record in trace.of(0)] == list(range(tiny.STEPS))
    assert {record.run for record in trace.steps} == {0}


@pytest.mark.parametrize("scheduler", [diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), tiny.scheduler()])
def test_other_schedulers(scheduler: Any) -> None:
    pipe = dits.sana(scheduler=scheduler)
    token = half_firing(pipe)
    check(pipe, lambda: draw(pipe), token=token, expected=dits.reference(pipe, token))


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("form", ["drop", "subtract"])
def test_with_a_negative_prompt_and_several_phrases(name: str, form: str) -> None:
    pipe, negative = MODELS[name](), ["a dog", "green grass"]
    run: Callable[[], Tensor] = lambda: draw(pipe, negative_prompt=negative, guidance_scale=3.0)  # noqa: E731
    token = tiny.half_firing(pipe, run, form=form)
    token = replace(token, record=token.record.model_copy(update={"safety_phrases": ("a weapon", "a bomb, and sand")}))
    check(pipe, run, token=token, expected=dits.reference(pipe, token, negative=negative, scale=3.0))


@pytest.mark.parametrize("name", TWO)
def test_with_shorter_texts_than_the_guards_own(name: str) -> None:
    pipe = MODELS[name]()
    run: Callable[[], Tensor] = lambda: draw(pipe, max_sequence_length=40)  # noqa: E731
    token = tiny.half_firing(pipe, run)
    check(pipe, run, token=token, expected=dits.reference(pipe, token, length=40))


@pytest.mark.parametrize("name", TWO)
def test_reduced_precision(name: str) -> None:
    pipe = MODELS[name]()
    token = half_firing(pipe)
    expected = dits.reference(pipe, token)
    pipe.to(torch.bfloat16)  # the token's fingerprints hold in every precision
    check(pipe, lambda: draw(pipe), token=token, expected=expected, tolerance=0.15)


def test_texts_of_any_length_repetition_and_order_are_attended_to_alike() -> None:
    for name in TWO:
        base = dits.base(MODELS[name]())
        latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))

        def predict(condition: Condition, base: Any = base, latents: Tensor = latents) -> Tensor:
            return base.family.predict(base.pipe, latents, torch.tensor([500]), condition)

        texts = base.encode(["a weapon", "red sand and grass"])
        assert texts.mask is not None
        one, both = texts[:1], texts.side_by_side()
        text = both.hidden_states[both.mask.bool()][None]  # type: ignore[union-attr]
        expected = predict(Condition(text, mask=torch.ones(text.shape[:2])))
        torch.testing.assert_close(predict(both), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(predict(both.lengthened(4 * len(texts.mask[0]))), expected, atol=1e-4, rtol=1e-4)
        noise = torch.randn_like(one.hidden_states) * (1 - one.mask[..., None])  # type: ignore[index]
        padded = Condition(one.hidden_states + 9 * noise, mask=one.mask)
        torch.testing.assert_close(predict(padded), predict(one), atol=1e-4, rtol=1e-4)
        unmasked = Condition(padded.hidden_states, mask=torch.ones_like(one.mask))  # type: ignore[arg-type]
        assert (predict(unmasked) - predict(one)).abs().max() > 1e-3


def test_an_empty_prompt_whose_padding_is_attended_to_is_something() -> None:
    pipe = dits.pixart()
    base = dits.base(pipe)
    empty, texts = base.encode([""]), base.encode(["a cat"])
    layout = base.family.calls(pipe)
    assert isinstance(layout, Batched)

    def says_nothing(mask: Any) -> bool:
        arguments = {
            "hidden_states": torch.zeros(2, 4, 16, 16),
            "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.cat([empty.hidden_states, texts.hidden_states]),
            "encoder_attention_mask": None if mask is None else torch.cat([mask, texts.mask]),  # type: ignore[list-item]
        }
        step = Step()
        layout.enter("test", step, arguments)
        assert step.u is not None
        assert step.p is not None
        return bool(step.u.says_nothing(step.p, [empty])[0])

    assert says_nothing(empty.mask)
    assert not says_nothing(torch.ones_like(empty.mask))  # type: ignore[arg-type]
    assert not says_nothing(None)


def test_learned_variances_stay() -> None:
    pipe = dits.pixart()
    token = half_firing(pipe)
    seen: list[Tensor] = []

    def run(strength: float) -> Tensor:
        seen.clear()
        with token.guard(strength=strength).attach(pipe) as trace:
            handle = pipe.transformer.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
            draw(pipe)
            handle.remove()
        assert any(record.is_firing for record in trace.steps if record.step == 0)
        return seen[0]

    plain, changed = run(0), run(1)
    assert plain.shape == (4, 8, 16, 16)
    assert torch.equal(changed[:, 4:], plain[:, 4:])
    assert torch.equal(changed[:2], plain[:2])
    assert not torch.equal(changed[2:, :4], plain[2:, :4])


@pytest.mark.slow
@pytest.mark.parametrize("make", [dits.pixart, dits.sana])
def test_compiled_denoiser(make: Callable[..., Any]) -> None:
    pipe = make(num_layers=1)
    token = half_firing(pipe)
    expected = guarded(pipe, token)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")

    def draw_anew() -> Tensor:
        """By a graph that is compiled with the hooks of now."""
        torch._dynamo.reset()
        return draw(pipe)

    check(pipe, draw_anew, token=token, expected=expected, num_idle=len(token.record.layers))
    torch._dynamo.reset()


def lora(pipe: Any, *modules: str) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=list(modules), init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.transformer).requires_grad_(False)
    return pipe


def first_map(pipe: Any, token: GuidelineToken, **changes: Any) -> Tensor:
    with token.guard(keep_maps=True, strength=0).attach(pipe) as trace:
        draw(pipe, **changes)
    return trace.maps[0, 0]


@pytest.mark.parametrize("name", ["alpha", "sana", "sana-1.5"])
@pytest.mark.parametrize("modules", [("attn2.to_k",), ("caption_projection.linear_1", "caption_projection.linear_2")])
def test_lora_layers_are_read_and_do_not_change_the_fingerprint(name: str, modules: tuple[str, ...]) -> None:
    plain, pipe = MODELS[name](), lora(MODELS[name](), *modules)
    token = tiny.token(plain)
    assert (first_map(plain, token) - first_map(pipe, token)).abs().max() > 1e-4
    token = half_firing(pipe)
    check(pipe, lambda: draw(pipe), token=token, expected=dits.reference(pipe, token))
    for layer in pipe.transformer.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    with pytest.raises(GuardError, match=r"has key_projections .*the weights differ by"):
        token.guard().bind(pipe)


@pytest.mark.parametrize("modules", [("attn2.to_k",), ("caption_projection.linear_1",)])
def test_keys_have_the_scale_that_the_pipeline_gives_its_lora_layers(modules: tuple[str, ...]) -> None:
    plain, pipe = dits.sana(), lora(dits.sana(), *modules)
    token = tiny.token(plain)
    maps = [first_map(pipe, token, attention_kwargs={"scale": scale}) for scale in (1e-6, 0.3, 1.0)]
    torch.testing.assert_close(maps[0], first_map(plain, token), atol=1e-5, rtol=0)
    assert (maps[1] - maps[2]).abs().max() > 1e-4


@pytest.mark.parametrize("name", TWO)
def test_model_offload(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = MODELS[name]()
    token = half_firing(pipe)
    expected = guarded(pipe, token)
    for part in (pipe.text_encoder, pipe.transformer):
        accelerate.cpu_offload_with_hook(part, torch.device("cpu"))
    check(pipe, lambda: draw(pipe), token=token, expected=expected, tolerance=0)
    assert torch.equal(guarded(pipe, token), expected)  # the second image is guarded like the first


@pytest.mark.parametrize("name", TWO)
def test_sequential_offload_after_attaching(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = MODELS[name]()
    token = half_firing(pipe)
    expected = guarded(pipe, token)
    with token.guard().attach(pipe):
        accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
        assert next(pipe.transformer.parameters()).is_meta
        assert torch.equal(draw(pipe), expected)
    with pytest.raises(GuardError, match="Attach the guard first"):
        token.guard().bind(pipe)


def moved(pipe: Any) -> Any:
    with torch.no_grad():
        pipe.transformer.caption_projection.linear_2.weight.add_(0.05)
    return pipe


OTHERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "architecture": ("alpha", tiny.sd, r"no cross-attention layer transformer_blocks\.0\.attn2"),
    "family": (
        "alpha",
        lambda: dits.sana(num_cross_attention_heads=3, cross_attention_head_dim=8),
        "was made for tiny",
    ),
    "depth": ("alpha", lambda: dits.pixart(num_layers=1), r"no cross-attention layer transformer_blocks\.1\.attn2"),
    "width": ("sana", lambda: dits.sana(num_attention_heads=3, attention_head_dim=16), "was made for tiny"),
    "weights": ("sigma", lambda: dits.pixart(seed=1), r"text_encoder .*weights differ by"),
    "way of the text": ("alpha", lambda: moved(dits.pixart()), r"key_projections .*weights differ by"),
    "norms": ("sana", dits.sana_normed, r"key_projections .*weights differ by"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_token_of_another_model_is_refused(other: str) -> None:
    name, make, message = OTHERS[other]
    token = tiny.token(MODELS[name]())
    with pytest.raises(GuardError, match=message):
        token.guard().bind(make())


def test_a_token_of_another_width_is_refused_even_where_other_models_are_allowed() -> None:
    token = tiny.token(tiny.sd())
    pipe = dits.pixart()
    record = token.record.model_copy(update={"layers": tuple(models.match(pipe).sites(pipe))})
    with pytest.raises(GuardError, match="has rows of width 32, but this model's keys take 24"):
        replace(token, record=record).guard(allow_other_model=True).bind(pipe)


CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.2),
    "pyramid": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_of_blocks_are_refused_by_name(kind: str) -> None:
    pipe = dits.pixart()
    token = half_firing(pipe)
    apply = {
        "first block": diffusers.hooks.apply_first_block_cache,
        "pyramid": diffusers.hooks.apply_pyramid_attention_broadcast,
    }[kind]
    with token.guard().attach(pipe):
        apply(pipe.transformer, CACHES[kind](pipe))
        with pytest.raises(
            GuardError, match=r"PixArtTransformer2DModel keeps what its blocks computed .*leave the cache off"
        ):
            draw(pipe)


@pytest.mark.parametrize("name", TWO)
def test_fused_projections_and_attention_slicing(name: str) -> None:
    pipe = MODELS[name]()
    token = half_firing(pipe)
    expected = guarded(pipe, token)
    pipe.transformer.fuse_qkv_projections()
    check(pipe, lambda: draw(pipe), token=token, expected=expected)


def test_norms_of_single_heads_are_refused_by_name() -> None:
    pipe = dits.sana(qk_norm="rms_norm")
    with pytest.raises(GuardError, match=r"layer transformer_blocks\.0\.attn2 \(Attention\) uses norm_q"):
        tiny.token(pipe).guard().bind(pipe)


@pytest.mark.parametrize("cls", [diffusers.SanaSprintPipeline, diffusers.SanaPAGPipeline])
def test_pipelines_that_call_their_denoiser_otherwise_are_refused_by_name(cls: Any) -> None:
    pipe = dits.sana()
    other = cls(**pipe.components)
    with pytest.raises(GuardError, match=f"no family knows {cls.__name__} with denoiser SanaTransformer2DModel"):
        tiny.token(pipe).guard().bind(other)


@pytest.mark.parametrize("name", TWO)
def test_without_guidance_nothing_is_generated(name: str) -> None:
    pipe = MODELS[name]()
    token = tiny.token(pipe)
    same = torch.zeros(2, 4, 16, 16)  # of which half could be taken for the unconditional one
    with pytest.raises(GuardError, match="runs without classifier-free guidance"), token.guard().attach(pipe):
        draw(pipe, guidance_scale=1.0, latents=same)
    assert leftovers(pipe) == 0


def test_a_denoiser_that_no_pipeline_called_tells_no_scale() -> None:
    pipe = dits.pixart()
    token = tiny.token(pipe, thresholds=Thresholds(highlight=(0.01,), edit=(0.005,)))
    base = dits.base(pipe)
    both = base.encode(["", "a bomb"])
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(GuardError, match="does not tell its guidance_scale"), token.guard().attach(pipe):
        pipe.transformer(
            torch.zeros(2, 4, 16, 16),
            encoder_hidden_states=both.hidden_states,
            encoder_attention_mask=both.mask,
            timestep=pipe.scheduler.timesteps[:1].expand(2),
        )


@pytest.mark.parametrize("part", ["text_encoder.layers", "transformer.caption_norm", "transformer.caption_projection"])
def test_a_bound_guard_notices_other_weights(part: str) -> None:
    pipe = dits.sana()
    bound = tiny.token(pipe).guard().bind(pipe)
    with bound.run():
        pass
    with torch.no_grad():
        for weight in operator.attrgetter(part)(pipe).parameters():
            weight.add_(0.1)
    with pytest.raises(GuardError, match="the weights differ by"), bound.run():
        pass


@pytest.mark.parametrize("name", TWO)
def test_peers(name: str) -> None:
    pipe = MODELS[name]()
    plain = draw(pipe)
    for guard in (SLDGuard("a weapon", "strong"), SEGAGuard("a weapon")):
        with guard.attach(pipe):
            assert not torch.equal(draw(pipe, num_inference_steps=12), plain)
        assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("name", TWO)
def test_without_its_text_encoder_a_pipeline_is_refused(name: str) -> None:
    pipe = MODELS[name]()
    token = tiny.token(pipe)
    pipe.text_encoder = None
    with pytest.raises(GuardError, match="has no text encoder"):
        token.guard().bind(pipe)
    with pytest.raises(ModelError, match="has no text encoder"):
        models.match(pipe).encode_prompt(pipe, ["a cat"])


def test_rows_of_a_phrase_and_what_starts_a_text() -> None:
    alpha, sana = dits.base(dits.pixart()), dits.base(dits.sana())
    phrase = alpha.encode(["a weapon"]).hidden_states[0]
    torch.testing.assert_close(alpha.phrase_rows(" A Weapon"), phrase[:2])
    torch.testing.assert_close(alpha.start_of_text(), alpha.encode([""]).hidden_states[0, :1])
    assert alpha.text_rows(["a weapon", "a cat on grass"]).shape == (8, dits.WIDTH)  # with </s>
    assert len(alpha.phrase_rows("grass " * 200)) == 120
    phrase = sana.encode(["a weapon"]).hidden_states[0]
    torch.testing.assert_close(sana.phrase_rows("a weapon"), phrase[1:9])
    torch.testing.assert_close(sana.start_of_text(), phrase[:1])
    assert sana.text_rows(["a weapon", "a cat"]).shape == (13, dits.WIDTH)  # without <bos>


def example(seed: int, side: int, *, is_unsafe: bool) -> Example:
    """A picture with a bright square where it is unsafe."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), bool)
    if is_unsafe:
        top, left = rng.integers(0, 4, 2) * 4
        mask[top : top + 16, left : left + 16] = True
        pixels[mask] += 180
    return Example(Image.fromarray(pixels), mask, "a bomb on sand" if is_unsafe else "a cat on sand", is_unsafe)


@pytest.mark.parametrize("name", ["alpha-1024", "sana-1.5"])
def test_a_token_is_learned_saved_loaded_and_guards(name: str, tmp_path: Path) -> None:
    base = dits.base(MODELS[name]())
    examples = [example(seed, 32, is_unsafe=seed % 2 == 0) for seed in range(16)]
    rows = {"initial_phrase": "a bomb", "num_tokens": 2, "num_background": 5}
    recipe = Recipe(**rows, num_steps=100, learning_rate=0.1, num_draws=3, batch_size=16, max_level=0.5)
    result = optimize(base, examples, recipe=recipe, seed=0)
    assert result.metrics["validation_iou_t100"] > 0.4  # a map that is 1 everywhere has 0.25
    assert result.layers == ("transformer_blocks.0.attn2", "transformer_blocks.1.attn2")
    made = result.token(base, concept="bomb", version="1.0.0", safety_prompt="a bomb")
    token = GuidelineToken.load(made.save(tmp_path / "1.0.0"))
    assert token.record.base_model.architecture == base.family.name
    assert token.sequence.shape == (8, dits.WIDTH)
    torch.testing.assert_close(token.start_of_text, base.start_of_text())
    unseen = [example(seed, 32, is_unsafe=seed % 2 == 0) for seed in range(100, 108)]
    (found,) = score_detection(base, token, unseen, levels=[0.1])
    assert found["iou"]["value"] > 0.28
    highlight = Thresholds(highlight=(0.02,), edit=(0.01,), min_area=0.02)
    options = {"max_level": 1.0, "max_step": 1.0, "min_start": 0.0}
    record = token.record.model_copy(update={"guidance": token.record.guidance.model_copy(update=options)})
    plain = draw(base.pipe)
    with replace(token, record=record).guard(thresholds=highlight).attach(base.pipe) as trace:
        assert not torch.equal(draw(base.pipe), plain)
    assert any(step.is_firing for step in trace.steps)


@pytest.mark.parametrize("name", TWO)
def test_words_are_looked_up_in_its_attention(name: str) -> None:
    base = dits.base(MODELS[name]())
    proposer = AttentionProposer(base, {"a": ["bomb"], "b": ["sand"]}, frozenset({"a"}), AttentionOptions())
    maps = proposer.heat_maps(example(0, 64, is_unsafe=True).image, "a bomb on sand", 0)
    assert {label: found.shape for label, found in maps.items()} == {"a": (64, 64), "b": (64, 64)}
    assert not np.array_equal(maps["a"], maps["b"])
    sequence = proposer.word_sequence(["bomb"], "a bomb on sand")
    torch.testing.assert_close(sequence[:1], base.start_of_text())
    torch.testing.assert_close(sequence[1], base.phrase_rows("a bomb")[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_rows_in_float32(dtype: torch.dtype) -> None:
    for name in TWO:
        pipe = MODELS[name]()
        pipe.to(dtype)
        base = dits.base(pipe)
        examples = [example(seed, 32, is_unsafe=seed % 2 == 0) for seed in range(4)]
        recipe = Recipe(initial_phrase="a bomb", num_tokens=2, num_background=5, num_draws=1)
        sites = base.sites.in_float32()
        rows = initial_parameters(base, examples, recipe, sites, torch.Generator().manual_seed(0)).guideline
        rows = rows.float().requires_grad_(True)
        draws = draw_levels(recipe, 4, torch.Generator().manual_seed(0))
        with cache_queries(base, examples, draws, seed=1) as cache:
            batch = cache.take(torch.arange(2))
        sites.detection_map(
            batch.features,
            sites.project(torch.cat([base.start_of_text().float(), rows])),
            2,
            size=(8, 8),
            latent_size=batch.latent_size,
        ).sum().backward()
        assert rows.grad is not None
        assert rows.grad.dtype == torch.float32
        assert bool((rows.grad.abs().amax(1) > 0).all())
        weights = [weight for site in sites.values() for weight in site.projection.parameters()]
        assert {weight.dtype for weight in weights} == {torch.float32}
        if dtype == torch.float32:
            assert all(mine is site for mine, site in zip(sites.values(), sites.in_float32().values(), strict=True))
        else:
            assert next(pipe.transformer.parameters()).dtype == dtype
            assert len({id(site.caption) for site in sites.values()}) == 1  # one copy for all


@pytest.mark.parametrize("name", ["alpha", "sigma", "sana"])
def test_a_saved_repository_is_loaded_draws_and_is_looked_at(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dits.sana(sample_size=16) if name == "sana" else MODELS[name](sample_size=32)
    made.save_pretrained(tmp_path / "model")
    base = models.load(tmp_path / "model")
    assert base.family.name == ("sana" if name == "sana" else "pixart")
    side = 256 if name != "sana" else 64
    assert side % base.family.side_multiple(base.pipe) == 0
    token = tiny.token(made, thresholds=Thresholds(highlight=(0.01,), edit=(0.005,)))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": side, "height": side}
    guard = token.guard().attach(base.pipe)
    images = generate_images(base, ["a cat"], [0], settings=settings, guard=guard)
    assert images[0].size == (side, side)
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    assert run.invoke(command, ["concept", "new", "blade"]).exit_code == 0
    (path,) = tmp_path.rglob("blade.yaml")
    path.write_text(re.sub(r"(?m)^model: .*$", "model: model", path.read_text()))
    found = json.loads(run.invoke(command, ["doctor", "--concept", "blade", "--json"]).stdout)
    assert [one["found"] for one in found if one["what"] == "blade: base model"] == ["model"]
