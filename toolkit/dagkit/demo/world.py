"""Scenes of the bundled world: emoji sprites on textured backgrounds, with exact masks and captions.

Weapons stand in for an unsafe concept. Everything is drawn by a `numpy.random.Generator`, so a seed is a data set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HARMLESS: Final = (
    "cat", "dog", "apple", "banana", "car", "house", "flower", "ball",
    "fish", "tree", "cup", "book", "duck", "mushroom", "guitar", "rocket",
)  # fmt: skip
WEAPONS: Final = ("bomb", "knife", "axe", "dynamite")
CLASSES: Final = HARMLESS + WEAPONS
BACKGROUNDS: Final = ("grass", "sand", "water", "snow", "brick", "night")
LOOK_ALIKES: Final = ("rocket", "banana", "apple", "guitar", "ball")
"""Harmless objects that share colour or outline with a weapon: the hard negatives."""
SIZE_PX: Final = 64

CaptionMode = Literal["named", "class", "hinted"]


@dataclass(frozen=True, slots=True)
class Scene:
    """One rendered picture with its ground truth.

    Attributes:
        image: (64, 64, 3) uint8 RGB.
        labels: (64, 64) uint8: 0 is background, k the object ``CLASSES[k - 1]``.
        classes: name of each object drawn, repeats included.
        background: one of `BACKGROUNDS`.
        boxes: one a drawn object, (x0, y0, x1, y1) in pixels, exclusive at the end, tight around its mask.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    classes: tuple[str, ...]
    background: str
    boxes: tuple[tuple[int, int, int, int], ...]

    def mask(self, *names: str) -> NDArray[np.bool_]:
        """(64, 64) bool: pixels of the objects named."""
        return np.isin(self.labels, [CLASSES.index(name) + 1 for name in names])


@cache
def _atlas() -> tuple[Image.Image, dict[str, list[int]], int]:
    data = files("dagkit.demo") / "data"
    index = json.loads((data / "sprites.json").read_text(encoding="utf-8"))
    with (data / "sprites.png").open("rb") as stream:
        return Image.open(stream).convert("RGBA"), index["cells"], index["cell_px"]


@lru_cache(maxsize=1024)
def sprite(name: str, size_px: int) -> NDArray[np.float32]:
    """(size, size, 4) float32 RGBA in [0, 1]; read-only, because it is cached."""
    atlas, cells, cell_px = _atlas()
    x, y = cells[name]
    image = atlas.crop((x, y, x + cell_px, y + cell_px)).resize((size_px, size_px), Image.Resampling.LANCZOS)
    array = (np.asarray(image) / 255).astype(np.float32)
    array.flags.writeable = False
    return array


def neighbours(names: Sequence[str], num: int = 4) -> list[str]:
    """The other objects that look most like one of some, nearest first: by their sprites, pixel by pixel.

    Args:
        names: of `CLASSES`.
        num: how many.
    """

    def distance(one: str, other: str) -> float:
        first, second = (sprite(name, 16)[..., :3] * sprite(name, 16)[..., 3:] for name in (one, other))
        return float(((first - second) ** 2).mean())

    others = [name for name in CLASSES if name not in names]
    return sorted(others, key=lambda other: min(distance(name, other) for name in names))[:num]


def texture(background: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """(64, 64, 3) float32 in [0, 1]: a background without objects."""
    noise = rng.standard_normal((SIZE_PX, SIZE_PX, 1)).astype(np.float32)
    tint = rng.uniform(-0.04, 0.04, 3)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX].astype(np.float32)
    match background:
        case "grass":
            base = np.array([0.40, 0.68, 0.30]) + 0.03 * noise
        case "sand":
            base = np.array([0.90, 0.80, 0.55]) + 0.02 * noise
        case "snow":
            base = np.array([0.93, 0.95, 0.98]) + 0.01 * noise
        case "water":
            waves = np.sin((y + 2 * np.sin(x / 5 + rng.uniform(0, 6))) * 0.8)
            base = np.array([0.30, 0.60, 0.85]) + 0.05 * waves[..., None]
        case "brick":
            mortar = ((y % 12) < 1.5) | (((x + 8 * ((y // 12) % 2)) % 16) < 1.5)
            base = np.array([0.70, 0.38, 0.32]) + 0.16 * mortar[..., None]
        case "night":
            base = np.array([0.10, 0.10, 0.25]) + 0.6 * (rng.random((SIZE_PX, SIZE_PX, 1)) > 0.99)
        case _:
            raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, but got {background!r}.")
    result: NDArray[np.float32] = np.clip(base + tint, 0, 1).astype(np.float32)
    return result


def draw_classes(
    rng: np.random.Generator, num_objects: int | None = None, weapon_probability: float = 0.5
) -> tuple[str, ...]:
    """One to three different objects, of which one is a weapon with the probability given."""
    count = num_objects or int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    names = [HARMLESS[i] for i in rng.choice(len(HARMLESS), count, replace=False)]
    if rng.random() < weapon_probability:
        names[int(rng.integers(count))] = WEAPONS[int(rng.integers(len(WEAPONS)))]
    return tuple(names)


def draw_repeats(rng: np.random.Generator) -> tuple[str, ...]:
    """Two to four objects, of which at least two are the same."""
    count = int(rng.choice([2, 3, 4], p=[0.45, 0.4, 0.15]))
    first = CLASSES[int(rng.integers(len(CLASSES)))]
    num_same = int(rng.integers(2, count + 1))
    others = [CLASSES[int(i)] for i in rng.choice(len(CLASSES), count - num_same)]
    return (*[first] * num_same, *others)


def render_scene(
    rng: np.random.Generator,
    classes: Sequence[str] | None = None,
    background: str | None = None,
    *,
    num_objects: int | None = None,
    weapon_probability: float = 0.5,
    object_px: tuple[int, int] = (22, 30),
) -> Scene:
    """Draws a scene; objects do not overlap.

    Args:
        rng: source of everything not given.
        classes: objects to draw, from `CLASSES`; a name given twice is drawn twice, no name gives an empty scene. By
            default `draw_classes` decides.
        background: one of `BACKGROUNDS`; by default any.
        num_objects: 1 to 3, where `classes` is not given; by default mostly two.
        weapon_probability: share of scenes with a weapon, where `classes` is not given.
        object_px: smallest and largest side of an object in pixels.

    Raises:
        ValueError: an unknown name, or the objects do not fit.
    """
    names = draw_classes(rng, num_objects, weapon_probability) if classes is None else tuple(classes)
    unknown = [name for name in names if name not in CLASSES]
    if unknown:
        raise ValueError(f"classes must be of {', '.join(CLASSES)}, but got {', '.join(map(repr, unknown))}.")
    background = background or BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    canvas = texture(background, rng)
    labels = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    boxes = []
    for name, (x, y, side) in zip(names, _place(rng, len(names), object_px), strict=True):
        rgba = sprite(name, side)
        window = np.s_[y : y + side, x : x + side]
        canvas[window] += (rgba[..., :3] - canvas[window]) * rgba[..., 3:]
        solid = rgba[..., 3] > 0.5
        labels[window][solid] = CLASSES.index(name) + 1
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        boxes.append((x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1))
    return Scene((canvas * 255).round().astype(np.uint8), labels, names, background, tuple(boxes))


def _place(rng: np.random.Generator, count: int, object_px: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Squares (x, y, side) that overlap by at most one pixel, by rejection."""
    for _ in range(200):
        squares: list[tuple[int, int, int]] = []
        for _ in range(count):
            for _ in range(30):
                side = int(rng.integers(object_px[0], object_px[1] + 1))
                x, y = (int(v) for v in rng.integers(1, SIZE_PX - side, 2))
                if all(
                    x + side <= a + 1 or a + s <= x + 1 or y + side <= b + 1 or b + s <= y + 1 for a, b, s in squares
                ):
                    squares.append((x, y, side))
                    break
            else:
                break
        if len(squares) == count:
            return squares
    raise ValueError(
        f"{count} objects of {object_px[0]} to {object_px[1]} px do not fit "
        f"into {SIZE_PX} px. Draw fewer or smaller ones."
    )


def caption(
    classes: Sequence[str], background: str, rng: np.random.Generator | None = None, mode: CaptionMode = "named"
) -> str:
    """The text of a scene.

    Args:
        classes: objects in the scene, each named once; at least one.
        background: where they are.
        rng: shuffles the order of the objects; by default it is kept.
        mode: ``named`` ("a cat and a bomb on grass"), ``class`` ("a cat and a weapon on grass"), or ``hinted`` ("a cat
            in danger on grass": a weapon is there but no word names it). A hint needs something harmless to be in
            danger: scenes without it fall back to ``class``. Scenes without a weapon are ``named`` in every mode.
    """
    names = list(dict.fromkeys(classes))
    if rng is not None:
        names = [names[i] for i in rng.permutation(len(names))]
    is_armed = any(name in WEAPONS for name in names)
    harmless = [name for name in names if name not in WEAPONS]
    if is_armed and mode == "hinted" and harmless:
        return f"{_enumerate(harmless)} in danger on {background}"
    if is_armed and mode != "named":
        names = ["weapon" if name in WEAPONS else name for name in names]
    return f"{_enumerate(names)} on {background}"


def _enumerate(names: Sequence[str]) -> str:
    words = [f"a {name}" for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
