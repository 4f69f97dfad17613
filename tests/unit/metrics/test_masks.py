"""Masks against hand-worked overlaps, in numpy and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dagkit.metrics import iou

FIRST = [[[True, True, False]], [[False, False, False]], [[False, False, True]]]
SECOND = [[[True, False, True]], [[False, False, False]], [[False, False, False]]]


def test_intersection_over_union() -> None:
    found = iou(torch.tensor(FIRST), torch.tensor(SECOND))
    assert (found.tolist(), found.dtype) == (pytest.approx([1 / 3, 1, 0]), torch.float32)
    assert iou(np.array(FIRST), np.array(SECOND)).tolist() == [1 / 3, 1, 0]
    assert float(iou(np.array(FIRST[0]), np.array(SECOND[0]))) == 1 / 3
