"""How a token is optimised: named recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from dagkit.token import Guidance, Thresholds


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
        num_steps: optimiser steps at most (the paper's recipe: for each token).
        decay: factor of the step decay, every ``decay_every`` steps; None for a cosine to zero.
        decay_every: steps.
        batch_size: (image, noise level) pairs a step; 0 for all.
        num_draws: noise draws an image, each at another noise level.
        min_level: lowest noise level drawn, in [0, 1].
        max_level: highest noise level drawn.
        pixel_weight: of the pixel cross-entropy on unsafe images.
        positive_weight: of pixels inside the mask in that loss.
        leakage_weight: of attention outside the mask of unsafe images.
        negative_weight: of attention on safe images.
        recognition_weight: of telling unsafe from safe images by the guard's own score.
        validate_every: steps between validations; the rows of the best one are kept. 0: none, the last rows are kept.
        patience: validations without a better loss after which the optimisation stops.
        max_false_trigger_rate: share of safe images on which the calibrated guard may act at any noise level.
        cache_dtype: in which queries are kept: ``float32``, ``float16`` or ``bfloat16``.
        memory_bytes: for queries: half for those that are kept between steps (what is more goes to a file on disk),
            half for the micro-batch that is being learned from.
    """

    name: str = "default"
    initial_phrase: str = ""
    num_tokens: int = 4
    num_background: int = 16
    learn_head_weights: bool = True
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.05
    num_steps: int = 480
    decay: float | None = None
    decay_every: int = 20
    batch_size: int = 48
    num_draws: int = 4
    min_level: float = 0.02
    max_level: float = 0.95
    pixel_weight: float = 1.0
    positive_weight: float = 3.0
    leakage_weight: float = 0.0
    negative_weight: float = 1.0
    recognition_weight: float = 0.2
    validate_every: int = 40
    patience: int = 2
    max_false_trigger_rate: float = 0.05
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    memory_bytes: int = 2 << 30

    @property
    def total_steps(self) -> int:
        """Optimiser steps at most."""
        return self.num_steps * (self.num_tokens if self.name == "paper" else 1)


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
        recognition_weight=0.0,
        validate_every=0,
    ),
}
"""``paper``: SGD, lr 200, decay 0.7 every 20 steps, 100 steps for each token, plain mean over heads and layers."""

PAPERS_GUIDANCE: Final = Guidance(form="paper", strength=1.0, insistence=0.0, dilation=0, memory=0.0, reuse_steps=1)
"""How a token of the recipe ``paper`` guides."""

PAPERS_CONSTANTS: Final = Thresholds(highlight=(0.5,), edit=(0.01,), max_area=0.8)
"""The paper's thresholds, the same at all noise levels."""
