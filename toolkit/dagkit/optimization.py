"""Guideline token optimisation: cached queries, losses, recipes, calibration.

The frozen denoiser runs once for each (image, timestep); after that only ``to_k`` and a softmax are left, so a step
costs milliseconds. What is learned: the guideline rows, and in the default recipe background rows that compete with
them in the softmax, and one weight a head.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from dagkit.attention import cross_attention_map, grid, project_keys
from dagkit.errors import DatasetError, WorkspaceError
from dagkit.families import BaseModel
from dagkit.token import BaseModelInfo, DatasetInfo, Guidance, GuidelineToken, Thresholds, TokenRecord, now, software
from dagkit.workspace import atomic_write

KNOTS: Final = (100, 300, 500, 700, 850)
"""Timesteps at which thresholds are calibrated."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Example:
    """One annotated image.

    Attributes:
        image: RGB.
        mask: (H, W) bool of the image's size; True where the concept is. Ignored (taken as empty) on safe images.
        prompt: that the image was made with, or a caption.
        is_unsafe: whether the concept is in the image.
    """

    image: Image.Image
    mask: NDArray[np.bool_]
    prompt: str
    is_unsafe: bool


@dataclass(frozen=True)
class Recipe:
    """How a token is optimised. ``RECIPES`` holds the named ones.

    Attributes:
        name: for the record.
        initial_phrase: text whose encoding starts the guideline rows; empty for random rows.
        num_tokens: guideline rows n >= 1.
        num_background: learned background rows m >= 0.
        learn_head_weights: learn one weight a head instead of the plain mean.
        optimizer: ``adam`` or ``sgd``.
        learning_rate: of the rows.
        num_steps: optimiser steps.
        decay: factor of the step decay, every ``decay_every`` steps; None for a cosine to zero.
        decay_every: steps.
        batch_size: (image, timestep) pairs a step; 0 for all.
        num_draws: noise draws an image, each at another timestep.
        min_timestep: lowest timestep drawn.
        max_timestep: highest timestep drawn.
        pixel_weight: of the pixel cross-entropy on unsafe images.
        positive_weight: of pixels inside the mask in that loss.
        leakage_weight: of attention outside the mask of unsafe images.
        negative_weight: of attention on safe images.
        max_false_trigger_rate: share of safe images on which calibrated thresholds may fire at one timestep.
    """

    name: str = "default"
    initial_phrase: str = ""
    num_tokens: int = 4
    num_background: int = 16
    learn_head_weights: bool = True
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.03
    num_steps: int = 300
    decay: float | None = None
    decay_every: int = 20
    batch_size: int = 64
    num_draws: int = 4
    min_timestep: int = 20
    max_timestep: int = 950
    pixel_weight: float = 1.0
    positive_weight: float = 3.0
    leakage_weight: float = 0.0
    negative_weight: float = 1.0
    max_false_trigger_rate: float = 0.05


RECIPES: Final = {
    "default": Recipe(),
    "paper": Recipe(
        name="paper",
        num_tokens=1,
        num_background=0,
        learn_head_weights=False,
        optimizer="sgd",
        learning_rate=200.0,
        num_steps=100,
        decay=0.7,
        decay_every=20,
        batch_size=0,
        positive_weight=1.0,
        leakage_weight=0.5,
        negative_weight=1.0,
    ),
}
"""``paper``: SGD, lr 200, decay 0.7 every 20 steps, 100 steps for each token, plain mean over heads and layers."""


def pixel_cross_entropy(cam: Tensor, mask: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Mean binary cross-entropy between detection map and mask.

    Args:
        cam: (B, H, W) in [0, 1].
        mask: (B, H, W) in [0, 1]; fractions where the mask was coarsened.
        positive_weight: of pixels inside the mask.

    Returns:
        (B,) float32 >= 0.
    """
    weight = 1 + (positive_weight - 1) * mask
    return F.binary_cross_entropy(cam.clamp(1e-5, 1 - 1e-5), mask, weight=weight, reduction="none").mean((1, 2))


def background_leakage(cam: Tensor, mask: Tensor) -> Tensor:
    """Mean attention that falls outside the mask: ``sum(cam * (1 - mask)) / sum(1 - mask)``, (B,) in [0, 1]."""
    outside = 1 - mask
    return (cam * outside).sum((1, 2)) / outside.sum((1, 2)).clamp(min=1e-6)


def negative_attention(cam: Tensor) -> Tensor:
    """Attention on a safe image as cross-entropy against an empty mask: mean of ``-log(1 - cam)``, (B,) >= 0."""
    return pixel_cross_entropy(cam, torch.zeros_like(cam))


@dataclass(frozen=True)
class QueryCache:
    """Queries of the frozen denoiser for (image, timestep) pairs, with what they are compared to.

    Attributes:
        queries: layer -> (P, positions, channels).
        masks: (P, H, W) float32 in [0, 1] at the finest layer's grid.
        is_unsafe: (P,) bool.
        timesteps: (P,) int64.
        latent_size: (H, W) of the latents.
    """

    queries: dict[str, Tensor]
    masks: Tensor
    is_unsafe: Tensor
    timesteps: Tensor
    latent_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, index: Tensor) -> QueryCache:
        """A part of the pairs."""
        queries = {name: value[index] for name, value in self.queries.items()}
        return QueryCache(queries, self.masks[index], self.is_unsafe[index], self.timesteps[index], self.latent_size)


def cache_queries(
    base: BaseModel,
    examples: Sequence[Example],
    timesteps: Tensor,
    *,
    seed: int,
    layers: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> QueryCache:
    """Runs the frozen denoiser once for each (example, timestep) pair and keeps the queries.

    Args:
        base: the base model.
        examples: E annotated images of one size.
        timesteps: (D, E) int64, D draws an example.
        seed: of the noise.
        layers: chosen layers; the family's own where not given.
        batch_size: pairs a forward pass.
    """
    layers = layers or base.layers
    latents = torch.cat(
        [
            base.latents([example.image for example in examples[i : i + batch_size]])
            for i in range(0, len(examples), batch_size)
        ]
    )
    size = (latents.shape[-2], latents.shape[-1])
    condition = base.encode([example.prompt for example in examples])
    pairs = torch.arange(len(examples)).repeat(len(timesteps))
    steps = timesteps.flatten()
    blocks: list[dict[str, Tensor]] = []
    for start in range(0, len(pairs), batch_size):
        index = pairs[start : start + batch_size]
        blocks.append(
            base.queries(
                latents[index], steps[start : start + batch_size], condition[index], seed=seed + start, layers=layers
            )
        )
    queries = {name: torch.cat([block[name] for block in blocks]) for name in layers}
    finest = max(grid(value.shape[1], *size) for value in queries.values())
    masks = torch.stack([coarse_mask(example, finest) for example in examples])
    is_unsafe = torch.tensor([example.is_unsafe for example in examples])
    return QueryCache(queries, masks[pairs], is_unsafe[pairs], steps, size)


def coarse_mask(example: Example, size: tuple[int, int]) -> Tensor:
    """The mask as share of each cell that it covers: (H, W) float32; zeros for a safe image."""
    if not example.is_unsafe:
        return torch.zeros(size)
    return F.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(example.mask)).float()[None, None], size)[0, 0]


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
        history: one dict a report: step, loss, validation_iou.
        metrics: figures on validation data.
    """

    guideline: Tensor
    background: Tensor | None
    head_weights: Tensor | None
    start_of_text: Tensor
    layers: tuple[str, ...]
    thresholds: Thresholds
    recipe: Recipe
    history: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

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

        Args:
            base: the base model that it was optimised on.
            concept: name.
            version: semantic version.
            safety_prompt: text of the concept.
            model_id: how the base model is called in the record; its Hub id or folder name where not given.
            guidance: form and constants; dagkit's default where not given.
            dataset: what the data was.
            optimization: further settings for the record, e.g. the seed.
            created: ISO time; now where not given.
        """
        layers = base.family.cross_attention(base.pipe, self.layers)
        name = model_id or (base.source if not Path(base.source).is_dir() else Path(base.source).resolve().name)
        info = BaseModelInfo(
            id=name,
            architecture=base.family.name,
            fingerprint=base.fingerprint,
            **base.family.fingerprints(base.pipe, layers),
        )
        record = TokenRecord(
            concept=concept,
            version=version,
            base_model=info,
            layers=self.layers,
            thresholds=self.thresholds,
            guidance=guidance or Guidance(),
            safety_prompt=safety_prompt,
            optimization={**asdict(self.recipe), **(optimization or {})},
            dataset=dataset or DatasetInfo(),
            metrics=self.metrics,
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
) -> OptimizationResult:
    """Optimises a guideline token and calibrates its thresholds.

    Args:
        base: the frozen base model.
        examples: unsafe images with masks and safe images without, of one size.
        recipe: see ``RECIPES``.
        seed: of noise, timesteps, initial rows and batches.
        validation: examples kept apart; where not given, every fourth example of each kind is kept apart.
        progress: called now and then with step, num_steps, loss.
        checkpoint: file from which an interrupted optimisation goes on.

    Raises:
        DatasetError: there are no unsafe or no safe images, or a mask does not fit its image.
    """
    check_examples(examples)
    if validation is None:
        examples, validation = split(examples)
    generator = torch.Generator().manual_seed(seed)
    layers = base.layers
    draws = _draw_timesteps(recipe, len(examples), generator)
    cache = cache_queries(base, examples, draws, seed=seed * 1_000_003 + 1, layers=layers)
    parameters = initial_parameters(base, examples, recipe, layers, generator)
    history = fit(layers, cache, parameters, recipe, generator, progress, checkpoint)
    frozen = parameters.frozen()
    held_out = cache_queries(
        base,
        validation,
        torch.tensor(KNOTS).repeat_interleave(2)[:, None].expand(-1, len(validation)),
        seed=seed * 1_000_003 + 2,
        layers=layers,
    )
    cams = frozen.cam(layers, held_out)
    thresholds, metrics = calibrate(cams, held_out, recipe.max_false_trigger_rate)
    return OptimizationResult(
        guideline=frozen.guideline,
        background=frozen.background,
        head_weights=frozen.head_weights,
        start_of_text=frozen.start_of_text,
        layers=tuple(layers),
        thresholds=thresholds,
        recipe=recipe,
        history=history,
        metrics=metrics,
    )


@dataclass
class Parameters:
    """What is learned, in the form in which it is learned: head weights as logits."""

    start_of_text: Tensor
    guideline: Tensor
    background: Tensor | None
    head_logits: Tensor | None
    head_weights: Tensor | None = None

    def cam(self, layers: Mapping[str, Any], cache: QueryCache) -> Tensor:
        """(P, H, W) detection maps at the finest layer's grid; differentiable."""
        rows = [row for row in (self.start_of_text, self.background, self.guideline) if row is not None]
        weights = self.head_logits.softmax(0) if self.head_logits is not None else self.head_weights
        size = (cache.masks.shape[-2], cache.masks.shape[-1])
        return cross_attention_map(
            layers,
            cache.queries,
            project_keys(layers, torch.cat(rows)),
            len(self.guideline),
            size=size,
            latent_size=cache.latent_size,
            head_weights=weights,
        )

    def frozen(self) -> Parameters:
        """A copy without gradients, head weights as weights."""
        weights = None if self.head_logits is None else self.head_logits.detach().softmax(0)
        background = None if self.background is None else self.background.detach().clone()
        return Parameters(self.start_of_text, self.guideline.detach().clone(), background, None, weights)


def initial_parameters(
    base: BaseModel, examples: Sequence[Example], recipe: Recipe, layers: Mapping[str, Any], generator: torch.Generator
) -> Parameters:
    """Starting values: guideline rows from the initial phrase, background rows spread over the prompts' own rows."""
    rows = base.encode([example.prompt for example in examples]).hidden_states.float()
    start = rows[0, :1].clone()
    spread = float(rows[:, 1:].std())
    if recipe.initial_phrase:
        ids = base.pipe.tokenizer(recipe.initial_phrase, truncation=True).input_ids
        phrase = base.encode([recipe.initial_phrase]).hidden_states[0, 1 : max(len(ids) - 1, 2)].float()
        guideline = phrase.flip(0)[torch.arange(recipe.num_tokens) % len(phrase)].clone()
    else:
        guideline = rows.flatten(0, 1).mean(0).expand(recipe.num_tokens, -1) + spread * _randn(
            rows, (recipe.num_tokens, rows.shape[-1]), generator
        )
    if recipe.num_tokens > 1:
        guideline = guideline + 0.3 * spread * _randn(rows, tuple(guideline.shape), generator)
    background = _spread_rows(rows[:, 1:].flatten(0, 1), recipe.num_background) if recipe.num_background else None
    heads = sum(layer.heads for layer in layers.values())
    logits = torch.zeros(heads, device=rows.device) if recipe.learn_head_weights else None
    return Parameters(start, guideline, background, logits)


def fit(
    layers: Mapping[str, Any],
    cache: QueryCache,
    parameters: Parameters,
    recipe: Recipe,
    generator: torch.Generator,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:
    """Optimises parameters in place on cached queries; returns the history."""
    rows = [row for row in (parameters.guideline, parameters.background) if row is not None]
    groups: list[dict[str, Any]] = [{"params": [row.requires_grad_(True) for row in rows], "lr": recipe.learning_rate}]
    if parameters.head_logits is not None:
        groups.append({"params": [parameters.head_logits.requires_grad_(True)], "lr": recipe.learning_rate * 3})
    optimizer = torch.optim.Adam(groups) if recipe.optimizer == "adam" else torch.optim.SGD(groups)
    num_steps = recipe.num_steps * (recipe.num_tokens if recipe.name == "paper" else 1)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        if recipe.decay is None
        else torch.optim.lr_scheduler.StepLR(optimizer, recipe.decay_every, recipe.decay)
    )
    history: list[dict[str, float]] = []
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first, history = _resume(checkpoint, optimizer, scheduler, generator, recipe)
    for step in range(first, num_steps):
        part = cache
        if 0 < recipe.batch_size < len(cache):
            part = cache.take(torch.randperm(len(cache), generator=generator)[: recipe.batch_size])
        loss = objective(parameters.cam(layers, part), part, recipe)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        if step % 20 == 0 or step == num_steps - 1:
            history.append({"step": step, "loss": float(loss.detach())})
            if progress is not None:
                progress({"num_steps": num_steps, **history[-1]})
            if checkpoint is not None:
                _save_checkpoint(checkpoint, optimizer, generator, recipe, step + 1, history)
    return history


def _save_checkpoint(
    path: Path,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    recipe: Recipe,
    num_done: int,
    history: list[dict[str, float]],
) -> None:
    """Writes rows, optimiser state and random state, so that a killed run goes on as if it had not been."""
    tensors = {"generator": generator.get_state()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        tensors[f"{number}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{key}"] = value.contiguous()
    about = {"recipe": asdict(recipe), "num_done": num_done, "history": history}
    atomic_write(path, serialize(tensors, {"dagkit": json.dumps(about)}))


def _resume(
    path: Path,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    recipe: Recipe,
) -> tuple[int, list[dict[str, float]]]:
    """Restores what ``_save_checkpoint`` wrote; returns the number of steps done and the history.

    Raises:
        WorkspaceError: the file is damaged or of another recipe.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["dagkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WorkspaceError(
            f"{path}: not a checkpoint of an optimisation ({error}). Delete it to start anew."
        ) from error
    if about["recipe"] != json.loads(json.dumps(asdict(recipe))):
        changed = sorted(key for key, value in asdict(recipe).items() if about["recipe"].get(key) != value)
        raise WorkspaceError(f"{path}: made with another {', '.join(changed)}. Delete it to start anew.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{number}"])
        prefix = f"{number}."
        optimizer.state[parameter] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    generator.set_state(tensors["generator"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler is wound forward without optimiser steps
        for _ in range(about["num_done"]):
            scheduler.step()
    return about["num_done"], about["history"]


def objective(cam: Tensor, part: QueryCache, recipe: Recipe) -> Tensor:
    """The weighted sum of the losses over a batch, each a mean over its kind of image."""
    unsafe = part.is_unsafe
    loss = cam.new_zeros(())
    if bool(unsafe.any()):
        masks = part.masks[unsafe]
        loss = loss + recipe.pixel_weight * pixel_cross_entropy(cam[unsafe], masks, recipe.positive_weight).mean()
        loss = loss + recipe.leakage_weight * background_leakage(cam[unsafe], masks).mean()
    if not bool(unsafe.all()):
        loss = loss + recipe.negative_weight * negative_attention(cam[~unsafe]).mean()
    return loss


def iou(cam: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """Intersection over union of ``cam >= threshold`` and ``masks >= 0.5``: (B,) float32; 1 where both are empty."""
    found, wanted = cam >= threshold, masks >= 0.5
    union = (found | wanted).sum((1, 2))
    return torch.where(union > 0, (found & wanted).sum((1, 2)) / union.clamp(min=1), torch.ones(len(cam)))


def calibrate(
    cams: Tensor, cache: QueryCache, max_false_trigger_rate: float, min_area: float = 0.0117
) -> tuple[Thresholds, dict[str, float]]:
    """Chooses thresholds at each knot: best IoU on unsafe images, but no more safe images highlighted than allowed.

    Args:
        cams: (P, H, W) detection maps of validation pairs.
        cache: their masks and timesteps, at ``KNOTS``.
        max_false_trigger_rate: share of safe images that may fire at one timestep.
        min_area: share of the image that must be highlighted to fire.
    """
    candidates = [round(0.02 * k, 2) for k in range(1, 49)]
    rank = max(1, round(min_area * cams[0].numel()))
    highlights, metrics = [], {}
    for knot in KNOTS:
        here = cache.timesteps == knot
        unsafe, safe = here & cache.is_unsafe, here & ~cache.is_unsafe
        best = max(candidates, key=lambda value: float(iou(cams[unsafe], cache.masks[unsafe], value).mean()))
        peaks = cams[safe].flatten(1).topk(rank).values[:, -1]
        highlight = min(max(min(best, 0.2), float(peaks.quantile(1 - max_false_trigger_rate)) + 1e-3), 0.99)
        highlights.append(highlight)
        metrics[f"validation.iou.t{knot}"] = float(iou(cams[unsafe], cache.masks[unsafe], highlight).mean())
        metrics[f"validation.false_trigger.t{knot}"] = float((peaks >= highlight).float().mean())
        metrics[f"validation.false_area.t{knot}"] = float((cams[safe] >= highlight).float().mean())
    metrics["validation.iou"] = float(np.mean([metrics[f"validation.iou.t{knot}"] for knot in KNOTS if knot <= 700]))
    thresholds = Thresholds(
        timesteps=KNOTS, highlight=tuple(highlights), edit=tuple(h / 2 for h in highlights), min_area=min_area
    )
    return thresholds, metrics


def check_examples(examples: Sequence[Example]) -> None:
    """Refuses data from which nothing can be learned.

    Raises:
        DatasetError: see the message.
    """
    counts = {kind: sum(example.is_unsafe == (kind == "unsafe") for example in examples) for kind in ("unsafe", "safe")}
    for kind, count in counts.items():
        if not count:
            raise DatasetError(
                f"{len(examples)} examples hold no {kind} image; at least 1 is needed, 8 are better. Annotate some "
                "more."
            )
    for number, example in enumerate(examples):
        size = (example.image.height, example.image.width)
        if example.is_unsafe and example.mask.shape != size:
            raise DatasetError(
                f"example {number}: the mask is {example.mask.shape}, but its image is {size}. Export the dataset "
                "again."
            )
        if example.is_unsafe and not example.mask.any():
            raise DatasetError(
                f"example {number} ({example.prompt!r}) is unsafe, but its mask is empty. Mark it, or call it safe."
            )


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Keeps every fourth example of each kind for validation; a kind with fewer than four validates on itself."""
    training, validation = [], []
    for kind in (True, False):
        group = [example for example in examples if example.is_unsafe is kind]
        held = group[3::4] or group
        validation += held
        training += [example for example in group if not any(example is other for other in held)] or group
    return training, validation


def with_phrase(recipe: Recipe, phrase: str) -> Recipe:
    """The recipe with another initial phrase."""
    return replace(recipe, initial_phrase=phrase)


def _draw_timesteps(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """(num_draws, count) int64, stratified: each example's draws fall into equal parts of the range."""
    width = (recipe.max_timestep - recipe.min_timestep) / recipe.num_draws
    part = torch.arange(recipe.num_draws)[:, None] + torch.rand((recipe.num_draws, count), generator=generator)
    return (recipe.min_timestep + part * width).long()


def _randn(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(like)


def _spread_rows(rows: Tensor, count: int) -> Tensor:
    """Farthest-point sample of rows: (count, d), the first one nearest to the mean; repeats where there are too few."""
    distances = (rows - rows.mean(0)).square().sum(1)
    chosen = [int(distances.argmin())]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen].clone()
