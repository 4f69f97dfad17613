"""LabelMe's files, one JSON a picture (https://github.com/wkentaro/labelme)."""

from __future__ import annotations

import base64
import math
import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dagkit.errors import DatasetError, LabelStudioError, quoted
from dagkit.exchange.entries import Entry, LabelNames, Marked, Source, SourceFolder, printable, united
from dagkit.exchange.pictures import Picture, read_mask, read_picture
from dagkit.labelstudio.shapes import MAX_POINTS, region_mask
from dagkit.manifests import explain

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "labelme"
_OUTLINES: Final = ("polygon", "rectangle", "circle", "mask")
Point = Annotated[
    list[Annotated[float, Field(ge=-1e6, le=1e6)]],
    Field(min_length=2, max_length=2),
]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Shape(_Part):
    """One outline."""

    label: str
    points: Annotated[list[Point], Field(max_length=MAX_POINTS)]
    shape_type: str | None = "polygon"
    mask: str | None = None


class File(_Part):
    """What is marked in one picture."""

    shapes: list[Shape]
    imagePath: str | None = None  # noqa: N815 - LabelMe's names
    imageData: str | None = None  # noqa: N815
    imageWidth: int | None = None  # noqa: N815
    imageHeight: int | None = None  # noqa: N815


def is_labelme(value: object) -> bool:
    """Whether a JSON value looks like a file of LabelMe."""
    return isinstance(value, dict) and isinstance(value.get("shapes"), list) and "imagePath" in value


def read_labelme(
    folder: SourceFolder, files: Sequence[str], names: LabelNames, pictures: SourceFolder | None
) -> Source:
    """The pictures of LabelMe's files.

    Args:
        folder: where the files are; their pictures, too, unless they are in the files themselves.
        files: their names in it.
        names: what the labels mean.
        pictures: another folder in which pictures are looked for by their names alone.
    """
    return Source(FORMAT, FORMAT, _entries(folder, files, names, pictures))


def _entries(
    folder: SourceFolder, files: Sequence[str], names: LabelNames, pictures: SourceFolder | None
) -> Iterator[Entry]:
    for name in files:
        yield Entry(printable(name), partial(_marked, folder, name, names, pictures))


def _marked(folder: SourceFolder, name: str, names: LabelNames, pictures: SourceFolder | None) -> Marked:
    try:
        file = File.model_validate(folder.read_json(folder.inside(name)))
    except ValidationError as error:
        raise DatasetError(explain(error)) from error
    picture = read_picture(_picture(folder, name, file, pictures))
    drawn_on = (file.imageWidth or picture.size[0], file.imageHeight or picture.size[1])
    if drawn_on != picture.size:
        raise DatasetError(
            f"it was drawn on a picture of {drawn_on[0]}x{drawn_on[1]} px, but the one that is there has "
            f"{picture.size[0]}x{picture.size[1]}"
        )
    masks = []
    for index, shape in enumerate(file.shapes):
        label = names.ours(shape.label)
        if label is not None:
            try:
                masks.append((label, _mask(shape, picture)))
            except (DatasetError, LabelStudioError) as error:
                raise DatasetError(f"shapes.{index}: {error}") from error
    return Marked(picture, united(masks))


def _picture(folder: SourceFolder, name: str, file: File, pictures: SourceFolder | None) -> bytes:
    """The bytes of the picture: those in the file, which LabelMe drew on, or else where it says."""
    if file.imageData:
        try:
            return base64.b64decode(file.imageData, validate=True)
        except ValueError as error:
            raise DatasetError(f"imageData: expected a picture in base64, but {error}") from error
    if pictures is None:
        return folder.read(folder.inside(file.imagePath, seen_from=posixpath.dirname(name)))
    plain = str(file.imagePath or "").replace("\\", "/")
    return pictures.read(pictures.inside(posixpath.basename(plain)))


def _mask(shape: Shape, picture: Picture) -> NDArray[np.bool_]:
    """(H, W) bool. LabelMe shows pictures upright, so its places are on the upright one."""
    width, height = picture.size
    points = np.array(shape.points, np.float64).reshape(-1, 2)
    kind = shape.shape_type or "polygon"
    if kind not in _OUTLINES:
        raise DatasetError(
            f"a {quoted(kind, 40)} says nothing exact about pixels; expected one of {', '.join(_OUTLINES)}"
        )
    num_points = {"polygon": len(points)}.get(kind, 2)
    if len(points) != num_points or (kind == "polygon" and num_points < 3):
        raise DatasetError(f"a {kind} of {len(points)} points is none")
    if kind == "mask":
        return _placed(shape, points, width, height)
    percent = points * (100 / width, 100 / height)
    if kind == "polygon":
        return region_mask("polygon", {"points": percent.tolist()}, width, height)
    if kind == "rectangle":
        (left, top), (right, bottom) = percent.min(0).tolist(), percent.max(0).tolist()
        value = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        return region_mask("rectangle", value, width, height)
    radius = math.dist(*points.tolist())
    (x, y), _ = percent.tolist()
    value = {"x": x, "y": y, "radiusX": radius * 100 / width, "radiusY": radius * 100 / height}
    return region_mask("ellipse", value, width, height)


def _placed(shape: Shape, points: NDArray[np.float64], width: int, height: int) -> NDArray[np.bool_]:
    """A mask of a part of the picture, its corners included."""
    try:
        part = read_mask(base64.b64decode(shape.mask or "", validate=True))
    except ValueError as error:
        raise DatasetError(f"mask: expected a picture in base64, but {error}") from error
    left, top = (round(float(one)) for one in points.min(0))
    if left < 0 or top < 0 or left + part.shape[1] > width or top + part.shape[0] > height:
        raise DatasetError(
            f"its mask of {part.shape[1]}x{part.shape[0]} px at {left}, {top} is not inside the picture of "
            f"{width}x{height} px"
        )
    whole: NDArray[np.bool_] = np.zeros((height, width), np.bool_)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return whole
