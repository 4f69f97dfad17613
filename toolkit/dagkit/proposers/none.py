"""The proposer that proposes nothing: annotators start from an empty mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from dagkit.proposers import Proposal, check_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel


class NoProposer:
    """Never proposes anything."""

    name = "none"
    option_names = ()
    needs_base_model = False
    version = "1"

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        base_model: BaseModel | None = None,  # noqa: ARG003
        device: str = "cpu",  # noqa: ARG003
        *,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Takes no options."""
        check_options(concept, cls.name, options or {}, cls.option_names)
        return cls()

    def propose(self, image: Image.Image, prompt: str, seed: int) -> list[Proposal]:
        """An empty list."""
        return []
