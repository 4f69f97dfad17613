"""Drawing images: the one place where dagkit runs a base model's pipeline, and where prompts are refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from dagkit.demo import unknown_words
from dagkit.prompts import refuse_sexualised_minors

if TYPE_CHECKING:
    from PIL.Image import Image

    from dagkit.families import BaseModel


def generate_images(
    base_model: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: dict[str, Any],
    negative_prompt: str | None = None,
    guard: AbstractContextManager[Any] | None = None,
    context: Iterable[str] = (),
) -> list[Image]:
    """Draws one image a prompt.

    Every image has a random generator of its own, so that it does not depend on what else is in its batch (up to
    rounding).

    Args:
        base_model: what draws.
        prompts: B texts.
        seeds: B seeds, one an image.
        settings: ``num_inference_steps``, ``guidance_scale``, ``width`` and ``height`` in pixels.
        negative_prompt: used for all images, or None.
        guard: an attached guard's context (``guard.attach(pipe)``), or None to draw unguarded.
        context: what the images are for (``Concept.context``), for the check of the prompts.

    Returns:
        B RGB images.

    Raises:
        PromptRefused: a prompt sexualises minors. Nothing was drawn.
    """
    import torch

    context = list(context)
    for prompt in [*prompts, negative_prompt or ""]:
        refuse_sexualised_minors(prompt, context)
    tokenizer = getattr(base_model.pipe, "tokenizer", None)
    unknown = sorted({word for prompt in prompts for word in unknown_words(tokenizer, prompt)})
    if unknown:
        warnings.warn(
            f"the bundled model does not know the word(s) {', '.join(unknown)} and draws something else.", stacklevel=2
        )
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with guard or nullcontext():
        output = base_model.pipe(
            list(prompts),
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            width=settings["width"],
            height=settings["height"],
            generator=generators,
        )
    return list(output.images)
