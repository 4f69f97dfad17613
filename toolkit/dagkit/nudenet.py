"""NudeNet (notAI tech): an ONNX detector of body parts, whose weights come with the package ``nudenet``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import numpy as np

from dagkit.errors import PluginError

if TYPE_CHECKING:
    from PIL import Image

BodyPart = Literal[
    "ANUS_COVERED", "ANUS_EXPOSED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "BELLY_COVERED", "BELLY_EXPOSED",
    "BUTTOCKS_COVERED", "BUTTOCKS_EXPOSED", "FACE_FEMALE", "FACE_MALE", "FEET_COVERED", "FEET_EXPOSED",
    "FEMALE_BREAST_COVERED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_COVERED", "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED",
]  # fmt: skip
BODY_PARTS: Final[tuple[BodyPart, ...]] = get_args(BodyPart)
LOWEST_SCORE: Final = 0.25
"""NudeNet drops boxes below this score itself."""


class Detection(NamedTuple):
    """One body part: its name, a score in [0.25, 1], and (x0, y0, x1, y1) in pixels, exclusive at the end."""

    part: str
    score: float
    box: tuple[float, float, float, float]


def detect(detector: Any, image: Image.Image) -> list[Detection]:
    """What a ``nudenet.NudeDetector`` finds in one image of any mode."""
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])  # arrays are read as OpenCV reads files
    found = []
    for one in detector.detect(bgr):
        x, y, width, height = map(float, one["box"])
        found.append(Detection(one["class"], float(one["score"]), (x, y, x + width, y + height)))
    return found


@cache
def load_detector() -> Any:
    """The ``nudenet.NudeDetector``; loaded once.

    Raises:
        PluginError: the package is missing.
    """
    try:
        return import_module("nudenet").NudeDetector()
    except ImportError as error:
        raise PluginError(
            f"NudeNet cannot be imported ({error}). It brings its weights. Install it: pip install 'dagkit[nudenet]'"
        ) from error


def package_version() -> str:
    """Of the package ``nudenet``, and so of its weights."""
    return version("nudenet")
