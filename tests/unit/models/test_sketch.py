import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import GuardError
from dagkit.models.sketch import TOLERANCE, _decode, difference, sketch


def weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(320, 768, generator=generator), torch.randn(40, 77, generator=generator)]


def test_the_same_weights_in_any_precision_are_the_same() -> None:
    base = weights(0)
    own = sketch(base)
    assert own.startswith("sketch2:")
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


def test_every_weight_is_in_one_bucket_with_its_sign() -> None:
    """The sums written plainly, over tensors shorter and longer than what is read at a time."""
    generator = torch.Generator().manual_seed(3)
    period = 64 * 1021
    tensors = [torch.randn(size, generator=generator) for size in (5, 64, 2 * period, 33 * period + 17)]
    signs = torch.randint(0, 2, (period,), generator=torch.Generator().manual_seed(20250321)).numpy() * 2.0 - 1
    wanted = np.zeros(4096)
    for number, tensor in enumerate(tensors):
        place = np.arange(len(tensor)) % period
        np.add.at(wanted, place % 4096, tensor.numpy() * np.roll(signs, 65 * number)[place])
    np.testing.assert_allclose(_decode(sketch(tensors)), wanted, rtol=1e-3, atol=1e-2)
    old = wanted.reshape(64, 64).sum(0).astype("<f4")  # of tokens that were made before
    assert difference("sketch1:" + base64.b64encode(old.tobytes()).decode(), sketch(tensors)) < 1e-3


def add_in_place(weight: torch.nn.Parameter, change: torch.Tensor) -> None:
    weight.add_(change)


def add_to_data(weight: torch.nn.Parameter, change: torch.Tensor) -> None:
    """As PEFT fuses: neither object, address nor version of the parameter change."""
    before = (weight.data_ptr(), weight._version)
    weight.data += change
    assert (weight.data_ptr(), weight._version) == before


def replace_data(weight: torch.nn.Parameter, change: torch.Tensor) -> None:
    weight.data = weight.data + change


def write_through_numpy(weight: torch.nn.Parameter, change: torch.Tensor) -> None:
    weight.detach().numpy()[...] += change.numpy()


@pytest.mark.parametrize("write", [add_in_place, add_to_data, replace_data, write_through_numpy])
@pytest.mark.parametrize("part", ["text_encoder", "key_projections"])
def test_a_guard_that_was_attached_before_refuses_changed_weights(
    part: str, write: Callable[[torch.nn.Parameter, torch.Tensor], None]
) -> None:
    pipe = tiny.sd()
    guard = tiny.token(pipe).guard()
    layer = next(iter(models.match(pipe).sites(pipe).values())).projection
    weight = pipe.text_encoder.get_input_embeddings().weight if part == "text_encoder" else layer.weight
    for _ in range(2):
        with guard.attach(pipe):
            pass
    write(weight, torch.randn_like(weight) * weight.std())
    with pytest.raises(GuardError, match=f"but this pipeline .* has {part} "), guard.attach(pipe):
        pass


def test_a_guard_that_was_attached_before_refuses_a_replaced_weight() -> None:
    pipe = tiny.sd()
    guard = tiny.token(pipe).guard()
    with guard.attach(pipe):
        pass
    embedding = pipe.text_encoder.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(torch.randn_like(embedding.weight) * embedding.weight.std())
    with pytest.raises(GuardError, match="has text_encoder "), guard.attach(pipe):
        pass


@pytest.mark.parametrize("is_safe", [False, True])
@pytest.mark.parametrize(
    ("part", "name", "layers"),
    [("text_encoder", "text_encoder", ["q_proj", "v_proj"]), ("key_projections", "unet", ["to_k"])],
)
def test_a_fused_lora_is_another_model(part: str, name: str, layers: list[str], is_safe: bool) -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny.sd()
    guard = tiny.token(pipe).guard()
    module: Any = getattr(pipe, name)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=layers, init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    module.requires_grad_(False)
    with guard.attach(pipe):  # beside the weights it does not count
        pass
    for layer in module.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge(safe_merge=is_safe)
    with pytest.raises(GuardError, match=f"has {part} "), guard.attach(pipe):
        pass
