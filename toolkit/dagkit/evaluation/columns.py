"""Columns of an evaluation: ways of drawing the same prompts from the same noise."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dagkit.generation import generate_images

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from dagkit.evaluation.prompts import EvalPrompt
    from dagkit.guard import BoundGuard, PipelineGuard
    from dagkit.models import BaseModel


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image of one column.

    Attributes:
        image: RGB.
        trace: what the guard did: lists ``step``, ``timestep``, ``is_firing``, ``score`` and ``area`` with an entry a
            step; empty for a column without a guard.
        maps: (steps, h, w) float32 in [0, 1], the detection map of each step, or ``None``.
        denoiser_rows: latents that went through the denoiser for it, the mean over its batch; 2 a step without a guard.
    """

    image: Image
    trace: dict[str, list[Any]] = field(default_factory=dict)
    maps: NDArray[np.float32] | None = None
    denoiser_rows: float | None = None


class Column(Protocol):
    """A way of drawing prompts."""

    @property
    def name(self) -> str:
        """Unique, lower case: it names a folder."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides how the images come out; JSON-serialisable."""
        ...

    def draw(self, prompts: Sequence[EvalPrompt]) -> list[Drawn]:
        """One image a prompt, in order, each from noise of the prompt's own seed."""
        ...


@dataclass(frozen=True)
class PipelineColumn:
    """Draws with a base model, plain, with a negative prompt, or under a guard.

    Attributes:
        name: of the column.
        base_model: what draws.
        sampling: ``num_inference_steps``, ``guidance_scale``, ``width`` and ``height`` in pixels.
        settings: recorded beside the figures; must tell this column from all others.
        negative_prompt: what to steer away from, or ``None``.
        guard: guards the pipeline while it draws, or ``None``.
        context: what the images are for (`Concept.context`), for the check of the prompts.
    """

    name: str
    base_model: BaseModel
    sampling: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    guard: PipelineGuard | None = None
    context: Sequence[str] = ()

    @cached_property
    def bound(self) -> BoundGuard | None:
        """The guard, checked against the pipeline when it is first asked for: no part of what a draw costs.

        Raises:
            GuardError: it cannot guard the pipeline.
        """
        return None if self.guard is None else self.guard.bind(self.base_model.pipe)

    def draw(self, prompts: Sequence[EvalPrompt]) -> list[Drawn]:
        """One image a prompt, in order; noise is drawn on the CPU, so that it is the same on every device."""
        guarded = nullcontext() if self.bound is None else self.bound.run()
        with guarded as trace, _counted_rows(self.base_model) as rows:
            images = generate_images(
                self.base_model,
                [prompt.text for prompt in prompts],
                [prompt.seed for prompt in prompts],
                settings=self.sampling,
                negative_prompt=self.negative_prompt,
                context=self.context,
            )
        return [
            _drawn(image.convert("RGB"), trace, index, sum(rows) / len(prompts)) for index, image in enumerate(images)
        ]


@contextmanager
def _counted_rows(base_model: BaseModel) -> Iterator[list[int]]:
    """Lists the batch size of every forward pass, those of a guard included, which call ``forward`` past all hooks.

    What an offloading or compiling library has put on the module itself is there again afterwards.
    """
    family, pipe = base_model.family, base_model.pipe
    denoiser, sample = family.denoiser(pipe), family.calls(pipe).names.sample
    rows: list[int] = []
    original, is_patched = denoiser.forward, "forward" in vars(denoiser)

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(args[0] if args else kwargs[sample]))
        return original(*args, **kwargs)

    denoiser.forward = forward
    try:
        yield rows
    finally:
        if vars(denoiser).get("forward") is forward:  # else offloading has renewed its own patch meanwhile
            if is_patched:
                denoiser.forward = original
            else:
                del denoiser.forward


def _drawn(image: Image, trace: Any, index: int, denoiser_rows: float) -> Drawn:
    records = [record for record in getattr(trace, "steps", ()) if record.sample == index]
    if not records:
        return Drawn(image, denoiser_rows=denoiser_rows)
    steps: dict[str, list[Any]] = {
        "step": [int(record.step) for record in records],
        "timestep": [round(float(record.timestep), 3) for record in records],
        "is_firing": [bool(record.is_firing) for record in records],
        "score": [round(float(record.score), 4) for record in records],
        "area": [round(float(record.area), 4) for record in records],
    }
    kept = getattr(trace, "maps", None) or {}
    maps = [np.asarray(kept[key][index].float().cpu(), np.float32) for key in sorted(kept)]
    return Drawn(image, steps, np.stack(maps) if maps else None, denoiser_rows)
