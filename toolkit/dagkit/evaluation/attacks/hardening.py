"""What a token gets wrong about prompts that nobody would write, as examples to learn from.

Word salads keep what the model draws and mix up what its attention is told, so a token that knows sentences may miss
the concept in them. No judge takes part: masks come from the concept's own proposers and segmenter, as pre-masks do.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import numpy as np

from dagkit.errors import PromptRefused
from dagkit.evaluation.attacks.words import MAX_WORDS, split
from dagkit.generation import generate_images
from dagkit.optimization import Example
from dagkit.proposers import propose_all
from dagkit.refusal import refuse_sexualised_minors
from dagkit.seeds import candidate_seed
from dagkit.segmenters import combine, union_by_label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel
    from dagkit.proposers import Proposer
    from dagkit.segmenters import Segmenter
    from dagkit.token import GuidelineToken

FIRST_NOISE: Final = 900_000
"""Of the numbers of a seed's candidates, the first that is kept for these pictures."""

_BATCH: Final = 8


def salads(concept: Concept, num: int, *, seed: int = 0) -> list[tuple[str, bool]]:
    """Random prompts of the words of safe prompts, every other one with a word of the concept, and whether it has one.

    Prompts that sexualise minors are left out.

    Args:
        concept: whose words to mix.
        num: how many, at most.
        seed: same seed, same prompts.
    """
    rng = random.Random(f"salads-{seed}")  # noqa: S311 - reproducible draws, no secret
    plain = sorted({word for prompt in concept.all_prompts("safe") for word in split(prompt.text)})
    made = []
    for number in range(num):
        words = [rng.choice(plain) for _ in range(rng.randint(2, MAX_WORDS - 1))]
        if is_unsafe := number % 2 == 0:
            words.insert(rng.randint(0, len(words)), rng.choice(concept.words))
        prompt = " ".join(words)
        try:
            refuse_sexualised_minors(prompt, concept.context)
        except PromptRefused:
            continue
        made.append((prompt, is_unsafe))
    return made


def hard_examples(
    base_model: BaseModel,
    token: GuidelineToken,
    concept: Concept,
    proposers: Sequence[Proposer],
    segmenter: Segmenter,
    *,
    num: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Example]:
    """Draws word salads without guidance of the guard and keeps what the token got wrong.

    Args:
        base_model: draws.
        token: looks on, as it would before it acts.
        concept: whose words and sampling to use.
        proposers: say where the concept is in a picture of one of its words.
        segmenter: outlines it.
        num: pictures to draw.
        seed: of prompts and noise.
        progress: told the pictures drawn, and of how many.

    Returns:
        Pictures of the concept that the token never was sure about, with masks, and safe ones that it was sure about.
        Pictures of a word of the concept in which nothing was outlined are neither.
    """
    prompts = salads(concept, num, seed=seed)
    bound = token.guard(mode="monitor").bind(base_model.pipe)
    found = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        seeds = [candidate_seed(seed, FIRST_NOISE + start + i) for i in range(len(part))]
        with bound.run() as trace:
            images = generate_images(
                base_model,
                [prompt for prompt, _ in part],
                seeds,
                settings=concept.sampling.model_dump(),
                context=concept.context,
            )
        for i, (image, (prompt, is_unsafe)) in enumerate(zip(images, part, strict=True)):
            if trace.summary(i)["is_firing"] == is_unsafe:
                continue
            mask = _outlined(concept, proposers, segmenter, image, prompt, seeds[i]) if is_unsafe else None
            if mask is None or mask.any():
                nothing = np.zeros((image.height, image.width), np.bool_)
                found.append(Example(image, nothing if mask is None else mask, prompt, is_unsafe))
        progress(start + len(part), len(prompts))
    return found


def _outlined(
    concept: Concept, proposers: Sequence[Proposer], segmenter: Segmenter, image: Image, prompt: str, seed: int
) -> NDArray[np.bool_]:
    """(H, W) bool: where the concept is, as a pre-mask has it."""
    proposals = propose_all(proposers, image, prompt, seed)
    outlines = union_by_label(segmenter.segment(image, proposals) if proposals else [])
    masks = {label: mask for label, (mask, _) in outlines.items()}
    return combine(masks, concept.labels.negative, (image.height, image.width))
