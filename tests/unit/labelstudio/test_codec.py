"""Brush codec against the SDK's, on random and adversarial masks, and on damaged data."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from label_studio_sdk.converter import brush

from dagkit.errors import LabelStudioError
from dagkit.labelstudio import codec


def sdk_decode(rle: list[int], width: int, height: int) -> np.ndarray:
    return brush.decode_rle(rle).reshape(height, width, 4)[..., 3]


def assert_same_as_sdk(mask: np.ndarray) -> None:
    height, width = mask.shape
    grey = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
    rle = codec.encode(mask)
    assert rle == brush.mask2rle(grey)
    decoded = codec.decode(rle, width, height)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, grey)
    assert np.array_equal(decoded, sdk_decode(rle, width, height))


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@given(shapes.flatmap(lambda shape: arrays(bool, shape)))
def test_random_masks(mask: np.ndarray) -> None:
    assert_same_as_sdk(mask)


@given(shapes.flatmap(lambda shape: arrays(np.uint8, shape)))
def test_random_alpha(alpha: np.ndarray) -> None:
    assert_same_as_sdk(alpha)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40_000), st.integers(0, 255)), min_size=1, max_size=6))
@example([(1, 0)])  # 4 values: the shortest run
@example([(2, 0), (3, 255)])  # 8: the last of 3 bits; 12: the first of 4
@example([(4, 1), (5, 2)])  # 16 | 20: 4 bits | 8
@example([(64, 1), (65, 2)])  # 256 | 260: 8 bits | 16
@example([(16_384, 255)])  # 65,536: the longest block
@example([(16_385, 255)])  # 65,540: a full block and a rest of 4, in the widest field
@example([(32_768, 255), (1, 0)])  # two full blocks and no rest
@example([(40_000, 7), (40_000, 8), (40_000, 7)])
def test_runs_at_every_edge(runs: list[tuple[int, int]]) -> None:
    assert_same_as_sdk(np.concatenate([np.full(length, value, np.uint8) for length, value in runs])[None])


def test_checkerboard_stripes_and_constants() -> None:
    y, x = np.mgrid[:61, :53]
    for mask in ((x + y) % 2 == 0, x % 2 == 0, y % 2 == 0, x < 0, x >= 0, (x == 0) & (y == 0), (x == 52) & (y == 60)):
        assert_same_as_sdk(mask)


def test_every_alignment_of_the_end() -> None:
    """The SDK adds a whole byte of zeros where the data end on a byte's edge."""
    ends = set()
    for width in range(1, 40):
        mask = np.arange(width)[None] % 3 == 0
        ends.add(len(codec.encode(mask)) - len(brush.mask2rle(mask.astype(np.uint8) * 255)))
        assert_same_as_sdk(mask)
    assert ends == {0}


def rle_pack(
    values: list[int], sizes: tuple[int, int, int, int], word_size: int, blocks: list[tuple[bool, int]]
) -> list[int]:
    """A stream written by hand: (is run, length) blocks; also literal ones, as browsers write."""
    bits = f"{len(values):032b}{word_size - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    position = 0
    for is_run, length in blocks:
        which = next(index for index, size in enumerate(sizes) if length <= 2**size)
        bits += f"{int(is_run)}{which:02b}{length - 1:0{sizes[which]}b}"
        words = values[position : position + (1 if is_run else length)]
        bits += "".join(f"{word:0{word_size}b}" for word in words)
        position += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], int]:
    sizes = tuple(sorted(draw(st.lists(st.integers(1, 16), min_size=4, max_size=4, unique=True))))
    word_size = draw(st.integers(1, 8))
    word = st.integers(0, 2**word_size - 1)
    values: list[int] = []
    blocks: list[tuple[bool, int]] = []
    longest = min(2 ** sizes[-1], 300)
    while not values or len(values) % 4 or draw(st.integers(0, 3)):
        room = 4 - len(values) % 4
        length = draw(st.integers(1, min(longest, room if len(blocks) > 8 else longest)))
        is_run = draw(st.booleans())
        values += [draw(word)] * length if is_run else draw(st.lists(word, min_size=length, max_size=length))
        blocks.append((is_run, length))
        if len(blocks) > 12 and len(values) % 4 == 0:
            break
    return rle_pack(values, sizes, word_size, blocks), len(values) // 4


@settings(max_examples=100, deadline=None)
@given(streams())
def test_streams_of_other_writers(stream: tuple[list[int], int]) -> None:
    """Literal blocks, other field widths and word sizes: what the browser's encoder may write."""
    rle, width = stream
    assert np.array_equal(codec.decode(rle, width, 1), sdk_decode(rle, width, 1))


def test_colour_channels_are_ignored() -> None:
    """A browser writes the label's colour into red, green and blue."""
    raster = np.zeros((2, 3, 4), np.uint8)
    raster[..., :3] = 200
    raster[0, 1, 3] = 255
    rle = rle_pack(raster.ravel().tolist(), (3, 4, 8, 16), 8, [(False, 24)])
    assert codec.decode(rle, 3, 2).tolist() == [[0, 255, 0], [0, 0, 0]]


def test_antialiased_strokes_are_binarised_above_127() -> None:
    alpha = np.array([[0, 1, 127, 128, 254, 255]], np.uint8)
    assert codec.binarise(codec.decode(codec.encode(alpha), 6, 1)).tolist() == [[False, False, False, True, True, True]]


MASK = np.random.default_rng(0).random((17, 23)) < 0.5
RLE = codec.encode(MASK)


def test_every_truncation_is_refused() -> None:
    for length in range(len(RLE)):
        with pytest.raises(LabelStudioError, match="truncated"):
            codec.decode(RLE[:length], 23, 17)


@pytest.mark.parametrize(("width", "height"), [(17, 24), (22, 17), (23, 18), (0, 17), (23, -17), (1, 1)])
def test_another_size_is_refused(width: int, height: int) -> None:
    with pytest.raises(LabelStudioError, match=r"1564 values, but an image of .* belongs to an image of another size"):
        codec.decode(RLE, width, height)


def test_transposed_size_of_equal_area_is_taken_as_told() -> None:
    assert codec.decode(RLE, 17, 23).shape == (23, 17)


def test_data_behind_the_end_are_refused() -> None:
    assert np.array_equal(codec.decode([*RLE, 0, 0], 23, 17), codec.decode(RLE, 23, 17))
    with pytest.raises(LabelStudioError, match="damaged: they hold more than the 1564 values"):
        codec.decode([*RLE, 1], 23, 17)


def test_a_run_past_the_end_is_refused() -> None:
    rle = rle_pack([7] * 8, (3, 4, 8, 16), 8, [(True, 8)])
    assert codec.decode(rle, 2, 1).tolist() == [[7, 7]]
    rle[3] = 4  # the header now promises one pixel
    with pytest.raises(LabelStudioError, match="damaged: they hold more than the 4 values"):
        codec.decode(rle, 1, 1)


@pytest.mark.parametrize("rle", [[256, 0], [-1], ["0"], [0.5], [None]])
def test_what_is_no_byte_is_refused(rle: list[object]) -> None:
    with pytest.raises(LabelStudioError, match=r"must be a list of ints in \[0, 255\]"):
        codec.decode(rle, 1, 1)  # type: ignore[arg-type]


def test_wide_words_are_refused() -> None:
    rle = rle_pack([7] * 4, (3, 4, 8, 16), 9, [(True, 4)])
    with pytest.raises(LabelStudioError, match="9 bits per value; at most 8"):
        codec.decode(rle, 1, 1)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_garbage_is_decoded_or_refused_never_more(garbage: list[int]) -> None:
    header = list((64).to_bytes(4, "big"))
    with contextlib.suppress(LabelStudioError):
        assert codec.decode([*header, *garbage], 4, 4).shape == (4, 4)


@pytest.mark.parametrize(
    "mask",
    [np.zeros((2, 2, 4), np.uint8), np.zeros((0, 3), bool), np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int64)],
)
def test_what_is_no_mask_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(LabelStudioError, match=r"must be non-empty \(H, W\) arrays of bool or uint8"):
        codec.encode(mask)
