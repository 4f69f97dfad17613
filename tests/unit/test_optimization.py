import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_pipelines as tiny
from dagkit import families
from dagkit.attention import cross_attention_map, project_keys
from dagkit.errors import DatasetError, WorkspaceError
from dagkit.families import BaseModel
from dagkit.optimization import (
    KNOTS,
    RECIPES,
    Example,
    QueryCache,
    Recipe,
    background_leakage,
    cache_queries,
    calibrate,
    check_examples,
    coarse_mask,
    data_efficiency,
    draw_timesteps,
    fit,
    initial_parameters,
    iou,
    negative_attention,
    objective,
    optimize,
    pixel_cross_entropy,
    split,
)

SHORT = replace(RECIPES["default"], num_steps=12, validate_every=4, batch_size=8, num_draws=2, num_background=3)


def example(seed: int, *, is_unsafe: bool) -> Example:
    """A picture whose left or right half is bright where it is unsafe."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), bool)
    if is_unsafe:
        left = 4 + 12 * (seed % 2)
        mask[8:24, left : left + 12] = True
        pixels[mask] += 160
    return Example(Image.fromarray(pixels), mask, "a bomb on sand" if is_unsafe else "a cat on sand", is_unsafe)


def data(count: int, start: int = 0) -> list[Example]:
    return [example(start + i, is_unsafe=i % 2 == 0) for i in range(count)]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    pipe = tiny.sd()
    return BaseModel(pipe, families.match(pipe), "tiny", "sha256:0")


@pytest.fixture(scope="module")
def cache(base: BaseModel) -> Iterator[QueryCache]:
    draws = draw_timesteps(SHORT, 8, torch.Generator().manual_seed(0))
    with cache_queries(base, data(8), draws, seed=1) as cache:
        yield cache


def test_pixel_cross_entropy_by_hand() -> None:
    cam, mask = torch.tensor([[[0.8, 0.2]]]), torch.tensor([[[1.0, 0.0]]])
    assert pixel_cross_entropy(cam, mask).item() == pytest.approx(-math.log(0.8))
    weighted = (3 * -math.log(0.8) - math.log(0.8)) / 2
    assert pixel_cross_entropy(cam, mask, 3).item() == pytest.approx(weighted)


def test_leakage_is_the_mean_outside_the_mask() -> None:
    cam, mask = torch.tensor([[[0.9, 0.3, 0.1]]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    assert background_leakage(cam, mask).item() == pytest.approx(0.2)
    assert background_leakage(cam, torch.ones(1, 1, 3)).item() == 0


def test_attention_on_a_safe_image_costs() -> None:
    assert negative_attention(torch.tensor([[[0.5, 0.0]]])).item() == pytest.approx(math.log(2) / 2, abs=1e-4)


@pytest.mark.parametrize("weight", ["pixel_weight", "leakage_weight", "negative_weight"])
def test_each_loss_has_a_weight_and_the_right_gradient(weight: str) -> None:
    zero = {"pixel_weight": 0.0, "leakage_weight": 0.0, "negative_weight": 0.0}
    recipe = replace(RECIPES["default"], positive_weight=1.0, **{**zero, weight: 2.0})
    cam = torch.full((2, 1, 2), 0.4, requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    objective(cam, mask, torch.tensor([True, False]), recipe).backward()
    gradient: Tensor = cam.grad
    inside, outside, safe = gradient[0, 0, 0].item(), gradient[0, 0, 1].item(), gradient[1, 0, 0].item()
    # d/dp -log p = -1/p and d/dp -log(1-p) = 1/(1-p), means over 2 pixels, weight 2; leakage is linear
    expected = {
        "pixel_weight": (-1 / 0.4, 1 / 0.6, 0),
        "leakage_weight": (0, 2, 0),
        "negative_weight": (0, 0, 1 / 0.6),
    }[weight]
    assert (inside, outside, safe) == pytest.approx(expected)


def test_a_mask_is_coarsened_to_the_share_that_it_covers() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, :3] = True
    coarse = coarse_mask(Example(Image.new("RGB", (4, 4)), mask, "", True), (2, 2))
    assert coarse.tolist() == [[0.5, 0.25], [0.0, 0.0]]
    assert coarse_mask(Example(Image.new("RGB", (4, 4)), mask, "", False), (2, 2)).sum() == 0


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([example(0, is_unsafe=True)], "hold no safe image; at least 1 is needed, 8 are better"),
        ([example(1, is_unsafe=False)], "hold no unsafe image"),
        ([], "0 examples hold no unsafe image"),
        (
            [replace(example(0, is_unsafe=True), mask=np.ones((3, 3), bool)), example(1, is_unsafe=False)],
            r"mask is \(3, 3\)",
        ),
        (
            [replace(example(0, is_unsafe=True), mask=np.zeros((32, 32), bool)), example(1, is_unsafe=False)],
            "its mask is empty",
        ),
        ([replace(example(1, is_unsafe=False), image=Image.new("RGB", (8, 8))), *data(2)], "images must have one size"),
    ],
)
def test_data_from_which_nothing_can_be_learned(examples: list[Example], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        check_examples(examples)


def test_every_fourth_of_each_kind_is_kept_apart() -> None:
    examples = data(16)
    training, validation = split(examples)
    assert [sum(e.is_unsafe for e in part) for part in (training, validation)] == [6, 2]
    assert [len(part) for part in (training, validation)] == [12, 4]
    assert not {id(e) for e in training} & {id(e) for e in validation}
    few = data(4)
    training, validation = split(few)
    assert len(training) == len(validation) == 4


def test_draws_cover_the_whole_range() -> None:
    draws = draw_timesteps(Recipe(num_draws=4, min_timestep=0, max_timestep=1000), 50, torch.Generator().manual_seed(0))
    assert draws.shape == (4, 50)
    for number, part in enumerate(draws):
        assert 250 * number <= part.min()
        assert part.max() < 250 * (number + 1)


def test_the_cache_holds_what_one_forward_gives(base: BaseModel, cache: QueryCache) -> None:
    assert len(cache) == 16
    assert cache.images.tolist() == [*range(8), *range(8)]
    examples = data(8)
    again = base.queries(
        base.latents([e.image for e in examples]),
        cache.timesteps[8:],
        base.encode([e.prompt for e in examples]),
        seed=1 + 8,
    )
    batch = cache.take(torch.arange(8, 16))
    for name, value in again.items():
        torch.testing.assert_close(batch.queries[name], value, atol=1e-5, rtol=1e-5)
    assert torch.equal(batch.is_unsafe, torch.tensor([True, False] * 4))
    assert batch.masks[1].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_on_disk_holds_the_same(base: BaseModel, dtype: torch.dtype) -> None:
    draws = draw_timesteps(SHORT, 4, torch.Generator().manual_seed(0))
    index = torch.tensor([7, 0, 3])
    taken = []
    for budget in (1 << 30, 1000):
        with cache_queries(base, data(4), draws, seed=1, dtype=dtype, memory_bytes=budget, batch_size=3) as cache:
            assert cache.is_on_disk is (budget == 1000)
            taken.append(cache.take(index))
    for name, value in taken[0].queries.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, taken[1].queries[name])


def test_a_full_disk_is_named(base: BaseModel, full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(full_disk))
    draws = torch.zeros((40, 8), dtype=torch.int64)
    with pytest.raises(WorkspaceError, match=r"MiB of queries cannot be written: .*No space left.*set TMPDIR"):  # noqa: SIM117
        with cache_queries(base, data(8), draws, seed=1, memory_bytes=1):
            pass
    assert list(full_disk.iterdir()) == []


def test_the_optimisation_never_calls_the_denoiser(base: BaseModel, cache: QueryCache) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the denoiser was called")

    handle = base.pipe.unet.register_forward_pre_hook(refuse)
    try:
        start = initial_parameters(base, data(8), SHORT, base.layers, torch.Generator().manual_seed(0))
        found, history = fit(base.layers, cache, start, SHORT, torch.Generator().manual_seed(0))
    finally:
        handle.remove()
    assert found.guideline.shape == (4, tiny.WIDTH)
    assert history[-1]["step"] == 12


@pytest.mark.parametrize(
    "recipe",
    [
        SHORT,
        replace(SHORT, num_tokens=1, num_background=0, learn_head_weights=False),
        replace(RECIPES["paper"], num_steps=6, num_draws=2, learning_rate=1.0),
    ],
    ids=["default", "one token", "paper"],
)
def test_the_loss_falls(base: BaseModel, cache: QueryCache, recipe: Recipe) -> None:
    start = initial_parameters(base, data(8), replace(recipe, initial_phrase="a bomb"), base.layers, torch.Generator())
    batch = cache.take(torch.arange(len(cache)))

    def loss(parameters: Any) -> float:
        return float(objective(parameters.cam(base.layers, batch), batch.masks, batch.is_unsafe, recipe))

    before = loss(start)
    found, _ = fit(base.layers, cache, start, replace(recipe, num_steps=40, batch_size=0), torch.Generator())
    assert loss(found) < 0.97 * before


def test_starting_values(base: BaseModel) -> None:
    recipe = replace(SHORT, num_tokens=1, initial_phrase="a bomb")
    start = initial_parameters(base, data(4), recipe, base.layers, torch.Generator())
    encoded = base.encode(["a bomb"]).hidden_states[0]
    torch.testing.assert_close(start.guideline[0], encoded[2])
    torch.testing.assert_close(start.start_of_text[0], encoded[0])
    assert start.background is not None
    assert len(start.background.unique(dim=0)) == 3
    again = initial_parameters(base, data(4), replace(recipe, initial_phrase=""), base.layers, torch.Generator())
    assert not torch.equal(again.guideline, start.guideline)


def test_the_same_seed_gives_the_same_token(base: BaseModel) -> None:
    first, second = (optimize(base, data(8), recipe=SHORT, seed=3) for _ in range(2))
    assert torch.equal(first.guideline, second.guideline)
    assert first.thresholds == second.thresholds
    assert not torch.equal(first.guideline, optimize(base, data(8), recipe=SHORT, seed=4).guideline)


def test_a_killed_optimisation_goes_on_with_the_same_result(base: BaseModel, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"

    class Killed(Exception):
        pass

    def kill(state: dict[str, Any]) -> None:
        if state["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        optimize(base, data(8), recipe=SHORT, seed=3, checkpoint=checkpoint, progress=kill)
    steps: list[int] = []
    resumed = optimize(
        base, data(8), recipe=SHORT, seed=3, checkpoint=checkpoint, progress=lambda s: steps.append(s["step"])
    )
    undisturbed = optimize(base, data(8), recipe=SHORT, seed=3)
    assert steps == [8, 12]  # the report at 4 was kept
    assert torch.equal(resumed.guideline, undisturbed.guideline)
    assert torch.equal(resumed.head_weights, undisturbed.head_weights)
    assert resumed.history == undisturbed.history


def test_a_checkpoint_of_another_recipe_is_refused(base: BaseModel, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    optimize(base, data(8), recipe=SHORT, checkpoint=checkpoint)
    with pytest.raises(WorkspaceError, match=r"made with another learning_rate. Delete it to start anew"):
        optimize(base, data(8), recipe=replace(SHORT, learning_rate=1.0), checkpoint=checkpoint)
    checkpoint.write_bytes(b"garbage")
    with pytest.raises(WorkspaceError, match="not a checkpoint of an optimisation"):
        optimize(base, data(8), recipe=SHORT, checkpoint=checkpoint)


def test_it_stops_early_and_keeps_the_best_rows(base: BaseModel, cache: QueryCache) -> None:
    losses = iter([0.5, 0.3, 0.4, 0.45, 0.2])
    seen: list[Tensor] = []

    def validate(parameters: Any) -> dict[str, float]:
        seen.append(parameters.guideline.detach().clone())
        return {"validation_loss": next(losses)}

    recipe = replace(SHORT, num_steps=100, patience=1)
    start = initial_parameters(base, data(8), recipe, base.layers, torch.Generator())
    found, history = fit(base.layers, cache, start, recipe, torch.Generator(), validate=validate)
    assert [entry["validation_loss"] for entry in history] == [0.5, 0.3, 0.4, 0.45]
    assert torch.equal(found.guideline, seen[1])


def test_progress_tells_step_loss_and_validation(base: BaseModel) -> None:
    reports: list[dict[str, Any]] = []
    result = optimize(base, data(8), recipe=SHORT, progress=reports.append)
    assert [report["step"] for report in reports] == [4, 8, 12]
    assert all({"num_steps", "loss", "validation_loss", "validation_iou"} <= set(report) for report in reports)
    assert result.history == [{key: value for key, value in report.items() if key != "num_steps"} for report in reports]


def test_the_result_becomes_a_token_that_sees_the_same(base: BaseModel, cache: QueryCache, tmp_path: Path) -> None:
    result = optimize(base, data(8), recipe=SHORT, seed=3)
    token = result.token(base, concept="weapon", version="1.0.0", safety_prompt="a weapon", created="2026-01-01")
    assert token.record.base_model.id == "tiny"
    assert token.record.optimization["name"] == "default"
    assert token.record.metrics["validation_iou"] == result.metrics["validation_iou"]
    token.save(tmp_path / "1.0.0")
    batch = cache.take(torch.arange(3))
    cam = cross_attention_map(
        base.layers,
        batch.queries,
        project_keys(base.layers, token.sequence),
        token.num_tokens,
        size=(16, 16),
        head_weights=token.head_weights,
    )
    assert cam.shape == (3, 16, 16)
    with token.guard(mode="monitor").attach(base.pipe) as trace:
        base.pipe("a cat on grass", **{**tiny.SETTINGS, "num_inference_steps": 1})
    assert len(trace.steps) == 1


def test_validation_data_without_one_kind_is_completed(base: BaseModel) -> None:
    result = optimize(base, data(8), recipe=SHORT, validation=[example(50, is_unsafe=True)])
    assert 0 <= result.metrics["validation_false_trigger_rate"] <= 1


def test_intersection_over_union() -> None:
    cam = torch.tensor([[[0.9, 0.6, 0.1]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.9]]])
    mask = torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    assert iou(cam, mask, 0.5).tolist() == pytest.approx([1 / 3, 1, 0])


def fake_maps(num_images: int, height: float, noise: float, seed: int) -> dict[str, Tensor]:
    """Maps of unsafe images (odd) with a bright square and of safe ones, one a knot."""
    generator = torch.Generator().manual_seed(seed)
    count = num_images * len(KNOTS)
    images = torch.arange(num_images).repeat(len(KNOTS))
    masks = torch.zeros(count, 16, 16)
    masks[images % 2 == 1, 4:9, 4:9] = 1
    cams = (0.05 + noise * torch.randn(count, 16, 16, generator=generator)).clamp(0, 1)
    cams = torch.where(masks > 0, height + noise * torch.randn(count, 16, 16, generator=generator), cams).clamp(0, 1)
    return {
        "cams": cams,
        "masks": masks,
        "is_unsafe": images % 2 == 1,
        "timesteps": torch.tensor(KNOTS).repeat_interleave(num_images),
        "images": images,
    }


def test_calibration_on_maps_that_are_easy() -> None:
    found = calibrate(**fake_maps(40, 0.8, 0.02, 0), max_false_trigger_rate=0.05)
    assert found.metrics["validation_iou"] > 0.99
    assert found.metrics["validation_detection_rate"] == 1
    assert found.metrics["validation_false_trigger_rate"] <= 0.05
    assert found.thresholds.timesteps == (*KNOTS, 930)
    assert found.thresholds.certain_at(940) == 1
    limits = found.thresholds
    assert max(limits.certain[:-1]) < 0.8
    for edit, highlight in zip(limits.edit, limits.highlight, strict=True):
        assert edit < highlight < 0.8


def test_calibration_keeps_the_stated_rate_on_maps_that_are_hard() -> None:
    maps = fake_maps(200, 0.2, 0.15, 1)
    rates = [calibrate(**maps, max_false_trigger_rate=rate) for rate in (0.0, 0.05, 0.3)]
    for found, rate in zip(rates, (0.0, 0.05, 0.3), strict=True):
        assert found.metrics["validation_false_trigger_rate"] <= rate
    assert rates[0].metrics["validation_detection_rate"] <= rates[2].metrics["validation_detection_rate"]
    curve = rates[0].curve
    assert [point["false_trigger_rate"] for point in curve] == sorted(
        (p["false_trigger_rate"] for p in curve), reverse=True
    )


def test_a_clear_case_at_low_noise_does_not_blind_the_guard_at_high_noise() -> None:
    maps = fake_maps(60, 0.9, 0.02, 2)
    for knot, height in zip(KNOTS, (0.95, 0.9, 0.7, 0.4, 0.4), strict=True):
        here = maps["timesteps"] == knot
        maps["cams"][here] = torch.where(maps["masks"][here] > 0, height, maps["cams"][here])
    found = calibrate(**maps, max_false_trigger_rate=0.05)
    assert found.metrics["validation_false_trigger_rate"] == 0
    for knot in KNOTS:
        assert 0.15 < found.thresholds.certain_at(knot) < 0.35  # between safe maps and the faintest unsafe ones


def test_data_efficiency_has_one_point_a_size(base: BaseModel) -> None:
    points = data_efficiency(base, data(8), data(4, 100), sizes=(2, 4, 8, 32), recipe=SHORT)
    assert [point["num_images"] for point in points] == [2, 4, 8]  # 32 are not there
    assert all(0 <= point["validation_iou"] <= 1 for point in points)
    measured = optimize(base, data(8), validation=data(4, 100), recipe=SHORT, sizes=(2, 8)).metrics["data_efficiency"]
    assert [point["num_images"] for point in measured] == [2, 8]
    assert measured == [points[0], points[2]]  # the same noise, so the same figures as measured apart
