"""Guarded runs of the tiny pipelines, and all that must hold for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import tiny_pipelines as tiny
from dagkit import models
from dagkit.guard import Trace
from dagkit.token import GuidelineToken

IMAGE = Image.radial_gradient("L").resize((32, 32)).convert("RGB")


def draw(pipe: Any, **changes: Any) -> Tensor:
    """(2, 4, 16, 16) latents of two prompts, always from the same noise."""
    latents: Tensor = pipe(tiny.PROMPTS, generator=tiny.generators(), **{**tiny.SETTINGS, **changes}).images
    return latents


def leftovers(pipe: Any) -> int:
    """Hooks on the denoiser and all below it, and methods put on its parts or on the scheduler."""
    denoiser = models.match(pipe).denoiser(pipe)
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in denoiser.modules())
    patches = sum("forward" in vars(part) for part in denoiser.modules() if part is not denoiser)
    return hooks + patches + ("step" in vars(pipe.scheduler))


def check(
    pipe: Any,
    run: Callable[[], Tensor],
    *,
    token: GuidelineToken | None = None,
    expected: Tensor | None = None,
    tolerance: float = 1e-4,
    guard: dict[str, Any] | None = None,
    num_idle: int = 0,
    **options: Any,
) -> Trace:
    """All that must hold for a pipeline, with one firing and one silent sample.

    Args:
        token: one of ``half_firing`` with ``options`` where not given.
        expected: guided latents; those of ``reference_guard`` where not given.
        guard: options of the guard, as the reference knows them.
        num_idle: hooks that stay, because a graph was compiled with them.
    """
    token = token or tiny.half_firing(pipe, run, **options)
    plain, before = run(), leftovers(pipe)
    with token.guard(strength=0).attach(pipe):
        assert torch.equal(run(), plain)
    with token.guard(**(guard or {})).attach(pipe) as trace:
        guarded = run()
    assert guarded.dtype == plain.dtype
    if expected is None:
        with tiny.reference_guard(pipe, token, **(guard or {})):
            expected = run()
    firing = [trace.summary(sample)["is_firing"] for sample in range(2)]
    assert sorted(firing) == [False, True]
    acted, silent = firing.index(True), firing.index(False)
    assert torch.equal(guarded[silent], plain[silent])
    assert (guarded[acted] - plain[acted]).abs().max() > 1e-3
    assert (guarded - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    assert leftovers(pipe) == before + num_idle
    assert torch.equal(run(), plain)
    return trace


def redraw(pipe: Any, **changes: Any) -> Tensor:
    """As ``draw``, for pipelines that take their size from an image."""
    settings = {key: value for key, value in tiny.SETTINGS.items() if key not in ("height", "width")}
    latents: Tensor = pipe(
        tiny.PROMPTS, image=[IMAGE] * 2, strength=0.8, generator=tiny.generators(), **settings, **changes
    ).images
    return latents


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
