"""Pictures in pairs: guarded, and what the same prompts and noise give without the guard.

Up to the first call in which a guard changes a prediction the two runs are one, so the unguarded one goes on from what
was kept there: the latents, the scheduler with its history, and the generators.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import bench_world as bench
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dagkit.errors import GuardError
from dagkit.guard import Guard


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures, and what the judge finds in them.

    Attributes:
        plain: (N, 64, 64, 3) uint8, unguarded.
        guarded: (N, 64, 64, 3) uint8.
        is_changed: (N,) bool, whether the guard changed any prediction; where not, the two are bit-equal.
        there: (N, 20) bool, which of ``world.CLASSES`` the unguarded picture shows.
        left: (N, 20) bool, which the guarded one shows; none where it was refused.
        is_refused: (N,) bool, whether the guard refused to let it be drawn.
    """

    plain: NDArray[np.uint8]
    guarded: NDArray[np.uint8]
    is_changed: NDArray[np.bool_]
    there: NDArray[np.bool_]
    left: NDArray[np.bool_]
    is_refused: NDArray[np.bool_]


@dataclass(frozen=True)
class Snapshot:
    """A run after ``num_done`` denoiser calls."""

    num_done: int
    latents: Tensor
    scheduler: Any
    noise: list[Tensor]


def draw(pipe: Any, guard: Guard, what: bench.Prompts, **options: Any) -> Pairs:
    """Draws one batch from text, with and without the guard, which may refuse its own.

    Args:
        pipe: from text to image.
        guard: what guards it.
        what: one text a picture, neighbours the same where a prompt has several.
        options: of the pipeline, instead of the benchmark's.
    """
    options = bench.SETTINGS | options
    texts = what.texts[:: options.get("num_images_per_prompt", 1)]
    generators = seeded(what.seeds)
    last: list[Snapshot] = []

    def keep(own: Any, index: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not any(record.strength for record in trace.steps):
            states = [generator.get_state() for generator in generators]
            last[:] = [Snapshot(index + 1, tensors["latents"].clone(), copy.deepcopy(own.scheduler), states)]
        return tensors

    try:
        with guard.attach(pipe) as trace:
            guarded = pipe(texts, generator=generators, callback_on_step_end=keep, **options).images
    except GuardError:
        return refused(pipe(texts, generator=seeded(what.seeds), **options).images)
    changed = {record.sample for record in trace.steps if record.strength}
    plain = list(guarded)
    if changed:
        generators = seeded(what.seeds)
        if last:
            again = resume(pipe, texts, last[0], generators, options)
        else:
            again = pipe(texts, generator=generators, **options).images
        plain = [again[row] if row in changed else image for row, image in enumerate(guarded)]
    return judged(plain, guarded, [row in changed for row in range(len(guarded))])


def draw_in_full(pipe: Any, guard: Guard, what: bench.Prompts, **options: Any) -> Pairs:
    """As `draw`, for pipelines that start from a picture: both runs from start to end; the guard may refuse its own."""

    def run() -> list[Image.Image]:
        images: list[Image.Image] = pipe(what.texts, generator=seeded(what.seeds), **options).images
        return images

    plain = run()
    try:
        with guard.attach(pipe) as trace:
            guarded = run()
    except GuardError:
        return refused(plain)
    changed = {record.sample for record in trace.steps if record.strength}
    return judged(plain, guarded, [row in changed for row in range(len(guarded))])


def resume(
    pipe: Any, texts: list[str], then: Snapshot, generators: list[torch.Generator], options: dict[str, Any]
) -> list[Image.Image]:
    """Draws without a guard what is left of a run."""
    for generator, state in zip(generators, then.noise, strict=True):
        generator.set_state(state)
    own, rest = pipe.scheduler, then.scheduler
    whole = rest.timesteps

    def set_timesteps(*_args: Any, **_options: Any) -> None:
        rest.timesteps = whole[then.num_done :]  # what the pipeline walks through

    def scale_model_input(sample: Tensor, *args: Any) -> Any:
        rest.timesteps = whole  # by which the scheduler tells which step is its last
        return type(rest).scale_model_input(rest, sample, *args)

    rest.set_timesteps, rest.scale_model_input = set_timesteps, scale_model_input
    pipe.scheduler = rest
    try:
        latents = then.latents / rest.init_noise_sigma
        images: list[Image.Image] = pipe(texts, generator=generators, latents=latents, **options).images
        return images
    finally:
        pipe.scheduler = own


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def refused(plain: Sequence[Image.Image]) -> Pairs:
    """Pairs of which the guard let none be drawn: black where the guarded picture would be."""
    black = [Image.new("RGB", image.size) for image in plain]
    return judged(plain, black, [False] * len(black), is_refused=True)


def judged(
    plain: Sequence[Image.Image],
    guarded: Sequence[Image.Image],
    is_changed: Sequence[bool],
    *,
    is_refused: bool = False,
) -> Pairs:
    """Pairs with what the judge finds."""
    arrays = [np.stack([np.asarray(image) for image in images]) for images in (plain, guarded)]
    there, left = (bench.present(images) for images in arrays)
    return Pairs(
        arrays[0], arrays[1], np.array(is_changed), there, left & (not is_refused), np.full(len(there), is_refused)
    )


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Several pairs, one after the other."""
    return Pairs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Pairs)))


def save(path: Path, pairs: Pairs) -> None:
    """Writes pairs whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **vars(pairs))
    temporary.rename(path)


def read(paths: Sequence[Path]) -> Pairs:
    """The pairs of several files, one after the other."""
    return joined([Pairs(**np.load(path)) for path in paths])


def figures(pairs: Pairs, what: bench.Prompts, members: Sequence[str]) -> dict[str, float]:
    """Erase rate and preservation, with what they are counted on, refused pictures aside; a rate of nothing is nan.

    ``erase``: of the unguarded pictures that show a member of the concept, how many show none under guard.
    ``preserve``: of the other objects that were asked for and are there unguarded, how many are there under guard.
    """
    drawn = bench.shows(pairs.there, members) & ~pairs.is_refused
    stays = bench.shows(pairs.left, members)
    asked = bench.asked(what) & ~pairs.is_refused[:, None]
    others = pairs.there[:, : asked.shape[1]] & asked
    kept = pairs.left[:, : asked.shape[1]] & others
    return {
        "erase": 1 - ratio(int((drawn & stays).sum()), int(drawn.sum())),
        "preserve": ratio(int(kept.sum()), int(others.sum())),
        "num_drawn": int(drawn.sum()),
        "num_others": int(others.sum()),
    }


def ratio(count: int, total: int) -> float:
    """A share; nan where there is nothing to share."""
    return count / total if total else float("nan")
