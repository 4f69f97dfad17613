"""Annotated images as the optimisation takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dagkit.errors import DatasetError


@dataclass(frozen=True)
class Example:
    """One annotated image.

    Attributes:
        image: RGB.
        mask: (H, W) bool of the image's size; True where the concept is. Ignored (taken as empty) on safe images.
        prompt: that the image was made with, or a caption.
        is_unsafe: whether the concept is in the image.
        member: which member of the concept the prompt names, see `dagkit.concept.Concept.members`; None where it names
            none or several. Ignored on safe images.
    """

    image: Image.Image
    mask: NDArray[np.bool_]
    prompt: str
    is_unsafe: bool
    member: str | None = None


def coarse_mask(example: Example, size: tuple[int, int]) -> Tensor:
    """The mask as share of each cell that it covers: (H, W) float32 in [0, 1]; zeros for a safe image."""
    if not example.is_unsafe:
        return torch.zeros(size)
    mask = torch.from_numpy(np.ascontiguousarray(example.mask)).float()
    return F.adaptive_avg_pool2d(mask[None, None], size)[0, 0]


def check_examples(examples: Sequence[Example]) -> None:
    """Refuses data from which nothing can be learned.

    Raises:
        DatasetError: a kind is missing, sizes differ, or a mask is empty or does not fit its image.
    """
    for kind in ("unsafe", "safe"):
        if not any(example.is_unsafe == (kind == "unsafe") for example in examples):
            raise DatasetError(
                f"{len(examples)} examples hold no {kind} image; at least 1 is needed, 8 are better. Annotate some "
                "more."
            )
    sizes = sorted({example.image.size for example in examples})
    if len(sizes) > 1:
        raise DatasetError(f"images must have one size, but have {sizes[:4]} (width, height). Resize them first.")
    for number, example in enumerate(examples):
        size = (example.image.height, example.image.width)
        if example.is_unsafe and example.mask.shape != size:
            raise DatasetError(
                f"example {number}: the mask is {example.mask.shape}, but its image is {size}. Export the dataset "
                "again."
            )
        if example.is_unsafe and not example.mask.any():
            raise DatasetError(
                f"example {number} ({example.prompt!r}) is unsafe, but its mask is empty. Mark it, or call it safe."
            )


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Keeps every fourth example of each kind for validation; a kind with fewer than four validates on itself."""
    training, validation = [], []
    for kind in (True, False):
        group = [example for example in examples if example.is_unsafe is kind]
        if len(group) < 4:
            training += group
            validation += group
        else:
            validation += group[3::4]
            training += [example for number, example in enumerate(group) if number % 4 != 3]
    return training, validation


def kinds_learned_from(validation: Sequence[Example], training: Sequence[Example]) -> frozenset[bool]:
    """Kinds (``is_unsafe``) of which validation has an image that is training data, too."""
    known = {id(example) for example in training}
    return frozenset(example.is_unsafe for example in validation if id(example) in known)


def measured_names(figures: Mapping[str, Any], learned_from: frozenset[bool]) -> dict[str, Any]:
    """Figures by what they were measured on: ``validation_x`` is ``training_x`` where those images were learned from.

    Args:
        figures: by name. Rates and areas of false triggers are measured on safe images, the loss on both kinds, all
            others on unsafe ones.
        learned_from: as from `kinds_learned_from`.
    """

    def name(key: str) -> str:
        measure = key.removeprefix("validation_")
        kinds = {True, False} if measure == "loss" else {not measure.startswith("false_")}
        return f"training_{measure}" if measure != key and kinds & learned_from else key

    return {name(key): value for key, value in figures.items()}


def complete(validation: Sequence[Example], training: Sequence[Example]) -> list[Example]:
    """Validation data with both kinds: a kind that is missing is taken from the training data."""
    missing = [kind for kind in (True, False) if not any(example.is_unsafe is kind for example in validation)]
    return [*validation, *(example for example in training if example.is_unsafe in missing)]
