import pytest
import torch

from dagkit.families.sketch import TOLERANCE, difference, sketch


def weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(320, 768, generator=generator), torch.randn(40, 77, generator=generator)]


def test_the_same_weights_in_any_precision_are_the_same() -> None:
    base = weights(0)
    own = sketch(base)
    assert own.startswith("sketch1:")
    assert difference(own, sketch(base)) == 0
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert difference(own, sketch([tensor.to(dtype) for tensor in base])) < TOLERANCE / 2


def test_other_weights_are_others() -> None:
    assert difference(sketch(weights(0)), sketch(weights(1))) > 0.5
    assert difference(sketch(weights(0)), sketch(weights(0)[::-1])) > 0.5


@pytest.mark.parametrize("change", [0.01, 0.03, 0.1])
def test_the_difference_estimates_the_relative_distance(change: float) -> None:
    base = weights(0)
    tuned = [tensor + change * other for tensor, other in zip(base, weights(1), strict=True)]
    assert difference(sketch(base), sketch(tuned)) == pytest.approx(change, rel=0.6)
    assert difference(sketch(base), sketch(tuned)) > TOLERANCE


def test_an_empty_model_has_a_sketch() -> None:
    assert difference(sketch([]), sketch([])) == 0


@pytest.mark.parametrize("text", ["sha256:00", "sketch1:AAAA", "sketch1:!!", ""])
def test_what_is_no_sketch_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        difference(text, sketch([]))
