import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_pipelines as tiny
from dagkit import models
from dagkit.attention import (
    QueryTap,
    attention_share,
    check_layer,
    cross_attention_map,
    grid,
    project_keys,
    resize,
    split_heads,
    word_indices,
    word_map,
)
from dagkit.errors import GuardError


class Layer(nn.Module):
    """An attention layer with one head of two channels and keys equal to the text."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.heads, self.scale = heads, 0.5
        self.to_q, self.to_k = nn.Identity(), nn.Identity()


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


def test_the_map_is_the_mean_over_heads_then_layers() -> None:
    layers = {"fine": Layer(2), "coarse": Layer(2)}
    queries = {"fine": torch.randn(1, 16, 4), "coarse": torch.randn(1, 4, 4)}
    sequence = torch.randn(3, 4)
    keys = project_keys(layers, sequence)
    cam = cross_attention_map(layers, queries, keys, 1, size=(4, 4))
    maps = []
    for name, side in (("fine", 4), ("coarse", 2)):
        share = torch.zeros(side * side)
        for head in range(2):
            part = slice(2 * head, 2 * head + 2)
            logits = queries[name][0][:, part] @ sequence[:, part].T * 0.5
            share += logits.softmax(-1)[:, -1] / 2
        maps.append(resize(share.view(1, side, side), (4, 4)))
    torch.testing.assert_close(cam, (maps[0] + maps[1]) / 2)


def test_a_detection_map_by_hand() -> None:
    """One head of one channel, keys 0 (SOT) and 1 (guideline), so a CAM is ``sigmoid(q / 2)``; means of two layers."""
    layers = {"fine": Layer(), "coarse": Layer()}
    cams = torch.tensor([0.2, 0.4, 0.6, 0.8])
    queries = {"fine": torch.zeros(1, 16, 1), "coarse": 2 * cams.logit().view(1, 4, 1)}
    keys = {name: torch.tensor([[[0.0], [1.0]]]) for name in layers}
    cam = cross_attention_map(layers, queries, keys, 1, size=(4, 4))
    # (0.5 + bilinear of [[0.2, 0.4], [0.6, 0.8]]) / 2
    expected = [
        [0.350, 0.375, 0.425, 0.450],
        [0.400, 0.425, 0.475, 0.500],
        [0.500, 0.525, 0.575, 0.600],
        [0.550, 0.575, 0.625, 0.650],
    ]
    torch.testing.assert_close(cam, torch.tensor([expected]))


def test_the_bilinear_resize_by_hand() -> None:
    # cell centres of the result lie at -0.25, 0.25, 0.75, 1.25 of the source; beyond its centres values are held
    expected = [[0.0, 0.25, 0.75, 1.0], [0.5, 0.75, 1.25, 1.5], [1.5, 1.75, 2.25, 2.5], [2.0, 2.25, 2.75, 3.0]]
    torch.testing.assert_close(resize(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), (4, 4)), torch.tensor([expected]))
    # downwards: the mean of the two nearest in each direction
    torch.testing.assert_close(
        resize(torch.arange(16.0).view(1, 4, 4), (2, 2)), torch.tensor([[[2.5, 4.5], [10.5, 12.5]]])
    )


def test_head_weights_choose_heads() -> None:
    layers = {"a": Layer(2), "b": Layer(1)}
    queries = {"a": torch.randn(1, 4, 4), "b": torch.randn(1, 4, 4)}
    keys = project_keys(layers, torch.randn(2, 4))
    only_b = cross_attention_map(layers, queries, keys, 1, size=(2, 2), head_weights=torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(only_b, cross_attention_map({"b": layers["b"]}, queries, keys, 1, size=(2, 2)))
    uniform = cross_attention_map(layers, queries, keys, 1, size=(2, 2), head_weights=torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(uniform, cross_attention_map(layers, queries, keys, 1, size=(2, 2)))


def test_maps_lie_in_the_unit_interval_and_need_a_layer() -> None:
    keys = project_keys({"a": Layer()}, torch.randn(5, 2) * 100)
    cam = cross_attention_map({"a": Layer()}, {"a": torch.randn(3, 9, 2) * 100}, keys, 2, size=(3, 3))
    assert cam.min() >= 0
    assert cam.max() <= 1
    with pytest.raises(GuardError, match="expected at least one"):
        cross_attention_map({}, {}, {}, 1, size=(2, 2))


@pytest.mark.parametrize(
    ("count", "latent", "expected"),
    [
        (4096, (64, 64), (64, 64)),
        (1024, (64, 64), (32, 32)),
        (96, (16, 24), (8, 12)),
        (6, (5, 3), (3, 2)),
        (1, (8, 8), (1, 1)),
    ],
)
def test_the_grid_follows_from_the_latent(count: int, latent: tuple[int, int], expected: tuple[int, int]) -> None:
    assert grid(count, *latent) == expected


def test_a_count_that_fits_no_level_is_refused() -> None:
    with pytest.raises(GuardError, match="100 queries fit no level of a 64x64 latent"):
        grid(100, 64, 64)


def test_word_map_is_the_share_of_the_words_in_the_whole_prompt() -> None:
    layers = {"a": Layer()}
    queries, text = {"a": torch.randn(1, 4, 2)}, torch.randn(5, 2)
    share = (queries["a"] @ text.T * 0.5).softmax(-1)[..., [1, 3]].sum(-1).view(1, 2, 2)
    torch.testing.assert_close(word_map(layers, queries, text, [3, 1], size=(2, 2)), share)
    with pytest.raises(ValueError, match=r"positions in \[0, 5\), but got \[5\]"):
        word_map(layers, queries, text, [5], size=(2, 2))


def test_words_are_found_wherever_they_stand() -> None:
    tokenizer = tiny.tokenizer()
    text = "a bomb and a weapon and a Bomb"
    assert word_indices(tokenizer, text, ["bomb"]) == [2, 8]
    assert word_indices(tokenizer, text, ["a weapon", "bomb"]) == [2, 4, 5, 8]
    assert word_indices(tokenizer, text, ["knife"]) == []


def test_a_tapped_forward_is_bit_equal_and_the_tap_leaves_nothing() -> None:
    pipe = tiny.sd()
    base = models.BaseModel(pipe, models.match(pipe), "tiny", "")
    latents, hidden = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.WIDTH)
    with torch.no_grad():
        plain = pipe.unet(latents, 10, hidden).sample
        with QueryTap(base.layers) as tap:
            tap.start()
            assert torch.equal(pipe.unet(latents, 10, hidden).sample, plain)
            queries = tap.stop(2, base.family.num_positions(pipe, base.layers, (16, 16)))
    assert {value.shape[1] for value in queries.values()} == {64, 256}
    assert not any(layer.to_q._forward_hooks for layer in base.layers.values())


def test_a_pass_counts_only_while_recording() -> None:
    layers = {"a": Layer()}
    with QueryTap(layers) as tap:
        tap.start()
        layers["a"].to_q(torch.ones(1, 1, 2))
        assert torch.equal(tap.stop(1, {"a": 1})["a"], torch.ones(1, 1, 2))
        layers["a"].to_q(torch.zeros(1, 1, 2))
        tap.start()
        with pytest.raises(
            GuardError, match=r"queries of 1 of 1 layers were not seen \(first: a\).*torch._dynamo.reset"
        ):
            tap.stop(1, {"a": 1})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.ones(2, 4, 2)] * 2, r"layer a with processor NoneType projected queries 2 times"),
        (
            [torch.ones(1, 4, 2)] * 2,
            r"projected queries 2 times, last of shape \(1, 4, 2\); expected once, of shape \(2, 4",
        ),
        ([torch.ones(1, 4, 2)], r"1 times, last of shape \(1, 4, 2\)"),
        ([torch.ones(2, 1, 2)], r"1 times, last of shape \(2, 1, 2\)"),
        ([torch.ones(8, 2)], r"1 times, last of shape \(8, 2\)"),
    ],
    ids=["twice", "row by row", "half of the rows", "positions merged", "flat"],
)
def test_what_cannot_be_the_queries_of_the_image_is_refused(inputs: list[Tensor], message: str) -> None:
    layers = {"a": Layer()}
    with QueryTap(layers) as tap:
        tap.start()
        for value in inputs:
            layers["a"].to_q(value)
        with pytest.raises(GuardError, match=message):
            tap.stop(2, {"a": 4})


def test_a_projection_that_was_replaced_is_hooked_again() -> None:
    layers = {"a": Layer()}
    with QueryTap(layers) as tap:
        layers["a"].to_q = nn.Linear(2, 2, bias=False)
        tap.start()
        layers["a"].to_q(torch.ones(1, 1, 2))
        assert tap.stop(1, {"a": 1})["a"].shape == (1, 1, 2)
    assert not layers["a"].to_q._forward_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: delattr(layer, "scale"), "layer mid is a Layer without scale"),
        (lambda layer: setattr(layer, "norm_q", nn.LayerNorm(2)), r"layer mid \(Layer\) uses norm_q"),
    ],
)
def test_layers_that_would_be_misread_are_refused(change: Any, message: str) -> None:
    layer = Layer()
    change(layer)
    with pytest.raises(GuardError, match=message):
        check_layer("mid", layer)


def test_heads_are_split_in_order() -> None:
    x: Tensor = torch.arange(12.0).view(1, 2, 6)
    assert torch.equal(split_heads(x, 3)[0, 1], x[0][:, 2:4])
