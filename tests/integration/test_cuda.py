"""On a CUDA device: the guard equals the guard on the CPU, which other tests check; optimisation and the demo run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import tiny_pipelines as tiny
from dagkit import demo
from dagkit.cli import command
from dagkit.errors import GuardError
from dagkit.models import load
from dagkit.optimization import RECIPES, Example, optimize
from dagkit.token import GuidelineToken

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def full_precision() -> None:
    """Without TF32, so that a difference of 1e-3 means something."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def draw(pipe: Any, **changes: Any) -> Tensor:
    """(2, 4, 16, 16) latents of two prompts, always from the same noise, which is drawn on the CPU."""
    latents: Tensor = pipe(tiny.PROMPTS, generator=tiny.generators(), **{**tiny.SETTINGS, **changes}).images
    return latents


def on_both(make: Callable[[], Any], **options: Any) -> tuple[Any, GuidelineToken, Tensor]:
    """A pipeline on the device, a token that fires on one of two samples, and what the CPU draws under guard."""
    pipe = make()
    token = tiny.half_firing(pipe, lambda: draw(pipe), **options)
    with token.guard().attach(pipe):
        expected = draw(pipe)
    return pipe.to("cuda"), token, expected


@pytest.mark.parametrize("form", ["drop", "subtract", "paper"])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_the_guard_equals_the_cpus(make: Callable[[], Any], form: str) -> None:
    pipe, token, expected = on_both(make, form=form)
    plain = draw(pipe)
    with token.guard(strength=0).attach(pipe):
        assert torch.equal(draw(pipe), plain)
    with token.guard(keep_maps=True).attach(pipe) as trace:
        guarded = draw(pipe)
    assert (guarded.cpu() - expected).abs().max() < 1e-3 * expected.abs().max()
    assert trace.maps[0, 0].device.type == "cpu"
    for sample in range(2):
        assert torch.equal(guarded[sample], plain[sample]) is not trace.summary(sample)["is_firing"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision(dtype: torch.dtype) -> None:
    pipe, token, _ = on_both(tiny.sd)
    pipe.to(dtype)
    plain = draw(pipe)
    with token.guard().attach(pipe) as trace:
        guarded = draw(pipe)
    assert guarded.dtype == dtype
    assert torch.isfinite(guarded).all()
    for sample in range(2):
        assert torch.equal(guarded[sample], plain[sample]) is not trace.summary(sample)["is_firing"]


def test_model_offload() -> None:
    pytest.importorskip("accelerate")
    pipe, token, expected = on_both(tiny.sd)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        with token.guard().attach(pipe):
            assert (draw(pipe).cpu() - expected).abs().max() < 1e-3 * expected.abs().max()
    pipe.remove_all_hooks()


def test_sequential_offload_is_guarded_or_refused() -> None:
    pytest.importorskip("accelerate")
    pipe, token, expected = on_both(tiny.sd)
    pipe.to("cpu")
    pipe.enable_sequential_cpu_offload()
    with pytest.raises(GuardError, match="meta device"), token.guard().attach(pipe):
        draw(pipe)
    pipe = tiny.sd()
    with token.guard().attach(pipe):
        pipe.enable_sequential_cpu_offload()
        assert (draw(pipe).cpu() - expected).abs().max() < 1e-3 * expected.abs().max()


def test_compiled_denoiser() -> None:
    pipe, token, expected = on_both(tiny.sd)
    pipe.unet = torch.compile(pipe.unet)
    with token.guard().attach(pipe):
        assert (draw(pipe).cpu() - expected).abs().max() < 1e-2 * expected.abs().max()
    torch._dynamo.reset()


def scene_examples(count: int, seed: int) -> list[Example]:
    """Rendered scenes, by turns with and without a weapon."""
    import numpy as np
    from PIL import Image

    from dagkit.demo import world

    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        names = ["bomb", "cat"] if i % 2 == 0 else ["apple", "dog"]
        scene = world.render_scene(rng, names)
        text = world.caption(scene.classes, scene.background, rng)
        examples.append(Example(Image.fromarray(scene.image), scene.mask("bomb"), text, is_unsafe=i % 2 == 0))
    return examples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_is_optimised_and_guards(dtype: torch.dtype) -> None:
    base = load(demo.model_path(), device="cuda", dtype=dtype)
    result = optimize(base, scene_examples(16, 1), recipe=RECIPES["default"], validation=scene_examples(16, 2))
    assert result.metrics["validation_iou"] > 0.6
    assert result.guideline.device.type == "cpu"
    token = result.token(base, concept="bomb", version="1.0.0", safety_prompt="a bomb", model_id="demo")
    with token.guard().attach(base.pipe) as trace:
        base.pipe(["a cat and a bomb on grass", "a cat on grass"], num_inference_steps=10, guidance_scale=5.0)
    assert [trace.summary(sample)["is_firing"] for sample in range(2)] == [True, False]


def test_the_demo_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["demo", "--quick", "--device", "cuda", "--workspace", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    figures = json.loads(next((tmp_path / "demo" / "reports").rglob("figures.json")).read_text())
    assert figures
