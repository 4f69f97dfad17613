"""Each equation against a case computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dagkit import guidance


def field(*rows: list[float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def eps(value: float) -> Tensor:
    return torch.full((1, 1, 2, 2), float(value))


def test_the_gate_opens_at_its_threshold() -> None:
    cam = field([0.0, 0.01], [0.0099, 0.5])
    assert torch.equal(guidance.edit_gate(cam, 0.01), field([0, 1], [0, 1]))


def test_a_gate_over_most_of_the_image_is_shut() -> None:
    cam = torch.full((1, 10, 10), 0.5)
    cam[0, :2] = 0  # 80 % remain
    assert guidance.edit_gate(cam, 0.01).sum() == 80
    cam[0, 0, 0] = 0.5  # 81 %
    assert guidance.edit_gate(cam, 0.01).sum() == 0


def test_area_grows_with_each_component_alone() -> None:
    cam = field([0.9, 0.9, 0.0, 0.6], [0.9, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.49])
    # components (4-connected): 3 cells, 1 cell, 1 cell (touching only at a corner); 5 * area / 16
    expected = field([15, 15, 0, 5], [15, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]) / 16
    torch.testing.assert_close(guidance.area_scale(cam, 0.5), expected)


def test_magnitude_is_capped() -> None:
    cam = field([0.0, 0.01, 0.025, 0.9])
    torch.testing.assert_close(guidance.magnitude_scale(cam, 0.01), field([0.0, 1.0, 2.5, 5.0]))


def test_the_papers_scale_by_hand() -> None:
    cam = field([0.6, 0.02], [0.005, 0.0])
    # highlighted: one of 4 cells -> 5/4, magnitude 5; editing region: own 5/4 * magnitude 2; below 0.01: nothing
    torch.testing.assert_close(guidance.paper_scale(cam), field([6.25, 2.5], [0, 0]))


def test_the_papers_scale_prefers_the_larger_area() -> None:
    cam = field([0.6, 0.6], [0.02, 0.0])
    torch.testing.assert_close(guidance.paper_scale(cam), field([12.5, 12.5], [2.5, 0]))


def test_the_soft_gate_is_a_ramp_that_grows() -> None:
    cam = field([0.1, 0.2, 0.3, 0.0])
    torch.testing.assert_close(guidance.soft_gate(cam, 0.1, 0.3), field([0.0, 0.5, 1.0, 0.0]))
    torch.testing.assert_close(guidance.soft_gate(cam, 0.1, 0.3, dilation=1), field([0.5, 1.0, 1.0, 1.0]))


def test_both_ends_of_the_soft_gate_rise_to_what_they_are_at_least() -> None:
    cam = field([0.1, 0.2, 0.3, 0.45]).expand(2, -1, -1)
    gates = guidance.soft_gate(cam, 0.1, 0.3, least=torch.tensor([0.6, 0.2]))
    torch.testing.assert_close(gates, torch.cat([field([0.0, 0.0, 0.25, 0.625]), field([0.0, 0.5, 1.0, 1.0])]))


def test_a_ramp_without_width_is_a_step() -> None:
    assert torch.equal(guidance.soft_gate(field([0.29, 0.31]), 0.3, 0.3), field([0.0, 1.0]))


@pytest.mark.parametrize(("elapsed", "expected"), [(0, [0.3, 0.8]), (0.04, [0.3, 0.4]), (0.02, [0.3, 0.8 * 0.5**0.5])])
def test_a_gate_is_remembered_for_noise_levels_not_for_calls(elapsed: float, expected: list[float]) -> None:
    gate, last = field([0.3, 0.2]), field([0.1, 0.8])
    torch.testing.assert_close(guidance.remember(gate, last, 0.5, elapsed), field(expected))


def test_many_steps_remember_as_long_as_few() -> None:
    shut, many = field([0.0, 0.0]), field([1.0, 0.5])
    few = guidance.remember(shut, many, 0.9, 0.12)
    for _ in range(6):
        many = guidance.remember(shut, many, 0.9, 0.02)
    torch.testing.assert_close(many, few)


@pytest.mark.parametrize(("elapsed", "expected"), [(0, 1.0), (0.15, 1.0), (0.25, 1.25), (0.35, 1.5), (0.75, 2.5)])
def test_insisting_begins_after_a_while_and_grows(elapsed: float, expected: float) -> None:
    assert guidance.insist(0.5, elapsed) == pytest.approx(expected)
    assert guidance.insist(0.0, elapsed) == 1.0


def test_drop_takes_a_strength_for_each_sample() -> None:
    gate, strengths = torch.ones(2, 2, 2), torch.tensor([1.0, 2.5])
    each = guidance.drop(*(eps(value).repeat(2, 1, 1, 1) for value in (3, 1, 2)), gate, strengths)
    for sample, strength in enumerate(strengths.tolist()):
        torch.testing.assert_close(each[sample : sample + 1], guidance.drop(eps(3), eps(1), eps(2), gate[:1], strength))


@pytest.mark.parametrize(("min_area", "expected"), [(0.0, 0.9), (0.25, 0.9), (0.26, 0.5), (0.5, 0.5), (1.0, 0.1)])
def test_the_score_is_what_an_area_reaches(min_area: float, expected: float) -> None:
    assert guidance.score(field([0.1, 0.9], [0.5, 0.3]), min_area).item() == pytest.approx(expected)


@given(st.floats(0.0, 1.0), st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_the_score_reaches_a_threshold_exactly_where_the_area_does(
    min_area: float, highlight: float, seed: int
) -> None:
    cam = torch.rand((1, 5, 5), generator=torch.Generator().manual_seed(seed))
    wanted = max(min_area * 25 - 1e-6, 1e-9)
    assert bool(guidance.score(cam, min_area) >= highlight) == bool((cam >= highlight).sum() >= wanted)


def test_subtract_by_hand() -> None:
    scale = field([0.0, 1.0], [2.0, 0.5])
    # eps_p - scale * (eps_cs - eps_u) = 3 - scale * (2 - 1)
    torch.testing.assert_close(guidance.subtract(eps(3), eps(1), eps(2), scale)[0, 0], 3 - scale[0])


def test_drop_by_hand() -> None:
    gate = field([0.0, 1.0], [0.5, 0.0])
    # 3 - gate * ((3 - 1) + 1.5 * (2 - 1))
    torch.testing.assert_close(guidance.drop(eps(3), eps(1), eps(2), gate, 1.5)[0, 0], 3 - gate[0] * 3.5)


@given(st.sampled_from(["subtract", "drop"]), st.floats(0, 3), st.floats(0, 1))
def test_weights_are_affine_and_sum_to_one(form: str, strength: float, gate: float) -> None:
    """Adding a constant to all three predictions adds it to the result: so epsilon, v and sample prediction agree."""
    scale = torch.full((1, 2, 2), gate)
    run = guidance.subtract if form == "subtract" else guidance.drop
    options = () if form == "subtract" else (strength,)
    one = run(eps(3) + 7, eps(1) + 7, eps(2) + 7, scale, *options)
    torch.testing.assert_close(one, run(eps(3), eps(1), eps(2), scale, *options) + 7, atol=1e-4, rtol=1e-5)


def test_a_guided_step_by_hand() -> None:
    """The whole equation: eps_u + s_g * ((eps_p - eps_u) - S * M * (eps_cs - eps_u)) with s_g = 7.5."""
    eps_p, eps_u, eps_cs = eps(3), eps(1), eps(2)
    # S * M is 6.25 (area 5/4, magnitude 5), 2.5 (area 5/4, magnitude 2), 0, 0
    scale = guidance.paper_scale(field([0.6, 0.02], [0.005, 0.0]))
    guided = eps_u + 7.5 * (guidance.subtract(eps_p, eps_u, eps_cs, scale) - eps_u)
    torch.testing.assert_close(guided, torch.tensor([[[[-30.875, -2.75], [16.0, 16.0]]]]))
    # drop: eps_u + s_g * ((1 - gate) * (eps_p - eps_u) - gate * 1.5 * (eps_cs - eps_u)) at gates 1, 0.5, 0
    dropped = guidance.drop(eps_p, eps_u, eps_cs, field([1.0, 0.5], [0.0, 0.0]), 1.5)
    torch.testing.assert_close(eps_u + 7.5 * (dropped - eps_u), torch.tensor([[[[-10.25, 2.875], [16.0, 16.0]]]]))


def test_a_masked_push_by_hand() -> None:
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 1.0]]]])
    scale = field([2.0, 2.0], [2.0, 0.0])[:, None] * mask
    # 3 - scale * (2 - 1)
    torch.testing.assert_close(
        guidance.subtract(eps(3), eps(1), eps(2), scale), torch.tensor([[[[1.0, 2.0], [3.0, 3.0]]]])
    )


def test_several_guards_by_hand() -> None:
    gates = field([1.0, 0.5], [0.0, 0.0]), field([0.5, 1.0], [0.0, 0.5])
    first = guidance.drop(eps(3), eps(1), eps(2), gates[0], 1.5)  # push 1.5 * gate
    second = guidance.drop(eps(3), eps(1), eps(5), gates[1], 0.25)  # push 1 * gate
    third = guidance.subtract(eps(3), eps(1), eps(1.5), torch.full((1, 2, 2), 0.2))  # push 0.1
    # 3 - max gate * (3 - 1) - pushes (2, 1.75, 0, 0.5) - 0.1
    expected = torch.tensor([[[[-1.1, -0.85], [2.9, 1.4]]]])
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        guided, own = [(first, second, third)[i] for i in order], [(*gates, None)[i] for i in order]
        torch.testing.assert_close(guidance.combine(eps(3), eps(1), guided, own), expected)
    torch.testing.assert_close(guidance.combine(eps(3), eps(1), [first], [gates[0]]), first)
    torch.testing.assert_close(guidance.combine(eps(3), eps(1), [third, third], [None, None]), eps(2.8))
    one = guidance.combine(eps(3)[0], eps(1)[0], [first[0], second[0]], [gates[0][0], gates[1][0]])
    torch.testing.assert_close(one, expected[0] + 0.1)


def test_slds_mask_by_hand() -> None:
    eps_cs = torch.tensor([[[[2.3, 1.6], [1.5, 7.0]]]])
    # 2 - eps_cs = -0.3, 0.4, 0.5, -5: twice the size, at most 1, and 0 from the threshold 0.5 on
    torch.testing.assert_close(guidance.sld_mask(eps(2), eps_cs, 2.0, 0.5), torch.tensor([[[[0.6, 0.8], [0.0, 1.0]]]]))


def test_segas_mask_by_hand() -> None:
    push = torch.tensor([[[[1.0, -2.0], [3.0, -4.0]], [[0.0, 0.0], [0.1, 9.0]]]])
    # the median size is 2.5 in the first channel and 0.05 in the second
    assert torch.equal(
        guidance.sega_mask(push, 0.5), torch.tensor([[[[False, False], [True, True]], [[False, False], [True, True]]]])
    )
    assert guidance.sega_mask(push, 0.9).sum((0, 2, 3)).tolist() == [1, 1]


def test_half_precision_stays_half_precision() -> None:
    gate = torch.ones(1, 2, 2)
    assert guidance.drop(eps(3).half(), eps(1).half(), eps(2).half(), gate).dtype == torch.float16


def test_sld_by_hand() -> None:
    preset = guidance.SLDPreset(
        guidance_scale=2.0, warmup_steps=1, threshold=0.5, momentum_scale=0.5, momentum_beta=0.4
    )
    zero = torch.zeros(1, 1, 2, 2)
    # p - cs = -0.3 < 0.5: scale min(0.6, 1) = 0.6; push = (2.3 - 1) * 0.6 = 0.78; step 0 is warm-up
    changed, momentum = guidance.sld(eps(2), eps(1), eps(2.3), zero, preset, 0)
    torch.testing.assert_close(changed, eps(2))
    torch.testing.assert_close(momentum, eps(0.6 * 0.78))
    changed, _ = guidance.sld(eps(2), eps(1), eps(2.3), momentum, preset, 1)
    torch.testing.assert_close(changed, eps(2 - (0.78 + 0.5 * 0.468)))
    # p - cs = 1 >= 0.5: already away from the concept, no push
    changed, _ = guidance.sld(eps(3), eps(1), eps(2), zero, preset, 1)
    torch.testing.assert_close(changed, eps(3))


def test_sega_by_hand() -> None:
    preset = guidance.SEGAPreset(
        edit_guidance_scale=2.0, warmup_steps=0, threshold=0.5, momentum_scale=0.1, momentum_beta=0.4
    )
    cs = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    # push 2 * (0 - cs) = -2, -4, -6, -8; the median of its size is 5: two remain; divided by the guidance scale 4
    changed, momentum = guidance.sega(eps(1), eps(0), cs, torch.zeros_like(cs), preset, 0, 4.0)
    torch.testing.assert_close(changed, torch.tensor([[[[1.0, 1.0], [-0.5, -1.0]]]]))
    torch.testing.assert_close(momentum, torch.tensor([[[[0.0, 0.0], [-3.6, -4.8]]]]))


@pytest.mark.parametrize(("scale", "factor"), [(1.25, 4.0), (5.0, 1.0), (7.5, 1.0)])
def test_a_push_reaches_as_far_as_at_scale_5(scale: float, factor: float) -> None:
    assert guidance.reach(scale) == factor
    assert scale * guidance.reach(scale) >= 5.0


def test_what_is_found_late_is_pushed_harder() -> None:
    assert [guidance.hurry(since) for since in (0.77, 0.65, 0.575, 0.5, 0.02)] == pytest.approx([1, 1, 1.5, 2, 2])


@pytest.mark.parametrize(
    ("timestep", "schedule", "acts"),
    [
        (770, [770, 0], True),
        (801, [801, 751, 0], False),  # of 20 steps: 19 of 50 timesteps lie at or below 770
        (831, [831, 665, 0], True),  # of 6 steps: 105 of 166
        (850, [850, 800], False),  # the run ends above
        (999, [999, 500, 0], True),
    ],
)
def test_a_long_step_counts_where_most_of_it_lies(timestep: float, schedule: list[float], acts: bool) -> None:
    assert guidance.is_acting(timestep / 1000, [one / 1000 for one in schedule], 0.77) is acts
