"""The proposer that proposes nothing: annotators start from an empty mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dagkit.proposers import Proposal, Proposer

if TYPE_CHECKING:
    from PIL import Image


class NoProposer(Proposer):
    """Never proposes anything."""

    name = "none"
    version = "1"

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """An empty list."""
        return []
