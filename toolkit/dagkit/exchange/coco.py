"""COCO's instances: pictures by file name, and masks as polygons or run lengths (https://cocodataset.org/#format-data)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dagkit.errors import DatasetError, quoted, required
from dagkit.exchange.entries import Entry, LabelNames, Marked, Source, SourceFolder, printable, united
from dagkit.exchange.pictures import read_picture
from dagkit.manifests import explain

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "coco"
_MAX_SIDE: Final = 65_535
_MAX_POINTS: Final = 100_000
_HIGHEST: Final = 1e6
"""Coordinates beyond that are no place in a picture."""

_MAX_OUTLINE_PX: Final = 4_000_000
"""What draws polygons takes memory by the length of their outlines."""

Id = int | str
Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Category(_Part):
    """What annotations may be of."""

    id: Id
    name: str


class CocoImage(_Part):
    """One picture."""

    id: Id
    file_name: str
    width: Side
    height: Side


class Runs(_Part):
    """Run lengths, down the columns, beginning with what is not marked; in COCO's own packing where it is a text."""

    size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    counts: str | list[Annotated[int, Field(ge=0)]]


class Annotation(_Part):
    """What is marked in one picture."""

    id: Id | None = None
    image_id: Id
    category_id: Id
    segmentation: Any = None


def is_coco(value: object) -> bool:
    """Whether a JSON value looks like COCO's instances."""
    return isinstance(value, dict) and isinstance(value.get("images"), list) and "annotations" in value


def read_coco(folder: SourceFolder, files: Sequence[str], names: LabelNames, pictures: SourceFolder) -> Source:
    """The pictures of one or several annotation files.

    Args:
        folder: where the files are.
        files: their names in it.
        names: what the categories mean.
        pictures: below which the pictures are, directly or in ``images/``.

    Raises:
        DatasetError: a file is not as COCO says.
    """
    tables = [(name, _tables(folder.read_json(name), name)) for name in files]
    version = printable(", ".join(files), 200)
    entries = (entry for name, table in tables for entry in _entries(name, table, names, pictures))
    return Source(FORMAT, version, entries)


Tables = tuple[list[Any], list[Any], dict[Any, str]]


def _tables(value: Any, where: str) -> Tables:
    """Pictures, annotations, and category id -> name."""
    listed = value.get("categories", []) if isinstance(value, dict) else None
    if not is_coco(value) or not isinstance(value["annotations"], list) or not isinstance(listed, list):
        raise DatasetError(
            f"{printable(where)}: expected COCO's instances, an object with the lists images, annotations and "
            f"categories, but got {quoted(value, 60)}"
        )
    try:
        categories = [Category.model_validate(one) for one in listed]
    except ValidationError as error:
        raise DatasetError(f"{printable(where)}: categories: {explain(error)}") from error
    return value["images"], value["annotations"], {one.id: one.name for one in categories}


def _entries(file: str, tables: Tables, names: LabelNames, pictures: SourceFolder) -> Iterator[Entry]:
    images, annotations, categories = tables
    of_image: defaultdict[Any, list[Any]] = defaultdict(list)
    for index, one in enumerate(annotations):
        image_id = one.get("image_id") if isinstance(one, dict) else None
        if not isinstance(image_id, (int, str)):
            reason = f"expected an object with an image_id, but got {quoted(one, 60)}"
            yield Entry(f"{printable(file)}, annotations.{index}", partial(_refused, reason))
        else:
            of_image[image_id].append(one)
    ids: set[Any] = set()
    for index, one in enumerate(images):
        name = f"{printable(file)}, images.{index}"
        try:
            image = CocoImage.model_validate(one)
        except ValidationError as error:
            if isinstance(one, dict) and isinstance(one.get("id"), (int, str)):
                of_image.pop(one["id"], None)
            yield Entry(name, partial(_refused, explain(error)))
            continue
        name = f"{printable(file)}, image {printable(str(image.id), 40)}: {printable(image.file_name)}"
        if image.id in ids:
            yield Entry(name, partial(_refused, "another picture has the same id"))
        else:
            ids.add(image.id)
            own = of_image.pop(image.id, [])
            yield Entry(name, partial(_marked, image, own, categories, names, pictures))
    for image_id, own in of_image.items():
        reason = f"{len(own)} annotations are of a picture that images does not list"
        yield Entry(f"{printable(file)}, image {printable(str(image_id), 40)}", partial(_refused, reason))


def _marked(
    image: CocoImage,
    annotations: Sequence[Any],
    categories: Mapping[Any, str],
    names: LabelNames,
    pictures: SourceFolder,
) -> Marked:
    name = pictures.inside(image.file_name)
    if not pictures.has(name) and pictures.has(f"images/{name}"):
        name = f"images/{name}"
    picture = read_picture(pictures.read(name))
    masks = []
    for one in annotations:
        try:
            annotation = Annotation.model_validate(one)
        except ValidationError as error:
            raise DatasetError(f"annotation {quoted(one.get('id'), 40)}: {explain(error)}") from error
        where = f"annotation {quoted(annotation.id, 40)}"
        if annotation.category_id not in categories:
            raise DatasetError(f"{where}: its category {quoted(annotation.category_id, 40)} is not listed")
        label = names.ours(categories[annotation.category_id])
        if label is not None:
            try:
                masks.append((label, picture.upright(_mask(annotation.segmentation, image.width, image.height))))
            except DatasetError as error:
                raise DatasetError(f"{where}: {error}") from error
    return Marked(picture, united(masks))


def _mask(segmentation: Any, width: int, height: int) -> NDArray[np.bool_]:
    """(H, W) bool: what a segmentation marks."""
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise DatasetError(f"{width}x{height} px are more than any picture that dagkit takes has")
    coder = required("pycocotools.mask")
    if isinstance(segmentation, list) and segmentation:
        polygons = [_polygon(one) for one in segmentation]
        runs = coder.merge(coder.frPyObjects(polygons, height, width))
    elif isinstance(segmentation, dict):
        runs = _runs(segmentation, width, height)
        if isinstance(runs["counts"], list):
            runs = coder.frPyObjects(runs, height, width)
    else:
        raise DatasetError("it has no outline: expected polygons or run lengths under segmentation, not a box alone")
    try:
        mask: NDArray[np.bool_] = coder.decode(runs).astype(np.bool_)
    except ValueError as error:
        raise DatasetError(f"its run lengths are damaged: {error}") from error
    return mask


def _polygon(points: Any) -> list[float]:
    is_plain = isinstance(points, list) and all(type(one) in (int, float) and abs(one) <= _HIGHEST for one in points)
    if not is_plain or len(points) % 2 or not 6 <= len(points) <= 2 * _MAX_POINTS:
        raise DatasetError(
            f"expected polygons of at least three corners, x1, y1, x2, y2, ..., but got {quoted(points, 60)}"
        )
    corners = np.array(points, np.float64).reshape(-1, 2)
    if np.abs(corners - np.roll(corners, 1, 0)).max(1).sum() > _MAX_OUTLINE_PX:
        raise DatasetError(f"one of its polygons has an outline of more than {_MAX_OUTLINE_PX:,} px")
    return [float(one) for one in points]


def _runs(value: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Run lengths that are sound: what reads them is written in C, and trusts them."""
    try:
        runs = Runs.model_validate(value)
    except ValidationError as error:
        raise DatasetError(f"its run lengths are damaged: {explain(error)}") from error
    if runs.size != [height, width]:
        shown = f"{runs.size[1]}x{runs.size[0]}"
        raise DatasetError(f"its run lengths are of {shown} px, but the picture is listed with {width}x{height}")
    counts = runs.counts if isinstance(runs.counts, list) else _unpacked(runs.counts)
    if sum(counts) != width * height:
        raise DatasetError(f"its run lengths come to {sum(counts)} px, but {width}x{height} are {width * height}")
    return {"size": runs.size, "counts": runs.counts}


def _unpacked(packed: str) -> list[int]:
    """Run lengths from COCO's packing: five bits a character, from 48 on, and differences from the third run on."""
    counts: list[int] = []
    value = shift = 0
    for character in packed:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise DatasetError("its run lengths are damaged: not in COCO's packing")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            if counts[-1] < 0:
                raise DatasetError("its run lengths are damaged: one is negative")
            value = shift = 0
    if shift:
        raise DatasetError("its run lengths are damaged: they end in the middle")
    return counts


def encoded(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The segmentation of a mask, with ``bbox`` and ``area`` as an annotation has them.

    Args:
        mask: (H, W) bool.
    """
    coder = required("pycocotools.mask")
    runs = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode("ascii")},
        "bbox": [float(side) for side in coder.toBbox(runs)],
        "area": int(coder.area(runs)),
        "iscrowd": 0,
    }


def _refused(reason: str) -> Marked:
    raise DatasetError(reason)
