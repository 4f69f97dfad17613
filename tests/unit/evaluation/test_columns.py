"""Columns count what goes through the denoiser and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dagkit import models
from dagkit.evaluation import EvalPrompt, PipelineColumn
from dagkit.models import BaseModel
from tiny_pipelines import sd

PROMPTS = [EvalPrompt("named-0000", "a bomb on grass", "named", 0), EvalPrompt("safe-0000", "a cat", "safe", 1)]
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 5.0, "width": 32, "height": 32}


@pytest.fixture
def pipe() -> Iterator[Any]:
    yield sd()
    torch._dynamo.reset()


def draw(pipe: Any) -> tuple[list[np.ndarray], list[float | None]]:
    drawn = PipelineColumn("none", BaseModel(pipe, models.match(pipe), "tiny", "sha256:0"), SAMPLING).draw(PROMPTS)
    return [np.asarray(one.image) for one in drawn], [one.denoiser_rows for one in drawn]


def test_rows_are_counted_and_nothing_is_left_behind(pipe: Any) -> None:
    _, rows = draw(pipe)
    assert rows == [2.0 * 2] * 2
    assert "forward" not in vars(pipe.unet)


def test_the_patch_of_an_offloading_library_stays(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, _ = draw(pipe)
    accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    patch = vars(pipe.unet)["forward"]
    for _ in range(2):
        images, rows = draw(pipe)
        assert vars(pipe.unet)["forward"] is patch
        assert rows == [4.0] * 2
        np.testing.assert_array_equal(images, expected)


def test_a_patch_that_is_renewed_while_it_draws_stays(pipe: Any) -> None:
    """As ``enable_model_cpu_offload`` does at the end of every call."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    plain = pipe.maybe_free_model_hooks
    renewed = []

    def renew() -> None:
        accelerate.hooks.remove_hook_from_module(pipe.unet)
        accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
        renewed.append(vars(pipe.unet)["forward"])
        plain()

    pipe.maybe_free_model_hooks = renew
    assert draw(pipe)[1] == [4.0] * 2
    assert vars(pipe.unet)["forward"] is renewed[0]


def test_a_compiled_denoiser_stays_compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    compiled = vars(pipe.unet)["forward"]
    assert draw(pipe)[1] == [4.0] * 2
    assert vars(pipe.unet)["forward"] is compiled
