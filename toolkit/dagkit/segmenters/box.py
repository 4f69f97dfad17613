"""The segmenter without a model: the box itself is the mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from dagkit.proposers import check_options
from dagkit.segmenters import Mask

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.proposers import Proposal


class BoxSegmenter:
    """Fills every box; its score is the proposal's."""

    name = "box"
    option_names = ()
    version = "1"

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        device: str = "cpu",  # noqa: ARG003
        checkpoint: Path | None = None,  # noqa: ARG003
    ) -> Self:
        """Takes no options."""
        check_options(concept, cls.name, concept.segmenter.options, cls.option_names)
        return cls()

    def segment(self, image: Image.Image, proposals: Sequence[Proposal]) -> list[Mask]:
        """One filled box a proposal: pixels whose centres lie inside."""
        x, y = np.arange(image.width) + 0.5, (np.arange(image.height) + 0.5)[:, None]
        return [
            Mask(
                (x >= p.box[0]) & (x < p.box[2]) & (y >= p.box[1]) & (y < p.box[3]),
                p.score,
                p.label,
                p.is_positive,
                p.box,
            )
            for p in proposals
        ]
