"""A guideline token proposes: the second round of annotation is easier than the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dagkit.concept import Label, PluginOptions, Text
from dagkit.errors import ConceptError, TokenError
from dagkit.models.sites import Detector
from dagkit.models.sketch import mismatch
from dagkit.proposers import Proposal, Proposer, require_base_model
from dagkit.proposers.attention import fit_to_model
from dagkit.proposers.regions import find_regions
from dagkit.registry import load_token

if TYPE_CHECKING:
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken

LEVELS: Final = (0.1, 0.2, 0.3, 0.4)


class TokenOptions(PluginOptions):
    """Which token, and what its regions are called."""

    token: Text
    """A folder, ``name@version`` or URL, e.g. weapon@1.0.0."""
    label: Label | None = None
    """A label of the concept; by default its first positive one."""


class TokenProposer(Proposer):
    """Looks at images through the base model's eyes, with an optimised guideline token.

    Args:
        base_model: the model that drew the images; the token must have been made for it.
        token: what to look for.
        label: what its regions are called.
        is_positive: whether that is a positive label.

    Raises:
        TokenError: the token was made for another model, or does not say for which.
    """

    name = "token"
    Options = TokenOptions
    needs_base_model = True

    def __init__(self, base_model: BaseModel, token: GuidelineToken, label: str, *, is_positive: bool = True) -> None:
        self._base_model, self._token, self._label, self._is_positive = base_model, token, label, is_positive
        sites = base_model.family.sites(base_model.pipe, token.record.layers)
        self._detector = Detector(sites, token.sequence, token.num_tokens, token.head_weights)
        try:
            other = mismatch(token.record.base_model, base_model.family.fingerprints(base_model.pipe, sites))
        except ValueError as error:
            raise TokenError(f"{token.name}: {error}. Get the token again.") from error
        if other is not None:
            raise TokenError(
                f"{token.name} was made for {token.record.base_model.id}, and its {other.part} is not that of "
                f"{base_model.source}. Propose with a token for this model, or with 'attention'."
            )
        self.version = f"{token.name}-1"

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,
        device: str = "cpu",
        *,
        options: TokenOptions | None = None,
    ) -> Self:
        """Loads the token of the options, which must name one."""
        base_model = require_base_model(concept, cls.name, base_model)
        if options is None:
            raise ConceptError(
                f"concept {concept.name!r}: the proposer 'token' needs the option token, e.g. "
                f"{{name: token, token: {concept.name}@1.0.0}}."
            )
        label = options.label or concept.labels.positive[0]
        token = load_token(options.token)
        return cls(base_model, token, label, is_positive=concept.labels.is_positive(label))

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Regions in which the detection map reaches the token's highlight threshold; the score is the map's peak."""
        heat, highlight = self.heat_map(image, prompt, seed), self.highlight
        peak = float(heat.max())
        if peak < highlight or peak <= 0:
            return []
        regions = find_regions(heat, threshold=max(highlight / peak, 1e-6), min_peak=0.0)
        return [Proposal(r.box, min(r.peak, 1.0), self._label, self._is_positive, r.point) for r in regions]

    @property
    def highlight(self) -> float:
        """The token's highlight threshold, mean over `LEVELS`, in [0, 1]."""
        return float(np.mean([self._token.record.thresholds.at(level)[1] for level in LEVELS]))

    def region(self, image: Image.Image, prompt: str, seed: int) -> NDArray[np.bool_]:
        """(H, W) bool, as large as the image: where the detection map reaches the highlight threshold."""
        region: NDArray[np.bool_] = self.heat_map(image, prompt, seed) >= self.highlight
        return region

    @torch.no_grad()
    def heat_map(self, image: Image.Image, prompt: str, seed: int) -> NDArray[np.float32]:
        """(H, W) float32 in [0, 1], as large as the image: the detection map, mean over `LEVELS`."""
        model = self._base_model
        latents = model.latents([fit_to_model(image, model)]).expand(len(LEVELS), -1, -1, -1)
        condition = model.encode([prompt])[[0] * len(LEVELS)]
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        features = model.features(latents, levels, condition, seed=seed, sites=self._detector.sites)
        cam = self._detector(features, (latents.shape[-2], latents.shape[-1]))
        heat = F.interpolate(cam.mean(0)[None, None], (image.height, image.width), mode="bicubic")[0, 0].clamp(0, 1)
        array: NDArray[np.float32] = heat.cpu().numpy()
        return array
