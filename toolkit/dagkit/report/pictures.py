"""Pictures of a report as data URIs: images as they came, detection maps as heat, and the two over each other."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SIDE_PX: Final = 384
_LOSSLESS_SIDE_PX: Final = 128
# Black, violet, orange, pale yellow, even in lightness (after matplotlib's inferno).
_STOPS: Final = np.array(
    [
        [0, 0, 4],
        [40, 11, 84],
        [101, 21, 110],
        [159, 42, 99],
        [212, 72, 66],
        [245, 125, 21],
        [250, 193, 39],
        [252, 255, 164],
    ],
    np.float32,
)


def data_uri(image: Image.Image) -> str:
    """The image as a ``data:`` URI: PNG up to 128 px a side, else JPEG, scaled down to 384 px."""
    buffer = io.BytesIO()
    if max(image.size) > MAX_SIDE_PX:
        image = image.copy()
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    if max(image.size) <= _LOSSLESS_SIDE_PX:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(values: NDArray[np.floating[Any]]) -> Image.Image:
    """A map in [0, 1] as colours, (H, W) -> RGB image; dark is 0, pale yellow is 1."""
    position = np.clip(np.asarray(values, np.float32), 0, 1) * (len(_STOPS) - 1)
    below = np.minimum(position.astype(int), len(_STOPS) - 2)
    part = (position - below)[..., None]
    return Image.fromarray((_STOPS[below] * (1 - part) + _STOPS[below + 1] * part).round().astype(np.uint8))


def overlay(image: Image.Image, values: NDArray[np.floating[Any]]) -> Image.Image:
    """The image in grey with the map's heat over it, where the map is not 0.

    Args:
        image: RGB, any size.
        values: (h, w) in [0, 1], resized to the image.
    """
    resized = Image.fromarray(np.asarray(values, np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(resized), 0, 1)
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32) * 0.75 + 40
    alpha = (0.85 * np.clip(1.6 * strength, 0, 1))[..., None]
    colours = np.asarray(heat(0.35 + 0.65 * strength), np.float32)
    return Image.fromarray((grey * (1 - alpha) + colours * alpha).round().clip(0, 255).astype(np.uint8))


def film_strip(maps: NDArray[np.floating[Any]], num_frames: int = 10) -> list[tuple[int, Image.Image]]:
    """Evenly spaced steps of a run's detection maps.

    Args:
        maps: (steps, h, w) in [0, 1].
        num_frames: how many at most.

    Returns:
        (index of the step, heat image), the first and the last step included.
    """
    picks = np.unique(np.linspace(0, len(maps) - 1, min(num_frames, len(maps))).round().astype(int))
    return [(int(index), heat(maps[index])) for index in picks]
