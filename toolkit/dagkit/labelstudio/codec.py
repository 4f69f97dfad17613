"""Label Studio's brush format: run-length codes of an RGBA raster, packed bit by bit.

The stream is that of ``@thi.ng/rle-pack`` (https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack): a
header of 53 bits (32: number of values; 5: bits per value - 1; 4 x 4: the four widths of length fields - 1), then
blocks. A block is one bit (1: one value repeated, 0: literal values), 2 bits (which width), the length - 1, and the
value or values. The values are the bytes of a row-major (H, W, 4) raster, of which the fourth channel, alpha, is the
mask.

Both directions are vectorised and give, bit for bit, what ``label_studio_sdk.converter.brush`` gives; what that module
would read as garbage or write past the end of an array is refused here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dagkit.errors import LabelStudioError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BINARISE_ABOVE: Final = 127
"""Alpha above which a pixel is marked: a browser's brush leaves antialiased edges of 1 to 254."""

_WIDTHS: Final = np.array([3, 4, 8, 16])  # of the length fields; what the SDK and the browser write
_HEADER_BITS: Final = 53


def encode(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> list[int]:
    """Encodes a mask as the ``rle`` of a brush region.

    Args:
        mask: (H, W) bool, or uint8 alpha in [0, 255].

    Returns:
        Bytes as ints in [0, 255]; True is written as 255 in all four channels.

    Raises:
        LabelStudioError: the mask is not two-dimensional, is empty, or of another dtype.
    """
    if mask.ndim != 2 or mask.size == 0 or mask.dtype not in (np.bool_, np.uint8):
        raise LabelStudioError(
            f"Brush masks must be non-empty (H, W) arrays of bool or uint8, but got {mask.shape} {mask.dtype}."
        )
    pixels = mask.astype(np.uint8).ravel() * np.uint8(255) if mask.dtype == np.bool_ else mask.ravel()
    if pixels.size * 4 >= 2**32:
        raise LabelStudioError(f"Brush masks hold at most 2**30 pixels, but got {mask.shape}. Scale the image down.")

    ends = np.append(np.flatnonzero(pixels[1:] != pixels[:-1]) + 1, pixels.size)
    runs = np.diff(ends, prepend=0) * 4
    values = pixels[ends - 1].astype(np.int64)

    # A run longer than 2**16 becomes full blocks and a rest, all with the widest length field.
    num_full = (runs - 1) >> 16
    which = np.where(num_full > 0, 3, np.searchsorted([8, 16, 256], runs))
    blocks = num_full + 1
    is_last = np.zeros(int(blocks.sum()), bool)
    is_last[np.cumsum(blocks) - 1] = True
    which, values = np.repeat(which, blocks), np.repeat(values, blocks)
    lengths = np.where(is_last, np.repeat(runs - (num_full << 16), blocks), 1 << 16)

    widths = _WIDTHS[which]
    codes = ((((4 | which) << widths) | (lengths - 1)) << 8) | values
    num_bits = widths + 11
    offsets = np.cumsum(num_bits) - num_bits + _HEADER_BITS
    total_bits = int(offsets[-1] + num_bits[-1])

    # A block of at most 27 bits touches at most 5 bytes; no two blocks share a bit, so adding is or-ing.
    first, shift = offsets >> 3, 40 - (offsets & 7) - num_bits
    window = codes << shift
    packed = np.zeros(total_bits // 8 + 6)
    for index in range(5):
        packed += np.bincount(first + index, (window >> (32 - 8 * index)) & 255, packed.size)
    out = packed.astype(np.uint8)
    out[:7] |= np.frombuffer(_header(pixels.size * 4), np.uint8)
    return list(out[: total_bits // 8 + 1].tobytes())  # like the SDK: a whole byte of padding where none is needed


def decode(rle: Sequence[int], width: int, height: int) -> NDArray[np.uint8]:
    """Decodes the ``rle`` of a brush region.

    Args:
        rle: bytes as ints in [0, 255].
        width: ``original_width`` of the region, pixels.
        height: ``original_height`` of the region, pixels.

    Returns:
        (H, W) uint8 alpha in [0, 255]; binarise with `binarise`.

    Raises:
        LabelStudioError: the data are not bytes, end early, run past the raster, or are of an image of another size.
    """
    try:
        if isinstance(rle, int):  # so many zeros, to Python
            raise TypeError("it is a number")
        data = np.frombuffer(bytes(rle), np.uint8)
    except (ValueError, TypeError) as error:
        raise LabelStudioError(f"Brush data must be a list of ints in [0, 255]: {str(error)[:200]}.") from error
    if data.size < 7:
        raise LabelStudioError(f"Brush data are truncated: {data.size} bytes, but the header alone takes 7.")
    header = int.from_bytes(data[:7].tobytes(), "big") >> 3
    num_values, word_size = header >> 21, ((header >> 16) & 31) + 1
    width_of = np.array([((header >> shift) & 15) + 1 for shift in (12, 8, 4, 0)])
    if width < 1 or height < 1 or num_values != width * height * 4:
        raise LabelStudioError(
            f"Brush data hold {num_values} values, but an image of {width}x{height} pixels has {width * height * 4}: "
            "the mask belongs to an image of another size."
        )
    if word_size > 8:
        raise LabelStudioError(f"Brush data have {word_size} bits per value; at most 8 are expected.")

    bits = np.unpackbits(data)
    kinds = np.zeros(bits.size, np.uint8)  # at every bit: the three that would open a block there
    kinds[:-2] = (bits[:-2] << 2) | (bits[1:-1] << 1) | bits[2:]
    padded = np.append(data, np.zeros(4, np.uint8))
    starts = _block_starts(kinds.tobytes(), padded.tobytes(), width_of.tolist(), word_size)

    length_bits = width_of[kinds[starts] & 3]
    lengths = _read(padded, starts + 3, length_bits) + 1
    filled = np.cumsum(lengths)
    num_blocks = int(np.searchsorted(filled, num_values)) + 1
    if num_blocks > starts.size:
        missing = num_values - int(filled[-1] if starts.size else 0)
        raise LabelStudioError(f"Brush data are truncated: {missing} of {num_values} values are missing.")
    starts, length_bits, lengths = starts[:num_blocks], length_bits[:num_blocks], lengths[:num_blocks]
    is_run = kinds[starts] >= 4
    num_words = np.where(is_run, 1, lengths)
    end = int(starts[-1] + 3 + length_bits[-1] + num_words[-1] * word_size)
    if end > bits.size:
        raise LabelStudioError(f"Brush data are truncated: the last block ends {end - bits.size} bits early.")
    if filled[num_blocks - 1] != num_values or bits[end:].any():
        raise LabelStudioError(f"Brush data are damaged: they hold more than the {num_values} values of the image.")

    # One position per word: that of its block's first word, and onwards within the block.
    within = np.arange(int(num_words.sum())) - np.repeat(np.cumsum(num_words) - num_words, num_words)
    words = _read(padded, np.repeat(starts + 3 + length_bits, num_words) + within * word_size, word_size)
    raster = np.repeat(words.astype(np.uint8), np.repeat(np.where(is_run, lengths, 1), num_words))
    return raster.reshape(height, width, 4)[..., 3].copy()


def binarise(alpha: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W) uint8 alpha -> (H, W) bool: marked where alpha > 127."""
    return alpha > BINARISE_ABOVE


def _header(num_values: int) -> bytes:
    header = (num_values << 5) | 7
    for width in _WIDTHS.tolist():
        header = (header << 4) | (width - 1)
    return (header << 3).to_bytes(7, "big")


def _block_starts(kinds: bytes, padded: bytes, width_of: list[int], word_size: int) -> NDArray[np.int64]:
    """Bit positions at which blocks begin, to the end of the data (padding included).

    A chain, so the one part that cannot be vectorised. A run's size follows from its first three bits; only literal
    blocks need their length read here.
    """
    run_step = [0] * 4 + [3 + width + word_size for width in width_of]
    starts: list[int] = []
    append = starts.append
    position, last = _HEADER_BITS, len(kinds) - 3
    while position <= last:
        append(position)
        kind = kinds[position]
        if kind >= 4:
            position += run_step[kind]
        else:
            width, at = width_of[kind], position + 3
            window = int.from_bytes(padded[at >> 3 : (at >> 3) + 3], "big")
            length = ((window >> (24 - (at & 7) - width)) & ((1 << width) - 1)) + 1
            position = at + width + word_size * length
    return np.array(starts, np.int64)


def _read(
    padded: NDArray[np.uint8], positions: NDArray[np.int64], widths: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """Big-endian fields of at most 16 bits at the given bit positions."""
    at = positions >> 3
    window: NDArray[np.int64] = (
        (padded[at].astype(np.int64) << 16) | (padded[at + 1].astype(np.int64) << 8) | padded[at + 2]
    )
    window >>= 24 - (positions & 7) - widths
    window &= (1 << np.asarray(widths)) - 1
    return window
