"""The optimisation itself: starting values, steps on cached queries, early stopping, checkpoints."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from dagkit.errors import WorkspaceError, quoted
from dagkit.models import BaseModel
from dagkit.models.sites import Sites
from dagkit.optimization.cache import Batch, QueryCache
from dagkit.optimization.data import Example
from dagkit.optimization.losses import objective
from dagkit.optimization.recipe import Recipe
from dagkit.workspace import atomic_write, open_plain

Progress = Callable[[dict[str, Any]], None]
History = list[dict[str, float]]


@dataclass
class Parameters:
    """What is learned; head weights as logits, so that they stay positive and sum to 1.

    Attributes:
        start_of_text: (1, d) float32, fixed.
        guideline: (n, d) float32.
        background: (m, d) float32 or None.
        head_logits: (heads over all layers,) float32 or None.
    """

    start_of_text: Tensor
    guideline: Tensor
    background: Tensor | None
    head_logits: Tensor | None

    @property
    def head_weights(self) -> Tensor | None:
        """(heads over all layers,) that sum to 1, or None."""
        return None if self.head_logits is None else self.head_logits.softmax(0)

    def learned(self) -> list[Tensor]:
        """The tensors that an optimiser changes."""
        return [tensor for tensor in (self.guideline, self.background, self.head_logits) if tensor is not None]

    def cam(self, sites: Sites, batch: Batch) -> Tensor:
        """(B, H, W) detection maps at the finest site's grid; differentiable."""
        rows = [row for row in (self.start_of_text, self.background, self.guideline) if row is not None]
        return sites.detection_map(
            batch.features,
            sites.project(torch.cat(rows)),
            len(self.guideline),
            size=(batch.masks.shape[-2], batch.masks.shape[-1]),
            latent_size=batch.latent_size,
            head_weights=self.head_weights,
        )

    @torch.no_grad()
    def cams(self, sites: Sites, cache: QueryCache, index: Tensor | None = None) -> Tensor:
        """(P, H, W) detection maps of all pairs, or of those at ``index``, on the CPU."""
        return torch.cat([self.cam(sites, cache.take(part)).cpu() for part in cache.parts(index, 32)])

    def copy(self) -> Parameters:
        """A detached copy."""
        background, logits = self.background, self.head_logits
        return Parameters(
            self.start_of_text,
            self.guideline.detach().clone(),
            None if background is None else background.detach().clone(),
            None if logits is None else logits.detach().clone(),
        )


def initial_parameters(
    base: BaseModel,
    examples: Sequence[Example],
    recipe: Recipe,
    sites: Sites,
    generator: torch.Generator,
) -> Parameters:
    """Starting values: guideline rows from the initial phrase, background rows spread over the prompts' own rows.

    Args:
        base: the base model.
        examples: whose prompts give the background rows.
        recipe: how many rows, and the phrase.
        sites: where to look.
        generator: of the noise that tells several guideline rows apart.
    """
    rows = base.text_rows([example.prompt for example in examples]).float()
    spread = float(rows.std())
    shape = (recipe.num_tokens, rows.shape[-1])
    noise = torch.randn(shape, generator=generator).to(rows)
    if recipe.initial_phrase:
        phrase = base.phrase_rows(recipe.initial_phrase).float()
        guideline = phrase.flip(0)[torch.arange(recipe.num_tokens) % len(phrase)]
        guideline = guideline + (0.3 * spread * noise if recipe.num_tokens > 1 else 0)
    else:
        guideline = rows.mean(0) + spread * noise
    background = _spread_rows(rows, recipe.num_background) if recipe.num_background else None
    logits = torch.zeros(sites.num_heads, device=rows.device) if recipe.learn_head_weights else None
    return Parameters(base.start_of_text().to(rows), guideline.clone(), background, logits)


def fit(
    sites: Sites,
    cache: QueryCache,
    parameters: Parameters,
    recipe: Recipe,
    generator: torch.Generator,
    *,
    index: Tensor | None = None,
    validate: Callable[[Parameters], dict[str, float]] | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> tuple[Parameters, History]:
    """Optimises on cached queries; never calls the denoiser.

    A batch that would not fit into the cache's memory is learned from in micro-batches whose gradients are summed.

    Args:
        sites: where to look.
        cache: queries, masks and kinds of all pairs.
        parameters: starting values; changed in place.
        recipe: optimiser, steps and weights.
        generator: of the batches.
        index: pairs to learn from; all where not given.
        validate: gives figures on held-out data, ``validation_loss`` among them; without it nothing stops early.
        progress: called after each report with ``step``, ``num_steps``, ``loss`` and what ``validate`` gave.
        checkpoint: file from which a killed optimisation goes on, as if it had not been.

    Returns:
        The parameters with the best validation loss (the last ones without validation), and one dict a report.

    Raises:
        WorkspaceError: the checkpoint is damaged, or of another recipe, seed or data.
    """
    pairs = torch.arange(len(cache)) if index is None else index
    state = _State(parameters, recipe, generator, cache.digest() if checkpoint else "")
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
    every = recipe.validate_every if validate and recipe.validate_every else 20
    while state.step < recipe.total_steps and not state.is_over:
        batch = _draw(pairs, recipe.batch_size, generator)
        loss = state.advance(_losses(parameters, sites, cache, batch, recipe))
        if state.step % every and state.step != recipe.total_steps:
            continue
        figures = validate(parameters) if validate and recipe.validate_every else {}
        state.report(float(loss), figures)
        if progress is not None:
            progress({"num_steps": recipe.total_steps, **state.history[-1]})
        if checkpoint is not None:
            state.save(checkpoint)
    return state.best or parameters.copy(), state.history


def _losses(parameters: Parameters, sites: Sites, cache: QueryCache, index: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """The terms, one a micro-batch, that sum to the objective on the pairs at ``index``."""

    def loss(batch: Batch) -> Tensor:  # so that nothing of a batch is kept while the next one is read
        return objective(parameters.cam(sites, batch), batch.masks, batch.is_unsafe, recipe, cache.is_unsafe[index])

    for part in cache.parts(index):
        yield loss(cache.take(part))


class _State:
    """All that a killed optimisation needs to go on."""

    def __init__(self, parameters: Parameters, recipe: Recipe, generator: torch.Generator, data: str) -> None:
        self.parameters, self.recipe, self.generator = parameters, recipe, generator
        self.identity = {**asdict(recipe), "seed": generator.initial_seed(), "data": data}
        self.step = 0
        self.history: History = []
        self.best: Parameters | None = None
        self.best_loss = math.inf
        self.num_worse = 0
        rows = [row.requires_grad_(True) for row in (parameters.guideline, parameters.background) if row is not None]
        groups: list[dict[str, Any]] = [{"params": rows, "lr": recipe.learning_rate}]
        if parameters.head_logits is not None:
            logits = parameters.head_logits.requires_grad_(True)
            groups.append({"params": [logits], "lr": 3 * recipe.learning_rate})
        self.optimizer = (torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.SGD)(groups)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(recipe.total_steps, 1))
            if recipe.decay is None
            else torch.optim.lr_scheduler.StepLR(self.optimizer, recipe.decay_every, recipe.decay)
        )

    @property
    def is_over(self) -> bool:
        """Whether validation has not improved for too long."""
        return self.num_worse > self.recipe.patience

    def advance(self, losses: Iterator[Tensor]) -> Tensor:
        """One optimiser step on the sum of some terms; returns the sum, () float32."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]
            total = total.to(loss.device) + loss.detach()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return total

    def report(self, loss: float, figures: dict[str, float]) -> None:
        """Writes history, and keeps the rows if they are the best so far."""
        self.history.append({"step": self.step, "loss": loss, **figures})
        if "validation_loss" in figures:
            if figures["validation_loss"] < self.best_loss:
                self.best, self.best_loss, self.num_worse = self.parameters.copy(), figures["validation_loss"], 0
            else:
                self.num_worse += 1

    def save(self, path: Path) -> None:
        """Writes rows, optimiser state, best rows and random state."""
        tensors = {"generator": self.generator.get_state()}
        for number, tensor in enumerate(self.parameters.learned()):
            tensors[f"row.{number}"] = tensor.detach().contiguous()
            for key, value in self.optimizer.state.get(tensor, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state.{number}.{key}"] = value.contiguous()
        for number, tensor in enumerate(self.best.learned() if self.best else []):
            tensors[f"best.{number}"] = tensor.contiguous()
        about = {
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "best_loss": None if self.best is None else self.best_loss,
            "num_worse": self.num_worse,
        }
        atomic_write(path, serialize(tensors, {"dagkit": json.dumps(about)}))

    def load(self, path: Path) -> None:
        """Restores what ``save`` wrote."""
        try:
            with open_plain(path), safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["dagkit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            changed = sorted(key for key, value in self.identity.items() if about["identity"].get(key) != value)
            if changed:
                raise WorkspaceError(f"{path}: made with another {', '.join(changed)}. Delete it to start anew.")
            self._restore(about, tensors)
        except WorkspaceError:
            raise
        except Exception as error:  # whatever a file of another shape or kind makes of the lines above
            raise WorkspaceError(
                f"{path}: not a checkpoint of an optimisation ({quoted(str(error))[1:-1]}). Delete it to start anew."
            ) from error

    def _restore(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.step, self.history, self.num_worse = about["step"], about["history"], about["num_worse"]
        for number, tensor in enumerate(self.parameters.learned()):
            tensor.data.copy_(tensors[f"row.{number}"])
            prefix = f"state.{number}."
            kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if kept:  # Adam's step counter has no axis and stays on the CPU
                self.optimizer.state[tensor] = {key: v.to(tensor.device) if v.dim() else v for key, v in kept.items()}
        if about["best_loss"] is not None:
            self.best, self.best_loss = self.parameters.copy(), about["best_loss"]
            for number, tensor in enumerate(self.best.learned()):
                tensor.copy_(tensors[f"best.{number}"])
        self.generator.set_state(tensors["generator"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule is wound forward without optimiser steps
            for _ in range(self.step):
                self.scheduler.step()


def _draw(pairs: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    if not 0 < batch_size < len(pairs):
        return pairs
    return pairs[torch.randperm(len(pairs), generator=generator)[:batch_size]]


def _spread_rows(rows: Tensor, count: int) -> Tensor:
    """Farthest-point sample of rows: (count, d), the first one nearest to the mean; repeats where there are too few."""
    chosen = [int((rows - rows.mean(0)).square().sum(1).argmin())]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen].clone()
