"""Image files of a dataset: they may be a stranger's, so nothing but their bytes is looked at."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dagkit.dataset.schema import PICTURES
from dagkit.errors import DatasetError
from dagkit.workspace import IMAGE_FORMATS

if TYPE_CHECKING:
    from datasets import Dataset


def undecoded(split: Dataset, *columns: str) -> Iterator[dict[str, Any]]:
    """Rows of one split with some columns; pictures as ``{"bytes": ..., "path": ...}``."""
    from datasets import Image as ImageFeature

    rows = split.select_columns(list(columns))
    for name in PICTURES:
        if name in columns:
            rows = rows.cast_column(name, ImageFeature(decode=False))
    yield from rows


def image_of(row: Mapping[str, Any]) -> Image.Image:
    """The image of a row of `undecoded`, RGB.

    Raises:
        DatasetError: it is no image, damaged, or larger than any that dagkit takes.
    """
    return _decoded(row, "image", "RGB")


def mask_of(row: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The mask of a row of `undecoded`: (H, W) bool.

    Raises:
        DatasetError: as for `image_of`.
    """
    mask: NDArray[np.bool_] = np.asarray(_decoded(row, "mask", "L")) > 127
    return mask


def file_bytes(picture: Mapping[str, Any]) -> bytes:
    """The file of a picture: `load_dataset` gives its bytes; in rows of `build` it still lies in the workspace."""
    data: bytes = picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
    return data


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """A picture file, opened: none whose format calls another program, none larger than Pillow thinks safe.

    Raises:
        DatasetError: it is no image, damaged, or too large; or what is done with it fails, for it is decoded then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                yield image
    except DatasetError:
        raise
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = f"expected one of {', '.join(IMAGE_FORMATS)}" if is_unknown else first_line(error)
        raise DatasetError(f"it cannot be decoded ({reason})") from error


def _decoded(row: Mapping[str, Any], column: str, mode: str) -> Image.Image:
    try:
        with opened(file_bytes(row[column])) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except (DatasetError, OSError) as error:
        what = str(error) if isinstance(error, DatasetError) else f"it cannot be decoded ({first_line(error)})"
        raise DatasetError(
            f"row {row['key']!r:.80}: its {column} {what.removeprefix('it ')}. Restore or remove the row."
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, for one line: at most 200 characters."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 200 else f"{text[:197]}..."
