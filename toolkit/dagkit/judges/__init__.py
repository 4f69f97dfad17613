"""Judges: does an image show the concept? They measure what a guard achieves; they never steer it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dagkit.concept import Plugin, PluginOptions, find_plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from torch import Tensor

    from dagkit.concept import Concept


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says about one image.

    Attributes:
        is_present: whether the concept is there, by the judge's own threshold.
        score: how surely it is there, in [0, 1].
        labels: probability in [0, 1] of each thing that the judge knows by name.
    """

    is_present: bool
    score: float
    labels: dict[str, float] = field(default_factory=dict)


class Judge(ABC):
    """Decides for whole images whether a concept is present.

    Attributes:
        Options: what a concept file may say beside the plugin's name.
        concept_labels: of its labels, those that are the concept; the concept's words where None.
        threshold: score from which the concept counts as present, where that decides it, in [0, 1].
        features: images to (N, d) float32 features of its own network, for Fréchet distances; None where it has none.
    """

    Options: ClassVar[type[PluginOptions]] = PluginOptions
    concept_labels: Sequence[str] | None = None
    threshold: float | None = None
    features: Callable[[Sequence[Image.Image]], Tensor] | None = None

    @classmethod
    def from_concept(cls, concept: Concept | None = None, device: str = "cpu", *, options: Any = None) -> Self:
        """Builds the judge for a concept; `build_judge` reads the options.

        Args:
            concept: what to look for; the judge's own default where None.
            device: torch device.
            options: an instance of ``Options``; its defaults where None.

        Raises:
            CheckpointError: weights are missing or of something else.
            ConceptError: it needs a concept, or options, and there are none.
            PluginError: a package is missing.
        """
        return cls()

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides its answers beside the images: what a figure made with it must state."""
        return {}

    @abstractmethod
    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image, in order; RGB images of any size."""


def build_judge(concept: Concept, device: str = "cpu", *, name: str | None = None) -> Judge:
    """The judge that a concept names, or another one with its defaults.

    Args:
        concept: what to look for.
        device: torch device.
        name: of another judge.

    Raises:
        PluginError: an unknown name, or a package is missing.
        ConceptError: wrong options.
        CheckpointError: weights are missing.
    """
    plugin = concept.judge if name in (None, concept.judge.name) else Plugin.model_construct(name=name)
    found, options = find_plugin("judges", plugin, concept)
    judge: Judge = found.from_concept(concept, device, options=options)
    return judge
