"""A filter that every token brings along: it looks at the finished picture once more, whatever it was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from dagkit import guidance
from dagkit.models.sites import Detector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken

SECOND_LOOK: Final = "second_look"
"""What the filter is called in results."""

LEVELS: Final = (0.3, 0.2)
"""Noise levels at which a picture is looked at: at higher ones the empty prompt shows less of it (docs/attacks.md)."""


class SecondLook:
    """Noises finished pictures a little and looks for the concept under an empty prompt.

    An attack on the prompt or on the noise that a picture began with is not there any more: what is left is the
    picture. It costs a denoiser row a level, without guidance.

    Args:
        base_model: the token's.
        token: what looks.
        levels: noise levels in [0, 1].
        seed: of the noise.
    """

    def __init__(
        self, base_model: BaseModel, token: GuidelineToken, *, levels: Sequence[float] = LEVELS, seed: int = 0
    ) -> None:
        self._base_model, self._token, self._levels, self._seed = base_model, token, tuple(levels), seed
        sites = base_model.family.sites(base_model.pipe, token.record.layers)
        self._detector = Detector(sites, token.sequence, token.num_tokens, token.head_weights)

    def __call__(self, images: Sequence[Image]) -> list[bool]:
        """Whether the token is sure about each image at any level, by its own threshold of certainty."""
        return [one >= 1 for one in self.scores(images)]

    @torch.no_grad()
    def scores(self, images: Sequence[Image]) -> list[float]:
        """The largest score over the levels, relative to the threshold of certainty: found from 1 on."""
        base, limits = self._base_model, self._token.record.thresholds
        found = torch.zeros(len(images))
        for number, level in enumerate(self._levels):
            latents = base.latents(images)
            levels = torch.full((len(images),), level, dtype=torch.float64)
            condition = base.encode([""] * len(images))
            features = base.features(latents, levels, condition, seed=self._seed + number, sites=self._detector.sites)
            cam = self._detector(features, (latents.shape[-2], latents.shape[-1]))
            scores = guidance.score(cam, limits.min_area).cpu() / max(limits.certain_at(level), 1e-3)
            found = torch.maximum(found, scores)
        return found.tolist()
