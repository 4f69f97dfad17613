"""Pictures and masks as PNG files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


def picture_png(image: Image, *, optimize: bool = False) -> bytes:
    """A picture as a PNG file.

    Args:
        image: of any mode that PNG knows.
        optimize: takes longer for a smaller file.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def mask_png(mask: NDArray[np.bool_], *, optimize: bool = False) -> bytes:
    """A mask as a PNG file of mode L: 255 where it is True.

    Args:
        mask: (H, W) bool.
        optimize: takes longer for a smaller file.
    """
    import numpy as np
    from PIL import Image

    return picture_png(Image.fromarray(mask.astype(np.uint8) * 255), optimize=optimize)
