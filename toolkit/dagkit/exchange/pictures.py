"""Pictures and masks of a source, upright: what cameras note as turned is turned, and masks with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageOps

from dagkit.dataset.pictures import opened
from dagkit.errors import DatasetError
from dagkit.workspace import sha256_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture, upright.

    Attributes:
        image: RGB, without anything that its file said beside the pixels.
        turn: how it was turned to be upright; None where it was so in its file.
    """

    image: Image.Image
    turn: Image.Transpose | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels, upright."""
        return self.image.size

    @property
    def digest(self) -> str:
        """64 hex digits over size and pixels."""
        return sha256_bytes(f"{self.size}".encode() + self.image.tobytes()).removeprefix("sha256:")

    def upright(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask as it lies on the upright picture.

        A mask of a turned photograph may have been drawn on it as viewers show it, upright, or as it lies in its file;
        which, its size tells.

        Args:
            mask: (h, w) bool.

        Returns:
            (H, W) bool.

        Raises:
            DatasetError: it has another size than the picture, or its size fits both ways.
        """
        turned = self.turn is not None
        file_size = self.size[::-1] if self.turn in _SIDEWAYS else self.size
        if turned and file_size == self.size:
            raise DatasetError(
                "its EXIF data say that the picture is turned, and its mask would fit both ways. Save the picture "
                "upright, without that mark, and import it again"
            )
        if self.turn is not None and mask.shape == file_size[::-1]:
            image = Image.fromarray(mask.astype(np.uint8) * 255).transpose(self.turn)
            marked: NDArray[np.bool_] = np.asarray(image) > 127
            return marked
        if mask.shape != self.size[::-1]:
            raise DatasetError(
                f"expected a mask of {self.size[0]}x{self.size[1]} px, as large as its picture, but got "
                f"{mask.shape[1]}x{mask.shape[0]}"
            )
        return mask


_SIDEWAYS: Final = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def read_picture(data: bytes) -> Picture:
    """A picture file, upright and without EXIF data: they may tell where and with what it was taken.

    Raises:
        DatasetError: it is no image, damaged, or larger than any that dagkit takes.
    """
    with opened(data) as image:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
        rgb = ImageOps.exif_transpose(image).convert("RGB")
    return Picture(Image.frombytes("RGB", rgb.size, rgb.tobytes()), turn)


def read_mask(data: bytes) -> NDArray[np.bool_]:
    """A mask file: (H, W) bool, as it lies in the file.

    With two values, or one, what is not 0 is marked; of more, as JPEG and soft brushes leave, what is above half. In
    pictures with a palette the number of the colour is the value.

    Raises:
        DatasetError: it is no image, or nobody can tell what it marks: colours, classes, transparency.
    """
    with opened(data) as image:
        if image.has_transparency_data and image.mode != "P":
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
            if (alpha != 255).any():
                raise DatasetError(f"its mask is partly transparent: {_EXPECTED}")
        if image.mode == "P":
            values = np.asarray(image)
        else:
            channels = np.asarray(image.convert("RGB") if image.mode not in ("1", "L", "I", "I;16", "F") else image)
            if channels.ndim == 3:
                spread = channels.max(2).astype(int) - channels.min(2)
                if spread.max() > _GREY_SPREAD:
                    raise DatasetError(f"its mask has colours: {_EXPECTED}")
                channels = channels[..., 0]
            values = channels
    found = np.unique(values)
    marked: NDArray[np.bool_] = values != 0
    if len(found) <= 2 and (found[0] == 0 or len(found) == 1):
        return marked
    if values.dtype == np.uint8 and found[-1] > 127 and image.mode != "P":
        return values > 127
    listed = ", ".join(f"{value:g}" for value in found[:5])
    raise DatasetError(f"its mask has the values {listed}{', ...' if len(found) > 5 else ''}: {_EXPECTED}")


_GREY_SPREAD: Final = 8
"""By how much the channels of a grey JPEG may differ."""

_EXPECTED: Final = "expected black, and white where the concept is"
