"""dagkit as a technique of eval-unlearn (on PyPI), which finds it by its entry point under the name ``dagkit``.

{"technique": {"name": "dagkit", "config": {"token": "nudity@1.0.0", "erase_concept": "nudity"}}, "metrics": [...]}
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dagkit import demo, registry
from dagkit.concept import load_concept
from dagkit.errors import ConceptError
from dagkit.generation import generate_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

_SAMPLING = ("num_inference_steps", "guidance_scale", "width", "height")


class DagkitTechnique:
    """Draws under a guideline token's guard.

    Args:
        token: ``name@version``, a folder or a URL; ``None`` draws unguarded, as a baseline with the same settings.
        concept: concept file or name, for sampling settings and for the check of the prompts; by default the token's or
            ``erase_concept``.
        model: base model, a folder, a Hub id or ``demo``; by default the concept's.
        device: torch device; by default CUDA where there is one.
        erase_concept: eval-unlearn's own name of the concept.
        workspace: where ``name@version`` is looked up.
        options: ``num_inference_steps``, ``guidance_scale``, ``width``, ``height`` (pixels), and options of the guard
            such as ``strength`` or ``mode``.

    Raises:
        ConceptError: neither a token nor a concept is named.
    """

    def __init__(
        self,
        token: str | None = None,
        concept: str | None = None,
        model: str | None = None,
        device: str | None = None,
        erase_concept: str | None = None,
        workspace: str | None = None,
        **options: Any,
    ) -> None:
        import torch

        loaded = None if token is None else registry.load_token(token, workspace=workspace)
        name = concept or (loaded.concept if loaded is not None else erase_concept)
        if name is None:
            raise ConceptError(
                "technique dagkit: expected a token or a concept in its config, but got neither. Add one."
            )
        own = load_concept(name)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.base_model = demo.load_model(model or own.model, self.device)
        self.sampling = {
            key: options.pop(key, value) for key, value in own.sampling.model_dump().items() if key in _SAMPLING
        }
        self.context = own.context
        self.guard = None if loaded is None else loaded.guard(**options)
        self.bound = None if self.guard is None else self.guard.bind(self.base_model.pipe)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image]:
        """One image a prompt; prompt ``i`` starts from noise of ``seed + i``, as eval-unlearn's own techniques do."""
        import torch

        settings = {**self.sampling, **{key: value for key, value in options.items() if key in _SAMPLING}}
        first = int(torch.seed() % 2**31) if seed is None else seed
        with nullcontext() if self.bound is None else self.bound.run():
            return generate_images(
                self.base_model,
                list(prompts),
                [first + index for index in range(len(prompts))],
                settings=settings,
                context=self.context,
            )
