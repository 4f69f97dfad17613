import math

import pytest
import torch
from torch import Tensor

from dagkit.attention import attention_share, resize, shares, split_heads


def test_one_guideline_row_beside_the_sink_is_a_sigmoid() -> None:
    queries = torch.randn(2, 3, 5, 4)
    keys = torch.randn(3, 2, 4)
    share = attention_share(queries, keys, 1, 0.5)
    logits = torch.einsum("bhnd,hd->bhn", queries, keys[:, 1] - keys[:, 0]) * 0.5
    torch.testing.assert_close(share, logits.sigmoid())


def test_the_share_of_a_hand_computed_case() -> None:
    # logits ln 1, ln 2, ln 5 over [SOT, background, guideline]: the share is 5 / 8; with two guideline rows 7 / 8
    queries = torch.tensor([[[[1.0]]]])
    keys = torch.tensor([[[0.0], [math.log(2)], [math.log(5)]]])
    assert attention_share(queries, keys, 1, 1.0).item() == pytest.approx(5 / 8)
    assert attention_share(queries, keys, 2, 1.0).item() == pytest.approx(7 / 8)


def test_the_share_of_half_precision_queries_is_computed_in_float32() -> None:
    share = attention_share(torch.randn(1, 1, 4, 2).half(), torch.randn(1, 3, 2).half(), 1, 0.5)
    assert share.dtype == torch.float32


def test_the_bilinear_resize_by_hand() -> None:
    # cell centres of the result lie at -0.25, 0.25, 0.75, 1.25 of the source; beyond its centres values are held
    expected = [[0.0, 0.25, 0.75, 1.0], [0.5, 0.75, 1.25, 1.5], [1.5, 1.75, 2.25, 2.5], [2.0, 2.25, 2.75, 3.0]]
    torch.testing.assert_close(resize(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), (4, 4)), torch.tensor([expected]))
    # downwards: the mean of the two nearest in each direction
    torch.testing.assert_close(
        resize(torch.arange(16.0).view(1, 4, 4), (2, 2)), torch.tensor([[[2.5, 4.5], [10.5, 12.5]]])
    )


def test_heads_are_split_in_order() -> None:
    x: Tensor = torch.arange(12.0).view(1, 2, 6)
    assert torch.equal(split_heads(x, 3)[0, 1], x[0][:, 2:4])


def test_shares_are_a_softmax_of_which_the_last_rows_are_the_concepts() -> None:
    queries, keys = torch.randn(2, 3, 5, 4), torch.randn(3, 6, 4)
    each = shares(queries, keys, 0.5)
    torch.testing.assert_close(each.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(each[..., -2:].sum(-1), attention_share(queries, keys, 2, 0.5))
