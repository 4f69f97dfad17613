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
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import DatasetError, WorkspaceError
from dagkit.guidance import score
from dagkit.models import BaseModel
from dagkit.models.sites import Detector
from dagkit.optimization import (
    KNOTS,
    PAPERS_CONSTANTS,
    PAPERS_GUIDANCE,
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
    draw_levels,
    fit,
    initial_parameters,
    negative_attention,
    objective,
    optimize,
    pixel_cross_entropy,
    split,
)
from dagkit.optimization.clusters import clusters
from dagkit.token import GuidelineToken, Thresholds

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
    return BaseModel(pipe, models.match(pipe), "tiny", "sha256:0")


@pytest.fixture(scope="module")
def cache(base: BaseModel) -> Iterator[QueryCache]:
    draws = draw_levels(SHORT, 8, torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("weight", ["pixel_weight", "leakage_weight", "negative_weight", "recognition_weight"])
def test_each_loss_has_a_weight_and_the_right_gradient(weight: str) -> None:
    zero = {"pixel_weight": 0.0, "leakage_weight": 0.0, "negative_weight": 0.0, "recognition_weight": 0.0}
    recipe = replace(RECIPES["default"], positive_weight=1.0, **{**zero, weight: 2.0})
    cam = torch.tensor([[[0.4, 0.3]], [[0.4, 0.3]]], requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    objective(cam, mask, torch.tensor([True, False]), recipe).backward()
    gradient: Tensor = cam.grad
    inside, outside, safe = gradient[0, 0, 0].item(), gradient[0, 0, 1].item(), gradient[1, 0, 0].item()
    # d/dp -log p = -1/p and d/dp -log(1-p) = 1/(1-p), means over 2 pixels, weight 2; leakage is linear; the score of an
    # image of two pixels is the higher one
    expected = {
        "pixel_weight": (-1 / 0.4, 1 / 0.7, 0),
        "leakage_weight": (0, 2, 0),
        "negative_weight": (0, 0, 1 / 0.6),
        "recognition_weight": (-2 / 0.4, 0, 2 / 0.6),
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
    draws = draw_levels(Recipe(num_draws=4, min_level=0.0, max_level=1.0), 50, torch.Generator().manual_seed(0))
    assert draws.shape == (4, 50)
    for number, part in enumerate(draws):
        assert 0.25 * number <= part.min()
        assert part.max() < 0.25 * (number + 1)


def test_the_cache_holds_what_one_forward_gives(base: BaseModel, cache: QueryCache) -> None:
    assert len(cache) == 16
    assert cache.images.tolist() == [*range(8), *range(8)]
    examples = data(8)
    again = base.features(
        base.latents([e.image for e in examples]),
        cache.levels[8:],
        base.encode([e.prompt for e in examples]),
        seed=1 + 8,
    )
    batch = cache.take(torch.arange(8, 16))
    for name, value in again.items():
        torch.testing.assert_close(batch.features[name], value, atol=1e-5, rtol=1e-5)
    assert torch.equal(batch.is_unsafe, torch.tensor([True, False] * 4))
    assert batch.masks[1].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_on_disk_holds_the_same(base: BaseModel, dtype: torch.dtype) -> None:
    draws = draw_levels(SHORT, 4, torch.Generator().manual_seed(0))
    index = torch.tensor([7, 0, 3])
    taken = []
    for budget in (1 << 30, 1000):
        with cache_queries(base, data(4), draws, seed=1, dtype=dtype, memory_bytes=budget, batch_size=3) as cache:
            assert cache.is_on_disk is (budget == 1000)
            taken.append(cache.take(index))
    for name, value in taken[0].features.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, taken[1].features[name])


PAIR_BYTES = 4 * sum((16 * 16 * 32, 16 * 16 * 32, 16 * 16 * 32) + (8 * 8 * 64,) * 4)
"""Of one pair's queries in float32: the tiny model has 3 layers of 16x16 and 4 of 8x8 cells."""


def test_gradients_of_micro_batches_sum_to_the_whole_batchs(base: BaseModel) -> None:
    draws = draw_levels(SHORT, 8, torch.Generator().manual_seed(0))
    recipe = replace(
        SHORT, optimizer="sgd", learning_rate=1.0, decay=1.0, num_steps=1, batch_size=0, leakage_weight=0.5
    )
    found, histories = [], []
    for memory_bytes, micro_batch_size in ((1 << 30, None), (8 * 3 * PAIR_BYTES, 3)):
        with cache_queries(base, data(8), draws, seed=1, memory_bytes=memory_bytes) as cache:
            index = torch.cat([cache.is_unsafe.nonzero()[:, 0], (~cache.is_unsafe).nonzero()[:5, 0]])
            parts = cache.parts(index)  # 8 unsafe and 5 safe pairs: the first parts are of one kind, the third of both
            assert [len(part) for part in parts] == ([13] if micro_batch_size is None else [3, 3, 3, 3, 1])
            start = initial_parameters(base, data(8), recipe, base.sites, torch.Generator().manual_seed(0))
            before = [tensor.clone() for tensor in start.learned()]
            after, history = fit(base.sites, cache, start, recipe, torch.Generator(), index=index)
        found.append([old - new for old, new in zip(before, after.learned(), strict=True)])
        histories.append(history)
    assert histories[0][0]["loss"] == pytest.approx(histories[1][0]["loss"], rel=1e-6)
    for whole, summed in zip(*found, strict=True):
        assert whole.abs().max() > 1e-4
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


def test_maps_are_made_in_parts_that_fit_into_memory(base: BaseModel, cache: QueryCache) -> None:
    start = initial_parameters(base, data(8), SHORT, base.sites, torch.Generator().manual_seed(0))
    draws = draw_levels(SHORT, 8, torch.Generator().manual_seed(0))
    with cache_queries(base, data(8), draws, seed=1, memory_bytes=8 * 5 * PAIR_BYTES) as small:
        assert [len(batch.masks) for batch in small.batches(32)] == [5, 5, 5, 1]
        torch.testing.assert_close(start.cams(base.sites, small), start.cams(base.sites, cache))


def test_caches_that_are_open_together_share_one_budget(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[QueryCache] = []
    taken: list[int] = []
    real, take = QueryCache.__init__, QueryCache.take

    def note_cache(self: QueryCache, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        made.append(self)

    def note_size(self: QueryCache, index: Tensor) -> Any:
        batch = take(self, index)
        taken.append(sum(value.nbytes for value in batch.features.values()))
        return batch

    monkeypatch.setattr(QueryCache, "__init__", note_cache)
    monkeypatch.setattr(QueryCache, "take", note_size)
    budget = 100 * PAIR_BYTES  # 50 may be kept: of 16 training, 20 validation and 40 training pairs two caches
    small = optimize(base, data(8), validation=data(4, 100), recipe=replace(SHORT, memory_bytes=budget), seed=3)
    assert [(len(cache), cache.is_on_disk) for cache in made] == [(16, False), (20, False), (40, True)]
    assert sum(cache.num_bytes for cache in made) == 36 * PAIR_BYTES <= budget / 2
    assert PAIR_BYTES < max(taken) <= budget / 8

    large = optimize(base, data(8), validation=data(4, 100), recipe=SHORT, seed=3)
    assert all(not cache.is_on_disk for cache in made[3:])
    torch.testing.assert_close(small.guideline, large.guideline, rtol=1e-3, atol=1e-4)


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
        start = initial_parameters(base, data(8), SHORT, base.sites, torch.Generator().manual_seed(0))
        found, history = fit(base.sites, cache, start, SHORT, torch.Generator().manual_seed(0))
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
    start = initial_parameters(base, data(8), replace(recipe, initial_phrase="a bomb"), base.sites, torch.Generator())
    batch = cache.take(torch.arange(len(cache)))

    def loss(parameters: Any) -> float:
        return float(objective(parameters.cam(base.sites, batch), batch.masks, batch.is_unsafe, recipe))

    before = loss(start)
    found, _ = fit(base.sites, cache, start, replace(recipe, num_steps=40, batch_size=0), torch.Generator())
    assert loss(found) < 0.97 * before


def test_the_papers_recipe_is_the_published_one(base: BaseModel, cache: QueryCache) -> None:
    """SGD, lr 200, x0.7 every 20 steps, 100 steps x n tokens, plain means: over a real run, step by step."""
    rates: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert type(optimizer) is torch.optim.SGD
        (group,) = optimizer.param_groups
        assert len(group["params"]) == 1  # the guideline rows alone
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0, 0, False)
        rates.append(group["lr"])

    recipe = replace(RECIPES["paper"], num_tokens=2, initial_phrase="a bomb")
    start = initial_parameters(base, data(8), recipe, base.sites, torch.Generator())
    assert (start.background, start.head_weights) == (None, None)
    handle = register_optimizer_step_pre_hook(note)
    try:
        found, _ = fit(base.sites, cache, start, recipe, torch.Generator())
    finally:
        handle.remove()
    assert rates == pytest.approx([200 * 0.7 ** (step // 20) for step in range(200)])
    assert (found.background, found.head_weights) == (None, None)
    assert RECIPES["paper"].num_tokens == 1
    assert RECIPES["paper"].total_steps == 100


def test_a_token_of_the_papers_recipe_guides_in_the_papers_form(base: BaseModel, tmp_path: Path) -> None:
    result = optimize(base, data(8), recipe=replace(RECIPES["paper"], num_steps=2, num_draws=2))
    token = result.token(base, concept="weapon", version="1.0.0", safety_prompt="a weapon")
    own, limits = token.record.guidance, token.record.thresholds
    assert (own.form, own.strength, own.reuse_steps) == ("paper", 1.0, 1)
    assert (limits.highlight, limits.edit, limits.max_area, limits.min_area) == ((0.5,), (0.01,), 0.8, 0.0)
    assert (own, limits) == (PAPERS_GUIDANCE, PAPERS_CONSTANTS)
    loaded = GuidelineToken.load(token.save(tmp_path / "1.0.0"))
    kept = Thresholds(**loaded.record.metrics["calibrated_thresholds"])
    assert kept == result.thresholds
    assert len(kept.levels) == len(KNOTS) + 1
    guard = loaded.guard()
    assert (guard.form, guard.reuse_steps, guard.thresholds) == ("paper", 1, PAPERS_CONSTANTS)

    default = optimize(base, data(8), recipe=SHORT)
    assert (
        default.token(base, concept="weapon", version="1.0.0", safety_prompt="a weapon").record.guidance.form == "drop"
    )
    other = result.token(
        base,
        concept="weapon",
        version="1.0.0",
        safety_prompt="a weapon",
        guidance=own.model_copy(update={"form": "drop"}),
    )
    assert other.record.thresholds == result.thresholds


def test_starting_values(base: BaseModel) -> None:
    recipe = replace(SHORT, num_tokens=1, initial_phrase="a bomb")
    start = initial_parameters(base, data(4), recipe, base.sites, torch.Generator())
    encoded = base.encode(["a bomb"]).hidden_states[0]
    torch.testing.assert_close(start.guideline[0], encoded[2])
    torch.testing.assert_close(start.start_of_text[0], encoded[0])
    assert start.background is not None
    assert len(start.background.unique(dim=0)) == 3
    again = initial_parameters(base, data(4), replace(recipe, initial_phrase=""), base.sites, torch.Generator())
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


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seed": 1}, "data, seed"),  # which also draws other timesteps
        ({"examples": data(8, 31)}, "data"),
        ({"examples": [replace(one, is_unsafe=not one.is_unsafe, mask=~one.mask) for one in data(8)]}, "data"),
    ],
    ids=["seed", "masks", "kinds"],
)
def test_a_checkpoint_of_another_seed_or_data_is_refused(
    base: BaseModel, tmp_path: Path, changed: dict[str, Any], name: str
) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    optimize(base, data(8), recipe=SHORT, checkpoint=checkpoint, validation=data(4, 100))
    before = checkpoint.read_bytes()
    options = {"examples": data(8), "recipe": SHORT, "checkpoint": checkpoint, "validation": data(4, 100), **changed}
    with pytest.raises(WorkspaceError, match=f"made with another {name}. Delete it to start anew"):
        optimize(base, options.pop("examples"), **options)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_a_fit_on_other_noise_levels_is_refused(
    base: BaseModel, cache: QueryCache, tmp_path: Path
) -> None:
    def run(cache: QueryCache) -> None:
        generator = torch.Generator().manual_seed(0)
        start = initial_parameters(base, data(8), SHORT, base.sites, generator)
        fit(base.sites, cache, start, SHORT, generator, checkpoint=tmp_path / "checkpoint.safetensors")

    run(cache)
    run(cache)
    with (
        cache_queries(base, data(8), cache.levels.unflatten(0, (2, 8)) + 0.001, seed=1) as other,
        pytest.raises(WorkspaceError, match="made with another data"),
    ):
        run(other)


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
    start = initial_parameters(base, data(8), recipe, base.sites, torch.Generator())
    found, history = fit(base.sites, cache, start, recipe, torch.Generator(), validate=validate)
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
    cam = Detector(base.sites, token.sequence, token.num_tokens, token.head_weights)(batch.features, (16, 16))
    assert cam.shape == (3, 16, 16)
    with token.guard(mode="monitor", thresholds=Thresholds()).attach(base.pipe) as trace:
        base.pipe("a cat on grass", **{**tiny.SETTINGS, "num_inference_steps": 1})
    assert len(trace.steps) == 1


def test_validation_data_without_one_kind_is_completed(base: BaseModel) -> None:
    result = optimize(base, data(8), recipe=SHORT, validation=[example(50, is_unsafe=True)])
    assert 0 <= result.metrics["training_false_trigger_rate"] <= 1  # the safe images are the training's own
    assert {"validation_iou", "validation_detection_rate"} < set(result.metrics)
    assert "validation_false_trigger_rate" not in result.metrics
    assert not {name for name in result.history[0] if name.startswith("training_")} - {"training_loss"}


def test_figures_on_images_that_were_learned_from_are_training_figures(base: BaseModel) -> None:
    reports: list[dict[str, Any]] = []
    result = optimize(base, data(8), recipe=SHORT, validation=[], sizes=(2,), progress=reports.append)
    figures = {**result.metrics, **result.history[0], **result.metrics["data_efficiency"][0], **reports[0]}
    names = {name for name in figures if name.startswith(("training_", "validation_"))}
    assert {"training_iou", "training_loss", "training_detection_rate", "training_false_trigger_rate"} < names
    assert not [name for name in names if name.startswith("validation_")]
    assert result.figure("iou") == (result.metrics["training_iou"], "training")

    apart = optimize(base, data(8), recipe=SHORT)  # every fourth of each kind
    assert not [name for name in {**apart.metrics, **apart.history[0]} if name.startswith("training_")]
    few = optimize(base, data(6), recipe=SHORT)  # three of each kind: none to spare
    assert not [name for name in {**few.metrics, **few.history[0]} if name.startswith("validation_")]


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
        "levels": torch.tensor(KNOTS, dtype=torch.float64).repeat_interleave(num_images),
        "images": images,
    }


def test_calibration_on_maps_that_are_easy() -> None:
    found = calibrate(**fake_maps(40, 0.8, 0.02, 0), max_false_trigger_rate=0.05)
    assert found.metrics["validation_iou"] > 0.99
    assert found.metrics["validation_detection_rate"] == 1
    assert found.metrics["validation_false_trigger_rate"] <= 0.05
    assert found.thresholds.levels == (*KNOTS, 0.93)
    assert found.thresholds.certain_at(0.94) == 1
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
    for found in rates:
        curve = found.curve
        for name in ("false_trigger_rate", "detection_rate"):
            assert [point[name] for point in curve] == sorted((point[name] for point in curve), reverse=True)
        assert curve[0]["false_trigger_rate"] > 0.9
        assert curve[-1]["detection_rate"] < 0.1
        (chosen,) = (point for point in curve if point["is_chosen"])
        assert chosen["logit_shift"] == 0
        assert tuple(chosen["certain"]) == found.thresholds.certain[:-1]
        assert chosen["false_trigger_rate"] == found.metrics["validation_false_trigger_rate"]
        assert chosen["detection_rate"] == found.metrics["validation_detection_rate"]


def test_a_point_of_the_calibration_curve_is_what_its_thresholds_do() -> None:
    maps = fake_maps(60, 0.3, 0.15, 3)
    found = calibrate(**maps, max_false_trigger_rate=0.05)
    area = found.thresholds.min_area
    for point in found.curve[::4]:
        limits = found.thresholds.model_copy(update={"certain": (*point["certain"], 1.0)})
        acts = torch.zeros(2, 60, dtype=torch.bool)
        for cam, t, image, kind in zip(
            maps["cams"], maps["levels"].tolist(), maps["images"].tolist(), maps["is_unsafe"].tolist(), strict=True
        ):
            acts[int(kind), image] |= t <= 0.77 and score(cam[None], area).item() >= limits.certain_at(t)
        assert point["false_trigger_rate"] == pytest.approx(acts[0, 0::2].float().mean().item())
        assert point["detection_rate"] == pytest.approx(acts[1, 1::2].float().mean().item())
        for limit, own in zip(point["certain"], found.thresholds.certain, strict=False):
            shift = math.log(limit / (1 - limit)) - math.log(own / (1 - own)) if own < 1 else point["logit_shift"]
            assert shift == pytest.approx(point["logit_shift"])


def test_maps_that_tell_nothing_give_a_rule_that_never_acts() -> None:
    found = calibrate(**fake_maps(40, 0.05, 0.02, 4), max_false_trigger_rate=0.05)
    assert found.thresholds.certain == (1.0,) * (len(KNOTS) + 1)
    assert found.metrics["validation_detection_rate"] == 0
    assert [point["is_chosen"] for point in found.curve].count(True) == 1
    assert all(point["detection_rate"] == 0 for point in found.curve)


def test_a_clear_case_at_low_noise_does_not_blind_the_guard_at_high_noise() -> None:
    maps = fake_maps(60, 0.9, 0.02, 2)
    for knot, height in zip(KNOTS, (0.95, 0.9, 0.7, 0.4, 0.4), strict=True):
        here = maps["levels"] == knot
        maps["cams"][here] = torch.where(maps["masks"][here] > 0, height, maps["cams"][here])
    found = calibrate(**maps, max_false_trigger_rate=0.05)
    assert found.metrics["validation_false_trigger_rate"] == 0
    for knot in KNOTS:
        assert 0.15 < found.thresholds.certain_at(knot) < 0.38  # between safe maps and the faintest unsafe ones


def with_slices(heights: dict[str, float], safe_height: float, seed: int = 5) -> dict[str, Any]:
    """Maps of 20 images a slice, each with squares of its own height, and as many safe ones up to another."""
    maps: dict[str, Any] = fake_maps(40 * len(heights), 0.0, 0.02, seed)
    names = list(heights)
    slices = [names[image // 2 % len(names)] if image % 2 else None for image in range(40 * len(names))]
    for name, height in heights.items():
        here = torch.tensor([slices[image] == name for image in maps["images"].tolist()])
        maps["cams"][here] = torch.where(maps["masks"][here] > 0, height, maps["cams"][here])
    safe = ~maps["is_unsafe"]
    heights_of_safe = 0.1 + (safe_height - 0.1) * (maps["images"][safe] / maps["images"].max())
    maps["cams"][safe, 4:9, 4:9] = heights_of_safe[:, None, None].float()
    return {**maps, "slices": slices}


def test_the_threshold_sees_the_weakest_slice() -> None:
    """A quarter of the unsafe images lies far below the others, but above all safe ones."""
    maps = with_slices({"cat": 0.95, "dog": 0.95, "fish": 0.95, "duck": 0.6}, safe_height=0.4)
    found = calibrate(**maps, max_false_trigger_rate=0.0)
    assert found.metrics["validation_false_trigger_rate"] == 0
    assert all(0.4 < found.thresholds.certain_at(knot) < 0.6 for knot in KNOTS)
    for one in found.slices.values():
        assert (one.count, one.num_held_out, one.detection_rate, one.early_rate) == (20, 20, 1.0, 1.0)
        assert one.overlaps == ()


def test_a_slice_below_the_safe_images_says_which_it_overlaps_with() -> None:
    maps = with_slices({"cat": 0.95, "duck": 0.5}, safe_height=0.8)
    blind, seeing = (calibrate(**maps, max_false_trigger_rate=rate) for rate in (0.0, 0.5))
    assert list(blind.slices) == ["duck", "cat"]
    assert blind.slices["duck"].early_rate == 0
    assert blind.slices["cat"].early_rate == 1
    assert blind.slices["duck"].overlaps == (78, 76, 74)  # the brightest safe images, which are even
    assert blind.slices["cat"].overlaps == ()
    assert blind.metrics["validation_false_trigger_rate"] == 0
    # the allowed rate is spent on the slice
    assert seeing.slices["duck"].early_rate == 1
    assert 0.2 < seeing.metrics["validation_false_trigger_rate"] <= 0.5


def test_figures_of_unsafe_images_are_of_those_kept_apart() -> None:
    maps = with_slices({"cat": 0.9, "duck": 0.9}, safe_height=0.3)
    late = maps["images"] >= 40
    maps["masks"][late] = maps["masks"][late].roll(8, dims=2)  # those that were learned from are found elsewhere
    found = calibrate(**maps, max_false_trigger_rate=0.05, num_held_out=40)
    assert found.metrics["validation_iou"] > 0.99
    for one in found.slices.values():
        assert (one.count, one.num_held_out, one.detection_rate) == (20, 10, 1)
        assert one.iou == pytest.approx(0.5, abs=0.01)


def test_what_a_guard_would_see_before_it_acts_is_no_trigger() -> None:
    maps = with_slices({"cat": 0.9}, safe_height=0.3)
    maps["cams"][(maps["levels"] == 0.85) & ~maps["is_unsafe"]] = 0.8
    found = calibrate(**maps, max_false_trigger_rate=0.0)
    assert found.metrics["validation_false_trigger_rate"] == 0
    assert found.thresholds.certain_at(0.7) < 0.8


def test_a_token_says_how_well_it_sees_each_member(base: BaseModel) -> None:
    examples = [
        replace(one, member=("bomb", "axe")[i // 2 % 2] if one.is_unsafe else None) for i, one in enumerate(data(16))
    ]
    result = optimize(base, examples, recipe=SHORT)
    assert sorted(result.metrics["slices"]) == ["axe", "bomb"]
    assert {one["count"] for one in result.metrics["slices"].values()} == {4}
    assert sum(one["num_held_out"] for one in result.metrics["slices"].values()) == 2
    assert not any("overlaps" in one for one in result.metrics["slices"].values())
    assert set(result.overlaps) == {"axe", "bomb"}
    assert set().union(*result.overlaps.values()) <= {"a cat on sand"}


def test_clusters_are_the_groups_that_lie_together_the_largest_first() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(9, 3, generator=generator), 20 + torch.randn(15, 3, generator=generator)])
    assert clusters(points, 2) == [1] * 9 + [0] * 15
    assert clusters(points, 1) == [0] * 24


def test_where_no_member_is_known_clusters_stand_in(base: BaseModel) -> None:
    few = optimize(base, data(8), recipe=SHORT)
    assert few.metrics["slices"] == {}
    many = optimize(base, data(40), recipe=replace(SHORT, num_steps=4))
    assert set(many.metrics["slices"]) == {"cluster 1", "cluster 2"}
    assert sum(one["count"] for one in many.metrics["slices"].values()) == 20
    assert many.metrics["slices"]["cluster 1"]["count"] >= 10


def test_data_efficiency_has_one_point_a_size(base: BaseModel) -> None:
    points = data_efficiency(base, data(8), data(4, 100), sizes=(2, 4, 8, 32), recipe=SHORT)
    assert [point["num_images"] for point in points] == [2, 4, 8]  # 32 are not there
    assert all(0 <= point["validation_iou"] <= 1 for point in points)
    measured = optimize(base, data(8), validation=data(4, 100), recipe=SHORT, sizes=(2, 8)).metrics["data_efficiency"]
    assert [point["num_images"] for point in measured] == [2, 8]
    assert measured == [points[0], points[2]]  # the same noise, so the same figures as measured apart
