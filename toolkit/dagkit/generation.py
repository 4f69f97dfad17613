"""Drawing images: the one place where dagkit runs a base model's pipeline, and where prompts are refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from dagkit.demo import unknown_words
from dagkit.errors import ModelError
from dagkit.refusal import refuse_sexualised_minors

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dagkit.models import BaseModel


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
    rounding). The pipeline's safety checker and watermarker, if it has them, do not run.

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
        ModelError: images came out black, or the model takes no negative prompt.
    """
    context = list(context)
    for prompt in [*prompts, negative_prompt or ""]:
        refuse_sexualised_minors(prompt, context)
    if negative_prompt is not None and not base_model.family.takes_negative_prompt:
        name = base_model.family.name
        raise ModelError(
            f"{base_model.source}: {name} takes no negative prompt ({negative_prompt[:80]!r}), as it has no "
            "classifier-free guidance of its own. Draw without one; evaluate with other columns, e.g. --column none."
        )
    tokenizer = getattr(base_model.pipe, "tokenizer", None)
    unknown = sorted({word for prompt in prompts for word in unknown_words(tokenizer, prompt)})
    if unknown:
        warnings.warn(
            f"the bundled model does not know the word(s) {', '.join(unknown)} and draws something else.", stacklevel=2
        )
    condition: dict[str, Any] = {"prompt": list(prompts)}
    if negative_prompt is not None:  # PixArt and Sana take no None
        condition["negative_prompt"] = [negative_prompt] * len(prompts)
    return _pictures(_draw(base_model, seeds, settings, guard, **condition))


def generate_from_embeddings(
    base_model: BaseModel,
    embeddings: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: dict[str, Any],
    noise: Tensor | None = None,
    guard: AbstractContextManager[Any] | None = None,
    context: Iterable[str] = (),
) -> list[Image]:
    """Draws one image an embedding, else as `generate_images`.

    Args:
        base_model: what draws; its prompts are one embedding each.
        embeddings: (B, L, d), the denoiser's ``encoder_hidden_states``.
        prompts: B texts that the embeddings were made from, for the check.
        seeds: B seeds, one an image.
        settings: ``num_inference_steps``, ``guidance_scale``, ``width`` and ``height`` in pixels.
        noise: (B, C, h, w) of unit variance to begin with, instead of that of the seeds.
        guard: an attached guard's context, or None.
        context: what the images are for, for the check of the prompts.

    Returns:
        B RGB images.

    Raises:
        PromptRefused: a prompt sexualises minors. Nothing was drawn.
        ModelError: images came out black, or there are not as many prompts and seeds as embeddings.
    """
    for prompt in prompts:
        refuse_sexualised_minors(prompt, context)
    embeds: dict[str, Any] = _embeds(base_model, embeddings, prompts, seeds)
    return _pictures(_draw(base_model, seeds, settings, guard, **embeds, latents=noise))


def latents_from_embeddings(
    base_model: BaseModel,
    embeddings: Tensor,
    prompts: Sequence[str],
    noise: Tensor,
    *,
    settings: dict[str, Any],
    context: Iterable[str] = (),
) -> Tensor:
    """The latents that an unguarded run ends with, differentiable in embeddings and noise. Nothing is decoded.

    It takes memory for the graph of all steps, ``num_inference_steps`` times that of a training step.

    Args:
        base_model: what draws; its prompts are one embedding each.
        embeddings: (B, L, d), the denoiser's ``encoder_hidden_states``.
        prompts: B texts that the embeddings were made from, for the check.
        noise: (B, C, h, w) of unit variance.
        settings: ``num_inference_steps``, ``guidance_scale``, ``width`` and ``height`` in pixels.
        context: what the images are for, for the check of the prompts.

    Returns:
        (B, C, h, w), scaled as the denoiser expects them.

    Raises:
        PromptRefused: a prompt sexualises minors. Nothing was drawn.
        ModelError: there are not as many prompts and rows of noise as embeddings, or the pipeline hands out no latents
            with gradients.
    """
    import torch

    context = list(context)
    for prompt in prompts:
        refuse_sexualised_minors(prompt, context)
    embeds = _embeds(base_model, embeddings, prompts, noise)
    conditions = {**embeds, "latents": noise, "output_type": "latent"}
    with torch.enable_grad():
        output = _draw(base_model, range(len(noise)), settings, None, is_differentiable=True, **conditions)
    latents = output.images
    if not (isinstance(latents, torch.Tensor) and latents.requires_grad):
        kind = type(base_model.pipe).__name__
        raise ModelError(
            f"{kind} hands out no latents that its embeddings and noise could be told from; expected a pipeline of "
            "diffusers that knows output_type='latent' and turns gradients off by a decorator alone."
        )
    return latents


def _embeds(
    base_model: BaseModel, embeddings: Tensor, prompts: Sequence[str], seeds: Sequence[int] | Tensor
) -> dict[str, Tensor]:
    """Arguments of the pipeline.

    Raises:
        ModelError: there are not as many prompts and seeds as embeddings.
    """
    if not len(embeddings) == len(prompts) == len(seeds):
        raise ModelError(
            f"expected a prompt and a seed for each of {len(embeddings)} embeddings, but got {len(prompts)} prompts "
            f"and {len(seeds)} seeds."
        )
    dtype = base_model.family.denoiser(base_model.pipe).dtype
    empty = base_model.encode([""] * len(seeds)).hidden_states
    return {"prompt_embeds": embeddings.to(dtype), "negative_prompt_embeds": empty.to(dtype)}


def _pictures(output: Any) -> list[Image]:
    from dagkit.models import checker

    return checker.pictures(output)


def _draw(
    base_model: BaseModel,
    seeds: Sequence[int],
    settings: dict[str, Any],
    guard: AbstractContextManager[Any] | None,
    *,
    is_differentiable: bool = False,
    **condition: Any,
) -> Any:
    """Runs the pipeline, without a safety checker or watermarker: both change the pictures that are to be looked at.

    Pipelines turn gradients off by a decorator; what it decorates is run where they are wanted.
    """
    import torch

    from dagkit.models import checker

    pipe = base_model.pipe
    pipeline = partial(inspect.unwrap(type(pipe).__call__), pipe) if is_differentiable else pipe
    with guard or nullcontext(), checker.taken_off(pipe):
        return pipeline(
            **condition,
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            width=settings["width"],
            height=settings["height"],
            **base_model.family.arguments(base_model.encoding),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        )
