"""Guards on models whose weights are quantised, whose text encoder got words, or whose blocks are compiled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odd_weights
import tiny_pipelines as tiny
from dagkit import demo, models
from dagkit.errors import GuardError, ModelError
from dagkit.models.quantised import check_plain, compute_dtype, weights_of
from dagkit.models.sketch import Sketch, _decode, difference, mismatch, sketch, tolerance
from guarded import check, draw, leftovers

FAMILIES: dict[str, Callable[[], Any]] = {"sd": tiny.sd, "sdxl": tiny.sdxl}


@pytest.fixture(scope="module")
def base() -> models.BaseModel:
    """The bundled model, whose weights are trained ones."""
    return models.load(demo.model_path())


# whose weights


def verdict(base: models.BaseModel, pipe: Any) -> Any:
    own = base.family.fingerprints(base.pipe)["key_projections"]
    found = base.family.fingerprints(pipe)["key_projections"]

    class Stated:
        key_projections = own

    return mismatch(Stated, {"key_projections": found})


@pytest.mark.parametrize(
    ("kind", "smallest"),  # fine-tune that is noticed beneath the rounding
    [
        ("fp8", 0.01),
        ("torchao-int8", 0.01),
        ("torchao-float8", 0.02),
        ("gguf-Q8_0", 0.01),
        ("gguf-Q5_1", 0.02),
        ("gguf-Q4_0", 0.03),
        ("bitsandbytes-int8", 0.01),
        ("bitsandbytes-nf4", 0.04),
    ],
)
def test_a_quantised_copy_is_the_model_and_a_fine_tune_is_not(
    kind: str, smallest: float, base: models.BaseModel, tmp_path: Path
) -> None:
    store = odd_weights.KINDS[kind]
    (tmp_path / "own").mkdir()
    pipe = store(base.pipe, tmp_path / "own")
    assert verdict(base, pipe) is None
    tuned = odd_weights.fine_tuned(base.pipe, smallest)
    assert verdict(base, tuned) is not None
    other = verdict(base, store(tuned, tmp_path))
    assert other.distance > other.limit
    assert "of which rounding explains" in str(other)
    # what is known of the rounding is what it did
    sites = [(base.sites[name].projection, site.projection) for name, site in base.family.sites(pipe).items()]
    pairs = [(own, got) for plain, odd in sites for own, got in zip(weights_of(plain), weights_of(odd), strict=True)]
    moved = sum(float((own.values - got.values.float()).square().sum()) for own, got in pairs)
    stated = sum(float(got.rounding.sum()) for _, got in pairs if got.rounding is not None)
    assert stated == pytest.approx(moved, rel=0.2)


def test_a_token_of_the_version_before_has_the_same_verdict(base: models.BaseModel, tmp_path: Path) -> None:
    """64 buckets tell a quantised copy, and fine-tunes of the size of its rounding."""
    import base64

    own = base.family.fingerprints(base.pipe)["key_projections"]
    old = "sketch1:" + base64.b64encode(_decode(own).reshape(64, 64).sum(0).astype("<f4").tobytes()).decode()
    for share, is_same in ((0.0, True), (0.06, False)):
        pipe = odd_weights.fp8(odd_weights.fine_tuned(base.pipe, share), tmp_path)
        found = base.family.fingerprints(pipe)["key_projections"]
        assert (difference(old, found) <= tolerance(old, found)) is is_same


def test_weights_that_are_not_quantised_have_the_tolerance_of_a_cast() -> None:
    own = sketch([torch.randn(64, 64)])
    assert isinstance(own, Sketch)
    assert own.rounding is None
    assert tolerance(own, own) == 0.005


class Packed(nn.Module):
    """A layer whose weight nobody here knows how to read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)


def test_weights_in_an_unknown_form_are_refused() -> None:
    with pytest.raises(ModelError, match=r"weights of a Packed are stored as uint8, and how that rounds is not known"):
        list(weights_of(Packed()))


def test_a_guard_says_which_weights_it_cannot_read(base: models.BaseModel) -> None:
    pipe = tiny.sd()
    token = tiny.token(pipe)
    layer = pipe.unet.get_submodule(token.record.layers[0])
    layer.to_k.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(GuardError, match=r"cannot guard this .*stored as uint8.*allow_other_model=True"):
        token.guard().bind(pipe)


# guarding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["fp8", "torchao-int8", "gguf-Q8_0", "bitsandbytes-int8", "bitsandbytes-nf4"])
def test_a_quantised_denoiser_is_guarded(kind: str, family: str, tmp_path: Path) -> None:
    """With the token of the plain model, whose thresholds part what the quantised one draws."""
    plain = FAMILIES[family]()
    pipe = odd_weights.KINDS[kind](plain, tmp_path)
    run = lambda: draw(pipe)  # noqa: E731
    own = tiny.token(plain)
    fired = tiny.half_firing(pipe, run)
    limits = fired.record.thresholds
    token = copy.copy(own)
    object.__setattr__(token, "record", own.record.model_copy(update={"thresholds": limits}))
    check(pipe, run, token=token)
    bound = token.guard().bind(pipe)
    for _ in range(2):
        with bound.run() as trace:
            draw(pipe)
    assert trace.steps


def test_casting_after_binding_is_no_change() -> None:
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    bound = token.guard().bind(pipe)
    with bound.run() as before:
        draw(pipe)
    odd_weights.cast(pipe.unet, torch.float32)
    plain = draw(pipe)
    with bound.run() as after:
        guarded = draw(pipe)
    assert len(after.steps) == len(before.steps)
    assert not torch.equal(guarded, plain)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data.zero_()
    with pytest.raises(GuardError, match="key_projections"), bound.run():
        pass


def test_casting_inside_a_run_is_guarded() -> None:
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe) as trace:
        odd_weights.cast(pipe.unet, torch.float32)
        guarded = draw(pipe)
    assert (guarded - draw(pipe)).abs().max() > 1e-3
    assert len(trace.steps) == 2 * tiny.STEPS


def test_rows_are_projected_in_the_dtype_that_a_layer_computes_in() -> None:
    pipe = tiny.sd()
    odd_weights.cast(pipe.unet, torch.bfloat16)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert layer.to_k.weight.dtype == torch.float8_e4m3fn
    assert compute_dtype(layer.to_k, torch.float32) == torch.bfloat16
    (site, *_) = models.match(pipe).sites(pipe).values()
    assert site.project(torch.randn(3, tiny.WIDTH)).dtype == torch.bfloat16


def test_tokens_are_optimised_on_plain_weights(tmp_path: Path) -> None:
    pipe = tiny.sd()
    check_plain([pipe.text_encoder, pipe.unet])
    with pytest.raises(ModelError, match=r"weights that are quantised \(float8_e4m3fn\).*without quantisation"):
        check_plain([odd_weights.fp8(pipe, tmp_path).unet])


# words


def add_word(pipe: Any, word: str, folder: Path) -> None:
    """A textual inversion of two vectors, as it comes in a file."""
    from safetensors.torch import save_file

    vectors = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(2)) * 0.02
    save_file({word: vectors}, folder / "learned.safetensors")
    pipe.load_textual_inversion(str(folder), weight_name="learned.safetensors", token=word, local_files_only=True)
    pipe.text_encoder.requires_grad_(False)


def small_vocabulary() -> Any:
    pipe = tiny.sd()
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.text_encoder.requires_grad_(False)
    return pipe


@pytest.mark.parametrize("make", [tiny.sd, small_vocabulary])  # with and without rows behind the last word
def test_words_that_are_added_are_no_other_model(make: Callable[[], Any], tmp_path: Path) -> None:
    pipe = make()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    bound = token.guard().bind(pipe)
    prints = models.match(pipe).fingerprints(pipe)
    add_word(pipe, "<toy>", tmp_path)
    assert models.match(pipe).fingerprints(pipe) == prints
    with bound.run() as trace:  # one that was bound before
        draw(pipe)
    assert trace.steps
    prompts = ["a <toy> on grass", tiny.PROMPTS[1]]
    with token.guard().attach(pipe) as trace:  # one that is bound now
        pipe(prompts, generator=tiny.generators(), **tiny.SETTINGS)
    assert trace.steps
    pipe.text_encoder.get_input_embeddings().weight[5] += 1
    for guard in (bound.run, lambda: token.guard().attach(pipe)):
        with pytest.raises(GuardError, match="has text_encoder "), guard():
            pass


def test_an_added_word_of_the_safety_prompt_is_refused(tmp_path: Path) -> None:
    """It would be encoded with the rows of the inversion: pushed away from something else."""
    pipe = tiny.sd()
    token = tiny.token(pipe)
    assert token.record.safety_prompt == "a weapon"
    add_word(pipe, "weapon", tmp_path)
    with pytest.raises(GuardError, match=r"textual inversion .* has the word 'weapon', which stands in 'a weapon'"):
        token.guard().bind(pipe)


# compiled


@contextlib.contextmanager
def no_more_graphs() -> Iterator[None]:
    """Inside the block nothing is compiled anew."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def by_blocks(pipe: Any) -> None:
    if not hasattr(pipe.unet, "compile_repeated_blocks"):
        pytest.skip("this release of diffusers compiles no repeated blocks")
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")


def as_a_whole(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("compile_", [by_blocks, as_a_whole])
def test_compiled_before_the_guard(compile_: Callable[[Any], None]) -> None:
    torch._dynamo.reset()
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe):
        expected = draw(pipe)
    compile_(pipe)
    with token.guard().attach(pipe):
        assert (draw(pipe) - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = draw(pipe)
    with no_more_graphs():  # of neither more steps nor another guard
        with token.guard().attach(pipe):
            assert (draw(pipe) - expected).abs().max() < 1e-4 * expected.abs().max()
            draw(pipe, num_inference_steps=tiny.STEPS + 2)
        assert torch.equal(draw(pipe), plain)
    torch._dynamo.reset()


@pytest.mark.slow
def test_blocks_that_are_compiled_inside_a_run() -> None:
    torch._dynamo.reset()
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe):
        expected = draw(pipe)
        by_blocks(pipe)
        assert (draw(pipe) - expected).abs().max() < 1e-4 * expected.abs().max()
    torch._dynamo.reset()


def test_what_is_compiled_no_more_leaves_nothing() -> None:
    pipe = tiny.sd()
    with tiny.token(pipe).guard().attach(pipe):
        draw(pipe)
    assert leftovers(pipe) == 0
    assert not [name for part in pipe.unet.modules() for name in vars(part) if name.startswith("_dagkit")]


@pytest.mark.slow
def test_copies_of_a_compiled_model_are_not_mixed_up() -> None:
    """A graph leaves a mark on its layers, which a copy takes along."""
    torch._dynamo.reset()
    pipe = tiny.sd()
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    by_blocks(pipe)
    with token.guard().attach(pipe):
        expected = draw(pipe)
    other = odd_weights.with_denoiser(pipe, tiny.unet().requires_grad_(False))
    other.unet.load_state_dict(pipe.unet.state_dict())
    for own, copied in zip(pipe.unet.modules(), other.unet.modules(), strict=True):
        copied.__dict__.update({name: value for name, value in vars(own).items() if name.startswith("_dagkit")})
    with token.guard().attach(pipe), token.guard().attach(other):
        assert torch.equal(draw(pipe), expected)
        assert (draw(other) - expected).abs().max() < 1e-4 * expected.abs().max()
    torch._dynamo.reset()
