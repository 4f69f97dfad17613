"""Boxes from the base model's own cross-attention: works for every concept and needs no further model.

The image is noised a little and shown to the denoiser, which need not draw it but only look at it. At each
cross-attention layer the concept's words compete for every pixel with the start-of-text row and with the other words of
the image's prompt; each word is encoded by itself, because a text encoder mixes a prompt's words into each other. Heads
differ a lot in how well they see a thing: those with the larger contrast between peak and median count more (see
`contrast_map`). Where a prompt names some of a label's words only those are looked up, because each of the others may
find something that merely resembles it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dagkit.concept import Label, OneOrMoreTexts, PluginOptions, Share
from dagkit.models.base import Seen
from dagkit.proposers import Proposal, Proposer, require_base_model, suppress_overlaps
from dagkit.proposers.regions import find_regions

if TYPE_CHECKING:
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel
    from dagkit.models.sites import Sites

LEVELS: Final = (0.1, 0.2, 0.3)
"""Little noise: what is in the image is decided, and the denoiser still has to look at it."""

MAX_COMPETITORS: Final = 24

_STOP_WORDS: Final = frozenset(
    "a an the and or of in on at by to for from with without into onto over under near is are was were be its his her "  # noqa: SIM905
    "their this that as it he she they very one two three photo photograph picture image painting drawing".split()
)


class AttentionOptions(PluginOptions):
    """As the arguments of `AttentionProposer`."""

    words: dict[Label, OneOrMoreTexts] = Field({})
    """Labels, positive or negative, with words of their own; else the concept's words mean its first positive label."""
    threshold: Share = 0.35
    """Share of a map's peak above which a pixel belongs to a region."""
    min_peak: Share = 0.7
    """A second region counts if its peak reaches this share of the map's."""
    min_score: Share = 0.05
    """Proposals with a smaller score are dropped."""


class AttentionProposer(Proposer):
    """Looks up words in the base model's cross-attention.

    Args:
        base_model: the model that drew the images.
        words: label -> words that mean it.
        positive: which of these labels are positive.
        options: thresholds; its words do not matter here.
    """

    name = "attention"
    Options = AttentionOptions
    needs_base_model = True
    version = "2"

    def __init__(
        self,
        base_model: BaseModel,
        words: Mapping[str, Sequence[str]],
        positive: frozenset[str],
        options: AttentionOptions,
    ) -> None:
        self._base_model, self._words, self._positive = base_model, {k: list(v) for k, v in words.items()}, positive
        self._options = options
        self._encode = lru_cache(maxsize=4096)(self._encode_word)

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,
        device: str = "cpu",
        *,
        options: AttentionOptions | None = None,
    ) -> Self:
        """Looks for ``concept.words`` as the first positive label, unless the options give words for such a label."""
        options = options or cls.Options()
        words: dict[str, list[str]] = dict(options.words)
        if not any(label in concept.labels.positive for label in words):
            words = {concept.labels.positive[0]: list(concept.words), **words}
        positive = frozenset(label for label in words if concept.labels.is_positive(label))
        return cls(require_base_model(concept, cls.name, base_model), words, positive, options)

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """Boxes and peaks of every label's map; the score is the peak's height."""
        found: list[Proposal] = []
        for label, heat in self.heat_maps(image, prompt, seed).items():
            regions = find_regions(heat, threshold=self._options.threshold, min_peak=self._options.min_peak)
            found += [
                Proposal(region.box, min(region.peak, 1.0), label, label in self._positive, region.point)
                for region in regions
                if region.peak >= self._options.min_score
            ]
        return suppress_overlaps(found)

    @torch.no_grad()
    def heat_maps(self, image: Image.Image, prompt: str, seed: int) -> dict[str, NDArray[np.float32]]:
        """Label -> (H, W) float32 in [0, 1], as large as the image: the strongest of its words at each pixel."""
        model = self._base_model
        latents = model.latents([fit_to_model(image, model)]).expand(len(LEVELS), -1, -1, -1)
        condition = model.encode([prompt])[[0] * len(LEVELS)]
        sites = model.sites
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        features = model.features(latents, levels, condition, seed=seed, sites=sites)
        noised, timesteps = model.noised(latents, levels, seed)
        seen = Seen(noised[len(LEVELS) // 2][None], timesteps[len(LEVELS) // 2])

        listed = {label: _named(words, prompt) for label, words in self._words.items()}
        words = [word for ones in listed.values() for word in ones]
        sequence = self.word_sequence(words, prompt, seen)
        size = (latents.shape[-2], latents.shape[-1])
        shares = word_shares(sites, features, sequence, len(words))
        grids = [
            share.mean(1).reshape(len(share), -1, *site.grid(size))
            for share, site in zip(shares, sites.values(), strict=True)
        ]
        word_maps = contrast_map(grids, size)
        maps = F.interpolate(word_maps[:, None], (image.height, image.width), mode="bicubic")[:, 0].clamp(0, 1)
        owners = [label for label, ones in listed.items() for _ in ones]
        return {
            label: maps[[i for i, owner in enumerate(owners) if owner == label]].amax(0).cpu().numpy()
            for label in self._words
        }

    def word_sequence(self, words: Sequence[str], prompt: str, seen: Seen | None = None) -> Tensor:
        """(1 + W + C, d) rows: start of text, the W words, and C other words of the prompt that compete with them."""
        taken = {part for word in words for part in _content_words(word)}
        others = [word for word in _content_words(prompt) if word not in taken][:MAX_COMPETITORS]
        seen = seen if self._base_model.family.text_sees_image else None
        encode = self._encode if seen is None else partial(self._encode_word, seen=seen)
        rows = [encode(word) for word in (*words, *others)]
        return torch.stack([self._base_model.start_of_text(seen)[0], *rows])

    def _encode_word(self, word: str, seen: Seen | None = None) -> Tensor:
        """(d,) row of a word or phrase: its last token, which in a causal text encoder has seen all before it."""
        return self._base_model.phrase_rows(f"a {word}", seen)[-1]


def fit_to_model(image: Image.Image, base_model: BaseModel) -> Image.Image:
    """RGB, resized to the next sides that every level of the model's autoencoder and denoiser can halve exactly."""
    step = base_model.family.side_multiple(base_model.pipe)
    width, height = (max(step, round(side / step) * step) for side in image.size)
    rgb = image.convert("RGB")
    return rgb if rgb.size == (width, height) else rgb.resize((width, height))


def word_shares(sites: Sites, features: Mapping[str, Tensor], sequence: Tensor, num_words: int) -> list[Tensor]:
    """Each word's share of attention at each site.

    Args:
        sites: where to look.
        features: name -> (B, h*w, channels).
        sequence: (L, d); row 0 is the start of text, rows 1 to ``num_words`` the words.
        num_words: W.

    Returns:
        One tensor a site, (W, B, heads, h*w) float32 in [0, 1].
    """
    keys = sites.project(sequence)
    found = [site.shares(features[name], keys[name]) for name, site in sites.items()]
    return [shares[..., 1 : num_words + 1].movedim(-1, 0) for shares in found]


def contrast_map(shares: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of all heads, each above its own median and weighted by its own peak above it.

    A head that is flat, or that looks at everything, so counts for little; no head is chosen by hand.

    Args:
        shares: one tensor a layer, (W, heads, h, w) in [0, 1].
        size: (H, W) of the result.

    Returns:
        (W, H, W) float32 in [0, 1].
    """
    total, weight = torch.zeros(()), torch.zeros(())
    for share in shares:
        floor = share.flatten(2).median(-1).values[..., None, None]
        above = (share - floor).clamp(min=0)
        peak = above.amax((-2, -1), keepdim=True)
        pooled = (above * peak).sum(1)
        total = total.to(pooled) + F.interpolate(pooled[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        weight = weight.to(pooled) + peak.sum(1)
    return total / weight.clamp(min=1e-6)


def _named(words: Sequence[str], prompt: str) -> Sequence[str]:
    """Those of the words that a prompt names; all of them where it names none."""
    said = set(_content_words(prompt))
    return [word for word in words if (parts := _content_words(word)) and said.issuperset(parts)] or words


def _content_words(text: str) -> list[str]:
    words = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text.lower())
    return [word for word in dict.fromkeys(words) if word not in _STOP_WORDS]
