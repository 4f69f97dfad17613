"""Fingerprints of weights that survive a change of precision.

A hash of bytes would differ between the float32, float16 and bfloat16 copies of one model. A count sketch does not:
each weight is multiplied by a fixed random sign and added to one of 64 buckets, so the distance of two sketches
estimates the distance of the two weight vectors, at any precision.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUCKETS: Final = 64
TOLERANCE: Final = 0.005
"""Largest relative difference that counts as the same: a cast to bfloat16 makes 0.002, other weights about 1."""

_PERIOD: Final = 64 * 1021
_ROWS: Final = 16  # periods that are read at a time, so that they fit a processor's cache
_PREFIX: Final = "sketch1:"


def sketch(tensors: Iterable[Tensor]) -> str:
    """Sketches weights: ``sketch1:`` and base64 of 64 float32.

    Reads every weight each time. Nothing cheaper tells whether they are still the same: fusing a LoRA with PEFT
    (``weight.data += ...``) leaves object, ``data_ptr`` and ``_version`` of a parameter as they were.

    Args:
        tensors: in a fixed order; any float dtype.
    """
    signs = (torch.randint(0, 2, (_PERIOD,), generator=torch.Generator().manual_seed(20250321)) * 2 - 1).float()
    buckets = torch.zeros(BUCKETS, dtype=torch.float64)
    for tensor in tensors:
        flat = tensor.detach().flatten()
        whole, total = len(flat) // _PERIOD * _PERIOD, torch.zeros(_PERIOD)
        for block in torch.split(flat[:whole], _ROWS * _PERIOD):
            total += block.to("cpu", torch.float32).view(-1, _PERIOD).sum(0)
        total[: len(flat) - whole] += flat[whole:].to("cpu", torch.float32)
        buckets += (total * signs).view(-1, BUCKETS).sum(0, dtype=torch.float64)
        signs = signs.roll(BUCKETS + 1)
    return _PREFIX + base64.b64encode(buckets.float().numpy().tobytes()).decode()


def difference(left: str, right: str) -> float:
    """Relative distance of two sketches: 0 for the same weights, about 1.4 for unrelated ones.

    Raises:
        ValueError: one of them is no sketch.
    """
    a, b = _decode(left), _decode(right)
    scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)), 1e-30)
    return float(np.linalg.norm(a - b)) / scale


def mismatch(stated: object, found: Mapping[str, str]) -> tuple[str, float] | None:
    """The first part of a model that is not what a token's record states, and its `difference`; None where all are.

    Args:
        stated: has one sketch an attribute, named as in ``found``: a token's ``base_model``.
        found: part -> sketch, as of ``Family.fingerprints``.

    Raises:
        ValueError: what is stated is no sketch, so nobody can tell.
    """
    for part, own in found.items():
        try:
            distance = difference(getattr(stated, part), own)
        except ValueError as error:
            raise ValueError(f"base_model.{part} of its record is no fingerprint ({error})") from error
        if distance > TOLERANCE:
            return part, distance
    return None


def _decode(text: str) -> NDArray[np.float64]:
    if not text.startswith(_PREFIX):
        raise ValueError(f"expected {_PREFIX}..., but got {text[:16]!r}")
    values = np.frombuffer(base64.b64decode(text[len(_PREFIX) :], validate=True), dtype=np.float32).astype(np.float64)
    if values.shape != (BUCKETS,) or not np.isfinite(values).all():
        raise ValueError(f"expected {BUCKETS} finite values in a sketch, but got {len(values)}")
    return values
