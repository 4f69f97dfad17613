"""Fingerprints of weights that survive a change of precision.

A hash of bytes would differ between the float32, float16 and bfloat16 copies of one model. A count sketch does not:
each weight is multiplied by a fixed random sign and added to one of 4096 buckets, so the distance of two sketches
estimates the distance of the two weight vectors, at any precision.

Quantising moves weights as far as fine-tuning may, but by how much is known: each value's step tells. The distance of
a quantised copy is therefore compared with what its own rounding explains. It estimates the sum of squares of rounding
and fine-tuning with a standard deviation of ``sqrt(2 / buckets)``, so with 4096 buckets a fine-tune of 0.4 of the
rounding is noticed, and with 64 (``sketch1``, of older tokens) one of its size.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagkit.models.quantised import Weight

TOLERANCE: Final = 0.005
"""Largest relative difference that counts as the same: a cast to bfloat16 makes 0.002, other weights about 1."""

_CAST: Final = 0.002  # what was quantised may have been a bfloat16 copy
_DEVIATIONS: Final = 4.0  # standard deviations of an estimate from what it estimates
_COLUMNS: Final = 64
_GROUPS: Final = 64
_PERIOD: Final = _COLUMNS * 1021
_ROWS: Final = 16  # periods that are read at a time, so that they fit a processor's cache
_PREFIX: Final = "sketch2:"
_OLD_PREFIX: Final = "sketch1:"


class Sketch(str):
    """The text of a sketch, of weights as they are in memory.

    Attributes:
        rounding: (4096,) float64, variance of each bucket by the rounding of quantised weights; None where none are.
    """

    rounding: NDArray[np.float64] | None

    def __new__(cls, text: str, rounding: NDArray[np.float64] | None = None) -> Self:
        """A string with ``rounding`` beside it."""
        self = super().__new__(cls, text)
        self.rounding = rounding
        return self


class Mismatch(NamedTuple):
    """A part of a model that is not what a token's record states.

    Attributes:
        part: its name.
        distance: relative difference of the weights.
        limit: the largest that counts as the same.
    """

    part: str
    distance: float
    limit: float

    def __str__(self) -> str:
        """For messages."""
        explained = f", of which rounding explains {self.limit:.2%}" if self.limit > TOLERANCE else ""
        return f"the weights differ by {self.distance:.1%}{explained}"


def sketch(weights: Iterable[Tensor | Weight]) -> Sketch:
    """Sketches weights: ``sketch2:`` and base64 of a float32 scale and 4096 float16 that it multiplies.

    Reads every weight each time. Nothing cheaper tells whether they are still the same: fusing a LoRA with PEFT
    (``weight.data += ...``) leaves object, ``data_ptr`` and ``_version`` of a parameter as they were.

    Args:
        weights: in a fixed order; any float dtype.
    """
    signs = (torch.randint(0, 2, (_PERIOD,), generator=torch.Generator().manual_seed(20250321)) * 2 - 1).float()
    group = torch.arange(_PERIOD // _COLUMNS) % _GROUPS
    buckets, rounding = torch.zeros(2, _GROUPS, _COLUMNS, dtype=torch.float64)
    is_rounded = False
    for weight in weights:
        own = weight if isinstance(weight, Weight) else Weight(weight)
        buckets.index_add_(0, group, (_summed(own.values) * signs).view(-1, _COLUMNS).double())
        if own.rounding is not None:
            is_rounded = True
            rounding.index_add_(0, group, _summed(own.rounding).view(-1, _COLUMNS).double())
        signs = signs.roll(_COLUMNS + 1)
    scale = buckets.abs().max().clamp_min(1e-30).float()
    values = (buckets / scale).to(torch.float16).numpy().astype("<f2")
    text = _PREFIX + base64.b64encode(scale.numpy().astype("<f4").tobytes() + values.tobytes()).decode()
    return Sketch(text, rounding.flatten().numpy() if is_rounded else None)


def difference(left: str, right: str) -> float:
    """Relative distance of two sketches: 0 for the same weights, about 1.4 for unrelated ones.

    Raises:
        ValueError: one of them is no sketch.
    """
    a, b = _decode(left), _decode(right)
    size = min(len(a), len(b))
    a, b = _folded(a, size), _folded(b, size)
    return float(np.linalg.norm(a - b)) / _norm(a, b)


def tolerance(stated: str, found: str) -> float:
    """The largest `difference` that counts as the same: `TOLERANCE`, or what the rounding of quantised ones explains.

    Args:
        stated: a sketch.
        found: that of weights in memory, as of `sketch`.

    Raises:
        ValueError: one of them is no sketch.
    """
    rounding = getattr(found, "rounding", None)
    if rounding is None:
        return TOLERANCE
    a, b = _decode(stated), _decode(found)
    size = min(len(a), len(b))
    variances = _folded(rounding, size)
    explained = variances.sum() + _DEVIATIONS * np.sqrt(2 * np.square(variances).sum())
    relative = explained / _norm(_folded(a, size), _folded(b, size)) ** 2
    return max(TOLERANCE, float(np.sqrt(relative + _CAST**2)))


def mismatch(stated: object, found: Mapping[str, str]) -> Mismatch | None:
    """The first part of a model that is not what a token's record states; None where all are.

    Args:
        stated: has one sketch an attribute, named as in ``found``: a token's ``base_model``.
        found: part -> sketch, as of ``Family.fingerprints``.

    Raises:
        ValueError: what is stated is no sketch, so nobody can tell.
    """
    for part, own in found.items():
        try:
            distance, limit = difference(getattr(stated, part), own), tolerance(getattr(stated, part), own)
        except ValueError as error:
            raise ValueError(f"base_model.{part} of its record is no fingerprint ({error})") from error
        if not distance <= limit:
            return Mismatch(part, distance, limit)
    return None


def _summed(values: Tensor) -> Tensor:
    """(period,) float32: every value at its place in the period."""
    flat = values.detach().flatten()
    whole, total = len(flat) // _PERIOD * _PERIOD, torch.zeros(_PERIOD)
    for block in torch.split(flat[:whole], _ROWS * _PERIOD):
        total += block.to("cpu", torch.float32).view(-1, _PERIOD).sum(0)
    total[: len(flat) - whole] += flat[whole:].to("cpu", torch.float32)
    return total


def _norm(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return max(float(np.linalg.norm(a)), float(np.linalg.norm(b)), 1e-30)


def _folded(buckets: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The same sketch, with fewer buckets."""
    folded: NDArray[np.float64] = buckets.reshape(-1, size).sum(0)
    return folded


def _decode(text: str) -> NDArray[np.float64]:
    """(4096,), or (64,) of an old one."""
    prefix, size = text[: len(_PREFIX)], _GROUPS * _COLUMNS
    if prefix not in (_PREFIX, _OLD_PREFIX):
        raise ValueError(f"expected {_PREFIX}..., but got {text[:16]!r}")
    data = base64.b64decode(text[len(prefix) :], validate=True)
    if prefix == _OLD_PREFIX:
        size, expected = _COLUMNS, 4 * _COLUMNS
    else:
        expected = 4 + 2 * size
    if len(data) != expected:
        raise ValueError(f"expected {size} values in a sketch, {expected} bytes, but got {len(data)}")
    if prefix == _OLD_PREFIX:
        values = np.frombuffer(data, dtype="<f4").astype(np.float64)
    else:
        values = np.frombuffer(data, dtype="<f2", offset=4) * np.frombuffer(data, dtype="<f4", count=1).astype(
            np.float64
        )
    if not np.isfinite(values).all():
        raise ValueError(f"expected {size} finite values in a sketch")
    return values
