"""The proposer that proposes nothing: annotators start from an empty mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from dagkit.proposers import Proposal, check_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.families import BaseModel


class NoProposer:
    """Never proposes anything."""

    name = "none"
    version = "1"

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        options: Mapping[str, Any],
        base_model: BaseModel | None = None,  # noqa: ARG003
        device: str = "cpu",  # noqa: ARG003
    ) -> Self:
        """Takes no options."""
        check_options(concept, cls.name, options, ())
        return cls()

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:  # noqa: ARG002
        """An empty list."""
        return []
