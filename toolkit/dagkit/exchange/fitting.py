"""Pictures of any size as large as those that the base model draws: scaled until they fill that size, the rest cropped.

What is cropped is what is far from the mask: the window lies with its middle on the middle of what is marked, as far as
the picture goes. Nothing is stretched, and no border is added: the denoiser would look at both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from dagkit.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from dagkit.exchange.entries import Marked

_MOSTLY: Final = 0.98
"""Share of a mask that may be cropped away without a note: its antialiased edge."""

_BLURRED: Final = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A picture of the size that was wanted.

    Attributes:
        image: RGB.
        masks: label -> (H, W) bool, as large; only labels that mark a pixel.
        window: what of the upright picture it shows, (left, top, right, bottom) in pixels.
        notes: what was lost.
    """

    image: Image.Image
    masks: dict[str, NDArray[np.bool_]]
    window: tuple[float, float, float, float]
    notes: tuple[str, ...]


def fit(marked: Marked, size: tuple[int, int], positive: Iterable[str]) -> Fitted:
    """Scales and crops a picture, and its masks with it.

    Args:
        marked: the picture, of any size.
        size: width and height that are wanted, pixels.
        positive: labels on which the window is centred; on the picture where none of them is marked.

    Raises:
        DatasetError: no pixel of the concept is left.
    """
    image, (width, height) = marked.picture.image, size
    if image.size == size:
        return Fitted(image, marked.masks, (0, 0, width, height), marked.notes)
    positive = [label for label in positive if label in marked.masks]
    scale = max(width / image.width, height / image.height)
    window = _window(image.size, (width / scale, height / scale), [marked.masks[label] for label in positive])
    resized = image.resize(size, Image.Resampling.LANCZOS, box=window)
    notes = list(marked.notes)
    if scale > _BLURRED:
        notes.append(f"enlarged {scale:.1f} times, from {image.width}x{image.height} px: it is blurred")
    masks = {}
    for label, mask in marked.masks.items():
        left, top, right, bottom = (round(side) for side in window)
        kept = mask[top:bottom, left:right].sum() / mask.sum()
        soft = Image.fromarray(mask.astype(np.uint8) * 255)
        method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        small = np.asarray(soft.resize(size, method, box=window)) > 127
        if small.any():
            masks[label] = small
            if kept < _MOSTLY:
                notes.append(f"{1 - kept:.0%} of what is marked as {label} was cropped away")
        elif label in positive:
            raise DatasetError(
                f"what is marked as {label} ({int(mask.sum())} of {mask.size} px) leaves no pixel at {width}x{height}. "
                "Crop the picture around it first"
            )
    return Fitted(resized, masks, window, tuple(notes))


def _window(
    image: tuple[int, int], size: tuple[float, float], masks: list[NDArray[np.bool_]]
) -> tuple[float, float, float, float]:
    """The part of an image to keep: of a size, inside the image, in the middle of what is marked."""
    centre = [side / 2 for side in image]
    if masks:
        marked = np.logical_or.reduce(masks)
        for axis in (0, 1):
            places = np.flatnonzero(marked.any(axis))
            centre[axis] = (places[0] + places[-1] + 1) / 2
    left, top = (
        min(max(middle - side / 2, 0.0), max(whole - side, 0.0))
        for middle, side, whole in zip(centre, size, image, strict=True)
    )
    return left, top, min(left + size[0], image[0]), min(top + size[1], image[1])
