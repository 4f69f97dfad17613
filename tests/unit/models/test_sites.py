from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_pipelines as tiny
from dagkit import models
from dagkit.attention import resize
from dagkit.errors import GuardError
from dagkit.models.cross_attention import CrossAttention
from dagkit.models.sites import Detector, Sites, Tap


class Layer(nn.Module):
    """An attention layer with one head of two channels and keys equal to the text."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.heads, self.scale = heads, 0.5
        self.to_q, self.to_k = nn.Identity(), nn.Identity()


def site(name: str, layer: Layer | None = None, *, coarser: int = 1) -> CrossAttention:
    return CrossAttention(name, layer or Layer(), lambda size: (size[0] // coarser, size[1] // coarser))


def test_the_map_is_the_mean_over_heads_then_layers() -> None:
    sites = Sites([site("fine", Layer(2)), site("coarse", Layer(2), coarser=2)])
    queries = {"fine": torch.randn(1, 16, 4), "coarse": torch.randn(1, 4, 4)}
    sequence = torch.randn(3, 4)
    cam = Detector(sites, sequence, 1)(queries, (4, 4))
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
    sites = Sites([site("fine"), site("coarse", coarser=2)])
    cams = torch.tensor([0.2, 0.4, 0.6, 0.8])
    queries = {"fine": torch.zeros(1, 16, 1), "coarse": 2 * cams.logit().view(1, 4, 1)}
    keys = {name: torch.tensor([[[0.0], [1.0]]]) for name in sites}
    cam = sites.detection_map(queries, keys, 1, size=(4, 4))
    # (0.5 + bilinear of [[0.2, 0.4], [0.6, 0.8]]) / 2
    expected = [
        [0.350, 0.375, 0.425, 0.450],
        [0.400, 0.425, 0.475, 0.500],
        [0.500, 0.525, 0.575, 0.600],
        [0.550, 0.575, 0.625, 0.650],
    ]
    torch.testing.assert_close(cam, torch.tensor([expected]))


def test_head_weights_choose_heads() -> None:
    a, b = site("a", Layer(2)), site("b")
    queries = {"a": torch.randn(1, 4, 4), "b": torch.randn(1, 4, 4)}
    rows = torch.randn(2, 4)
    only_b = Detector(Sites([a, b]), rows, 1, torch.tensor([0.0, 0.0, 1.0]))(queries, (2, 2))
    torch.testing.assert_close(only_b, Detector(Sites([b]), rows, 1)(queries, (2, 2)))
    uniform = Detector(Sites([a, b]), rows, 1, torch.tensor([0.25, 0.25, 0.5]))(queries, (2, 2))
    torch.testing.assert_close(uniform, Detector(Sites([a, b]), rows, 1)(queries, (2, 2)))


def test_maps_lie_in_the_unit_interval_and_need_a_layer() -> None:
    cam = Detector(Sites([site("a")]), torch.randn(5, 2) * 100, 2)({"a": torch.randn(3, 9, 2) * 100}, (3, 3))
    assert cam.min() >= 0
    assert cam.max() <= 1
    with pytest.raises(GuardError, match="expected at least one"):
        Sites([])


def test_a_tapped_forward_is_bit_equal_and_the_tap_leaves_nothing() -> None:
    pipe = tiny.sd()
    base = models.BaseModel(pipe, models.match(pipe), "tiny", "")
    latents, hidden = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.WIDTH)
    with torch.no_grad():
        plain = pipe.unet(latents, 10, hidden).sample
        with Tap(base.sites) as tap:
            tap.start()
            assert torch.equal(pipe.unet(latents, 10, hidden).sample, plain)
            features = tap.stop(2, (16, 16))
    assert {value.shape[1] for value in features.values()} == {64, 256}
    assert not any(site.tapped._forward_hooks for site in base.sites.values())


def test_a_pass_counts_only_while_recording() -> None:
    layer = Layer()
    with Tap({"a": site("a", layer)}) as tap:
        tap.start()
        layer.to_q(torch.ones(1, 1, 2))
        assert torch.equal(tap.stop(1, (1, 1))["a"], torch.ones(1, 1, 2))
        layer.to_q(torch.zeros(1, 1, 2))
        tap.start()
        with pytest.raises(
            GuardError, match=r"queries of 1 of 1 layers were not seen \(first: a\).*torch._dynamo.reset"
        ):
            tap.stop(1, (1, 1))


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
    layer = Layer()
    with Tap({"a": site("a", layer)}) as tap:
        tap.start()
        for value in inputs:
            layer.to_q(value)
        with pytest.raises(GuardError, match=message):
            tap.stop(2, (2, 2))


def test_a_projection_that_was_replaced_is_hooked_again() -> None:
    layer = Layer()
    with Tap({"a": site("a", layer)}) as tap:
        layer.to_q = nn.Linear(2, 2, bias=False)
        tap.start()
        layer.to_q(torch.ones(1, 1, 2))
        assert tap.stop(1, (1, 1))["a"].shape == (1, 1, 2)
    assert not layer.to_q._forward_hooks


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
        site("mid", layer).check()
