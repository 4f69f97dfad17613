"""Regions of other tools than the brush, as masks: rectangles, polygons, ellipses and bitmasks.

A team's own page may offer these. Label Studio gives places in percent of the image's width and height, and angles in
degrees, clockwise as seen on the screen: of a rectangle about its corner ``x, y``, of an ellipse about its centre
(https://labelstud.io/tags/rectangle, /tags/ellipse, /tags/polygon, /tags/bitmask). A pixel is marked where its centre
lies inside.
"""

from __future__ import annotations

import base64
import io
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dagkit.errors import LabelStudioError, quoted
from dagkit.labelstudio import codec
from dagkit.manifests import explain

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_POINTS: Final = 10_000
_PREFIX: Final = "data:image/png;base64,"

Percent = Annotated[float, Field(ge=-10_000, le=10_000)]
Length = Annotated[float, Field(gt=0, le=10_000)]
Angle = Annotated[float, Field(ge=-36_000, le=36_000)]


class _Shape(BaseModel, ABC):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @abstractmethod
    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """(H, W) bool: what it marks of an image of this size, pixels."""


class Rectangle(_Shape):
    """``x, y`` is the corner about which it is turned: top left, before that."""

    x: Percent
    y: Percent
    width: Length
    height: Length
    rotation: Angle = 0

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """(H, W) bool."""
        right, down = _turned(width, height, self.x, self.y, self.rotation)
        across, along = self.width * width / 100, self.height * height / 100
        return (right >= 0) & (right < across) & (down >= 0) & (down < along)


class Ellipse(_Shape):
    """``x, y`` is its centre; the radii are in percent of width and height."""

    x: Percent
    y: Percent
    radiusX: Length  # noqa: N815 - the server's names
    radiusY: Length  # noqa: N815
    rotation: Angle = 0

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """(H, W) bool."""
        right, down = _turned(width, height, self.x, self.y, self.rotation)
        inside: NDArray[np.bool_] = (right / (self.radiusX * width / 100)) ** 2 + (
            down / (self.radiusY * height / 100)
        ) ** 2 <= 1
        return inside


class Polygon(_Shape):
    """Its last point is joined to its first; where it crosses itself, all is inside that its outline winds around."""

    points: Annotated[
        list[Annotated[list[Percent], Field(min_length=2, max_length=2)]], Field(min_length=3, max_length=MAX_POINTS)
    ]
    closed: bool = True

    @model_validator(mode="after")
    def _is_closed(self) -> Self:
        if not self.closed:
            raise ValueError("its outline is not closed")
        return self

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """(H, W) bool."""
        corners = np.array(self.points, np.float64) * (width / 100, height / 100)
        winding = np.zeros((height, width + 1), np.int32)
        for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):
            low, high = (y1, y2) if y1 < y2 else (y2, y1)
            first, last = (min(max(math.ceil(y - 0.5), 0), height) for y in (low, high))
            if first < last:  # rows whose centres the edge crosses
                rows = np.arange(first, last)
                crossings = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)
                columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)
                winding[rows, columns] += 1 if y2 > y1 else -1
        inside: NDArray[np.bool_] = np.cumsum(winding, 1)[:, :width] != 0
        return inside


class Bitmask(_Shape):
    """A PNG of the image's size, marked where it is not transparent."""

    imageDataURL: str  # noqa: N815 - the server's name

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """(H, W) bool.

        Raises:
            ValueError: it is no PNG with transparency, or of another size.
        """
        from PIL import Image

        if not self.imageDataURL.startswith(_PREFIX):
            raise ValueError(f"expected {_PREFIX}..., but got {quoted(self.imageDataURL[:40])}")
        try:
            data = base64.b64decode(self.imageDataURL[len(_PREFIX) :], validate=True)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.size == (width, height):
                    image.load()
                    alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
                else:
                    raise ValueError(f"its PNG has {image.width}x{image.height} pixels")
        except ValueError:
            raise
        except Exception as error:  # a decoder that is fed foreign bytes may raise anything
            raise ValueError(f"its PNG cannot be read ({quoted(str(error))[1:-1]})") from error
        if alpha is None:
            raise ValueError("its PNG has no transparency, so nobody can tell what it marks")
        return marked(alpha)


_KINDS: Final[dict[str, type[_Shape]]] = {
    "rectangle": Rectangle,
    "polygon": Polygon,
    "ellipse": Ellipse,
    "bitmask": Bitmask,
}
CONVERTED: Final = ("brush", *_KINDS)
"""Kinds of regions that become masks; their types are these, or these with ``labels`` behind."""


def kind_of(region_type: str) -> str | None:
    """``rectanglelabels`` -> ``rectangle``; None for what is not converted."""
    kind = region_type.removesuffix("labels")
    return kind if kind in CONVERTED else None


def region_mask(kind: str, value: dict[str, Any], width: int, height: int) -> NDArray[np.bool_]:
    """(H, W) bool: what one region marks. Brushes and bitmasks that were erased wholly mark nothing.

    Args:
        kind: of `CONVERTED`.
        value: of the region.
        width: of the image, pixels.
        height: of the image, pixels.

    Raises:
        LabelStudioError: the data are damaged, of an image of another size, or an outline that marks no pixel.
    """
    if kind == "brush":
        if value.get("format", "rle") != "rle":
            raise LabelStudioError(f"Brush data must be in the format 'rle', but are in {quoted(value['format'])}.")
        try:
            return marked(codec.decode(value.get("rle", []), width, height))
        except ValueError as error:
            raise LabelStudioError(f"Brush data {error}.") from error
    try:
        mask = _KINDS[kind].model_validate(value).mask(width, height)
    except ValidationError as error:
        raise LabelStudioError(f"The {kind} is damaged: {explain(error)}.") from error
    except ValueError as error:
        raise LabelStudioError(f"The {kind} cannot be used: {error}.") from error
    if kind != "bitmask" and not mask.any():
        raise LabelStudioError(f"The {kind} marks no pixel of the image: it is too thin, or lies beside it.")
    return mask


def marked(alpha: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W) uint8 alpha -> (H, W) bool.

    Raises:
        ValueError: something was drawn, but so faintly that no pixel counts.
    """
    mask = codec.binarise(alpha)
    if alpha.any() and not mask.any():
        raise ValueError("mark something, but no pixel by half or more")
    return mask


def _turned(
    width: int, height: int, x: float, y: float, degrees: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of every pixel's centre, how far it is right of and below a point, in axes turned clockwise; pixels."""
    right = (np.arange(width) + 0.5 - x * width / 100)[None, :]
    down = (np.arange(height) + 0.5 - y * height / 100)[:, None]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if degrees % 90 == 0:  # so that edges on pixel borders stay there
        cosine, sine = round(cosine), round(sine)
    return right * cosine + down * sine, down * cosine - right * sine
