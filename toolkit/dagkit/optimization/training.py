"""The whole of an optimisation: caches, fit, calibration, and the token that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dagkit.metrics import iou
from dagkit.models import BaseModel
from dagkit.models.quantised import check_plain
from dagkit.models.sites import Sites
from dagkit.optimization.cache import QueryCache, cache_queries
from dagkit.optimization.calibration import DECIDED, KNOTS, calibrate, summary
from dagkit.optimization.clusters import cluster_names
from dagkit.optimization.data import (
    Example,
    check_examples,
    complete,
    kinds_learned_from,
    measured_names,
    split,
)
from dagkit.optimization.fit import History, Parameters, Progress, fit, initial_parameters
from dagkit.optimization.losses import objective
from dagkit.optimization.recipe import PAPERS_CONSTANTS, PAPERS_GUIDANCE, RECIPES, Recipe
from dagkit.provenance import public_name
from dagkit.token import (
    BaseModelInfo,
    DatasetInfo,
    Guidance,
    GuidelineToken,
    Thresholds,
    TokenRecord,
    listed,
    now,
    software,
)


@dataclass(frozen=True)
class OptimizationResult:
    """What an optimisation found.

    Attributes:
        guideline: (n, d) float32.
        background: (m, d) float32 or None.
        head_weights: (heads over all layers,) float32 or None.
        start_of_text: (1, d) float32.
        layers: names, in order.
        thresholds: calibrated on validation data.
        recipe: what was asked for.
        history: one dict a report: step, loss, validation_loss, validation_iou.
        metrics: figures on validation data, with the calibration curve. Where the detection rate is 0, a guard with
            these thresholds never acts.
        overlaps: slice -> prompts of safe images that score higher than its weakest images. They stay out of the token.

    Figures are called ``training_...`` instead of ``validation_...`` where no images of the kind that they are measured
    on were kept apart from training.
    """

    guideline: Tensor
    background: Tensor | None
    head_weights: Tensor | None
    start_of_text: Tensor
    layers: tuple[str, ...]
    thresholds: Thresholds
    recipe: Recipe
    history: History = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    overlaps: dict[str, list[str]] = field(default_factory=dict)

    def figure(self, measure: str) -> tuple[float, str]:
        """A figure of the metrics, e.g. ``detection_rate``, and what it was measured on: validation or training."""
        measured_on = "training" if f"training_{measure}" in self.metrics else "validation"
        return self.metrics[f"{measured_on}_{measure}"], measured_on

    def token(
        self,
        base: BaseModel,
        *,
        concept: str,
        version: str,
        safety_prompt: str,
        model_id: str | None = None,
        guidance: Guidance | None = None,
        dataset: DatasetInfo | None = None,
        optimization: Mapping[str, Any] | None = None,
        created: str | None = None,
    ) -> GuidelineToken:
        """Makes the artifact of this result.

        One of the recipe ``paper`` gets the paper's guidance and thresholds; the calibrated ones, of which the metrics
        tell, stay in ``metrics["calibrated_thresholds"]``.

        Args:
            base: the base model that it was optimised on.
            concept: name.
            version: semantic version.
            safety_prompt: text of the concept; things that it lists are pushed away from one by one, see
                `dagkit.token.listed`.
            model_id: how the base model is called in the record; its Hub id or folder name where not given.
            guidance: form and constants; the recipe's where not given.
            dataset: what the data was.
            optimization: further settings for the record, e.g. the seed.
            created: ISO time; now where not given.
        """
        sites = base.family.sites(base.pipe, self.layers)
        is_paper = self.recipe.name == "paper"
        guidance = guidance or (PAPERS_GUIDANCE if is_paper else Guidance())
        thresholds, metrics = self.thresholds, self.metrics
        if is_paper and guidance.form == "paper":
            thresholds = PAPERS_CONSTANTS
            metrics = {**metrics, "calibrated_thresholds": self.thresholds.model_dump(mode="json")}
        record = TokenRecord(
            concept=concept,
            version=version,
            base_model=BaseModelInfo(
                id=public_name(model_id or base.source),
                architecture=base.family.name,
                fingerprint=base.fingerprint,
                **base.family.fingerprints(base.pipe, sites),
            ),
            layers=self.layers,
            thresholds=thresholds,
            guidance=guidance,
            safety_prompt=safety_prompt,
            safety_phrases=listed(safety_prompt),
            optimization={**asdict(self.recipe), "history": self.history, **(optimization or {})},
            dataset=dataset or DatasetInfo(),
            metrics=metrics,
            software=software(),
            created=now() if created is None else created,
        )
        return GuidelineToken(self.guideline, self.start_of_text, self.background, self.head_weights, record)


def optimize(
    base: BaseModel,
    examples: Sequence[Example],
    *,
    recipe: Recipe = RECIPES["default"],
    seed: int = 0,
    validation: Sequence[Example] | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    sizes: Sequence[int] = (),
) -> OptimizationResult:
    """Optimises a guideline token and calibrates its thresholds.

    Thresholds of certainty need many images, so those of the training data are looked at as well, at new noise;
    ``validation_false_area_*``, ``validation_false_trigger_rate`` and ``slices`` count them too, and are a little
    optimistic.

    Args:
        base: the frozen base model.
        examples: unsafe images with masks and safe images without, of one size.
        recipe: see ``RECIPES``.
        seed: of noise, noise levels, initial rows and batches.
        validation: examples kept apart; where not given, every fourth example of each kind is kept apart. A kind that
            is missing in it is taken from the training data, and its figures are called ``training_...``.
        progress: called after each report with step, num_steps, loss and validation figures.
        checkpoint: file from which a killed optimisation goes on, with the same result.
        sizes: numbers of training images for which ``data_efficiency`` is measured on the way.

    Raises:
        DatasetError: there are no unsafe or no safe images, or a mask does not fit its image.
        ModelError: the model is quantised.
        WorkspaceError: the checkpoint is damaged, or of another recipe, seed or data, or the disk is full.
    """
    sites = base.sites
    check_plain(module for part in base.family.weighed(base.pipe, sites).values() for module in part)
    sites = sites.in_float32()
    check_examples(examples)
    if validation is None:
        examples, validation = split(examples)
    validation = complete(validation, examples)
    check_examples(validation)
    learned_from = kinds_learned_from(validation, examples)
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        cache = stack.enter_context(
            _cached(base, examples, draw_levels(recipe, len(examples), generator), recipe, 2 * seed)
        )
        knots = torch.tensor(KNOTS, dtype=torch.float64)[:, None].expand(-1, len(validation))
        held_out = stack.enter_context(_cached(base, validation, knots, recipe, 2 * seed + 1, cache))
        parameters, history = fit(
            sites,
            cache,
            initial_parameters(base, examples, recipe, sites, generator),
            recipe,
            generator,
            validate=lambda state: _validate(state, sites, held_out, recipe),
            progress=progress and (lambda state: progress(measured_names(state, learned_from))),
            checkpoint=checkpoint,
        )
        # Rare false triggers and weak members need many images to be seen, so those of the training data count too, at
        # new noise.
        caches, known = [held_out], {id(example) for example in validation}
        if seen := [example for example in examples if id(example) not in known]:
            knots = torch.tensor(KNOTS, dtype=torch.float64)[:, None].expand(-1, len(seen))
            caches.append(stack.enter_context(_cached(base, seen, knots, recipe, 2 * seed + 3, cache, held_out)))
        pairs = zip(*(_pairs(parameters, sites, one) for one in caches), strict=True)
        cams, masks, is_unsafe, levels = (torch.cat(parts) for parts in pairs)
        images = torch.cat([number * len(validation) + one.images for number, one in enumerate(caches)])
        everything = [*validation, *seen]
        calibration = calibrate(
            cams,
            masks,
            is_unsafe,
            levels,
            images,
            recipe.max_false_trigger_rate,
            slices=_slices(everything, caches),
            num_held_out=len(validation),
        )
        metrics = summary(calibration)
        if sizes:
            points = _efficiency(base, examples, sites, cache, held_out, sizes, recipe, seed)
            metrics["data_efficiency"] = [measured_names(point, learned_from) for point in points]
    return OptimizationResult(
        guideline=parameters.guideline.float().cpu(),
        background=None if parameters.background is None else parameters.background.float().cpu(),
        head_weights=None if parameters.head_weights is None else parameters.head_weights.float().cpu(),
        start_of_text=parameters.start_of_text.float().cpu(),
        layers=tuple(sites),
        thresholds=calibration.thresholds,
        recipe=recipe,
        history=[measured_names(state, learned_from) for state in history],
        metrics=measured_names(metrics, learned_from),
        overlaps={
            name: [everything[image].prompt for image in one.overlaps] for name, one in calibration.slices.items()
        },
    )


def _slices(examples: Sequence[Example], caches: Sequence[QueryCache]) -> list[str | None]:
    """The member that each unsafe image shows; where none is known of any image, the cluster that it belongs to."""
    members = [example.member if example.is_unsafe else None for example in examples]
    return members if any(members) else cluster_names(caches)


def _pairs(parameters: Parameters, sites: Sites, cache: QueryCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detection maps, masks, kinds and noise levels of all pairs of a cache."""
    return parameters.cams(sites, cache), cache.masks, cache.is_unsafe, cache.levels


def data_efficiency(
    base: BaseModel,
    examples: Sequence[Example],
    validation: Sequence[Example],
    *,
    sizes: Sequence[int] = (2, 4, 8, 16, 32),
    recipe: Recipe = RECIPES["default"],
    seed: int = 0,
) -> list[dict[str, float]]:
    """Validation IoU against the number of annotated images, half of them safe; the queries are cached once.

    Args:
        base: the frozen base model.
        examples: of both kinds; sizes for which there are not enough are left out.
        validation: examples kept apart.
        sizes: numbers of images.
        recipe: for every size.
        seed: of noise, noise levels and initial rows.

    Returns:
        One dict a size: ``num_images``, ``validation_iou``.
    """
    check_examples(examples)
    draws = draw_levels(recipe, len(examples), torch.Generator().manual_seed(seed))
    knots = torch.tensor(KNOTS, dtype=torch.float64)[:, None].expand(-1, len(validation))
    with (
        _cached(base, examples, draws, recipe, 2 * seed) as cache,
        _cached(base, validation, knots, recipe, 2 * seed + 1, cache) as held_out,
    ):
        return _efficiency(base, examples, base.sites.in_float32(), cache, held_out, sizes, recipe, seed)


def _efficiency(
    base: BaseModel,
    examples: Sequence[Example],
    sites: Sites,
    cache: QueryCache,
    held_out: QueryCache,
    sizes: Sequence[int],
    recipe: Recipe,
    seed: int,
) -> list[dict[str, float]]:
    order = _interleaved(examples)
    points = []
    for size in (size for size in sizes if size <= len(order)):
        chosen = torch.tensor(order[:size])
        start = initial_parameters(
            base, [examples[i] for i in order[:size]], recipe, sites, torch.Generator().manual_seed(seed)
        )
        found, _ = fit(
            sites,
            cache,
            start,
            replace(recipe, validate_every=0),
            torch.Generator().manual_seed(seed),
            index=torch.isin(cache.images, chosen).nonzero()[:, 0],
        )
        iou = _validate(found, sites, held_out, recipe)["validation_iou"]
        points.append({"num_images": float(size), "validation_iou": iou})
    return points


def draw_levels(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """(num_draws, count) float64 noise levels, stratified: each example's draws fall into equal parts of the range.

    They are whole thousandths, as the timesteps are that most models were trained on.
    """
    lowest, highest = 1000 * recipe.min_level, 1000 * recipe.max_level
    part = torch.arange(recipe.num_draws)[:, None] + torch.rand((recipe.num_draws, count), generator=generator)
    return (lowest + part * (highest - lowest) / recipe.num_draws).long().double() / 1000


def _cached(
    base: BaseModel, examples: Sequence[Example], levels: Tensor, recipe: Recipe, seed: int, *beside: QueryCache
) -> AbstractContextManager[QueryCache]:
    """Queries under the recipe's memory, which is shared with the caches ``beside``."""
    return cache_queries(
        base,
        examples,
        levels,
        seed=1_000_003 * (seed + 1),
        dtype=getattr(torch, recipe.cache_dtype),
        memory_bytes=recipe.memory_bytes,
        beside=beside,
    )


def _validate(parameters: Parameters, sites: Sites, held: QueryCache, recipe: Recipe) -> dict[str, float]:
    """Loss on held-out pairs, and IoU at the best common threshold, mean over knots up to 0.7."""
    cams = parameters.cams(sites, held)
    loss = float(objective(cams, held.masks, held.is_unsafe, recipe))
    index = held.is_unsafe & (held.levels <= DECIDED)
    thresholds = [0.05 * k for k in range(2, 16)]
    best = max(float(iou(cams[index] >= value, held.masks[index] >= 0.5).mean()) for value in thresholds)
    return {"validation_loss": loss, "validation_iou": best}


def _interleaved(examples: Sequence[Example]) -> list[int]:
    """Positions of unsafe and safe examples by turns, so that every even prefix holds both alike."""
    kinds = [[i for i, example in enumerate(examples) if example.is_unsafe is kind] for kind in (True, False)]
    return [position for pair in zip(*kinds, strict=False) for position in pair]
