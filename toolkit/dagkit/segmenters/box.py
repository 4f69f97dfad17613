"""The segmenter without a model: the box itself is the mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dagkit.segmenters import Mask, Segmenter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from dagkit.proposers import Proposal


class BoxSegmenter(Segmenter):
    """Fills every box; its score is the proposal's."""

    name = "box"
    version = "1"

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
