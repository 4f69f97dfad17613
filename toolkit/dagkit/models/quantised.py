"""Weights as a layer computes with them, however they are stored: fp8, torchao, GGUF, bitsandbytes.

Whoever asks whose weights these are needs their values, and how far rounding may have moved each: a quantised copy of a
model is that model, and a fine-tuned one is not. What is stored in a way that is not known here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from dagkit.errors import ModelError

_PLAIN: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LEGACY_GGUF: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # blocks that begin with their step, a float16
_GGUF_BLOCK: Final = 32


class Weight(NamedTuple):
    """One weight.

    Attributes:
        values: in any shape, of a float dtype: what the layer multiplies with.
        rounding: mean square of what rounding moved each value by, float32 in the shape of ``values``; None where they
            are in one of torch's plain precisions.
    """

    values: Tensor
    rounding: Tensor | None = None


def weights_of(module: nn.Module, rows: Mapping[nn.Module, int] | None = None) -> Iterator[Weight]:
    """A module's weights one by one, in the order of their names, without a LoRA that is loaded on it.

    Args:
        module: whose.
        rows: how many rows of a layer's weight count, where not all do.

    Raises:
        ModelError: one is stored in a way that is not known.
    """
    for name, parameter in sorted(module.named_parameters()):
        if "lora_" not in name:
            owner = module.get_submodule(name.rpartition(".")[0])
            weight = _read(owner, parameter)
            if rows and owner in rows:
                values, rounding = weight
                weight = Weight(values[: rows[owner]], None if rounding is None else rounding[: rows[owner]])
            yield weight


def stored(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight lies in: itself, or the parts of a subclass."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return [part for name in names for part in stored(getattr(weight, name))]
    return [weight.detach().as_subclass(Tensor)]


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a module's inputs must have: not the one that its weights are stored in.

    Args:
        module: a layer, with what is loaded on it.
        default: where it does not tell.
    """
    for part in module.modules():
        hooks = getattr(part, "_diffusers_hook", None)
        casting = None if hooks is None else hooks.get_hook("layerwise_casting")
        dtype = getattr(part if casting is None else casting, "compute_dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return next((weight.dtype for weight in module.parameters() if weight.dtype in _PLAIN), default)


def check_plain(modules: Iterable[nn.Module]) -> None:
    """Refuses weights that are quantised, for what must be exact.

    Raises:
        ModelError: some are.
    """
    for module in modules:
        for weight in module.parameters():
            if weight.dtype not in _PLAIN or type(weight) not in (nn.Parameter, Tensor):
                raise ModelError(
                    f"a {type(module).__name__} has weights that are quantised ({_kind(weight)}), but a token is "
                    "optimised on the model's own, and guards quantised copies then. Load the model without "
                    "quantisation."
                )


def _read(owner: Any, weight: Any) -> Weight:
    """A parameter of a module."""
    if hasattr(weight, "quant_type") and hasattr(weight, "as_tensor"):
        return _gguf(owner, weight)
    if hasattr(weight, "__tensor_flatten__"):
        return _torchao(owner, weight)
    if weight.dtype in _PLAIN:
        return Weight(weight.detach())
    if type(weight).__name__ == "Params4bit":
        return _four_bits(owner, weight)
    if type(weight).__name__ == "Int8Params":
        return _eight_bits(owner, weight)
    if type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() == 1:
        return Weight(weight.detach().float(), _float_rounding(weight.detach()))
    raise _unknown(owner, weight)


def _gguf(owner: object, weight: Any) -> Weight:
    """Blocks of 32 values with one step each; types with steps in steps are not known here."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    values: Tensor = dequantize_gguf_tensor(weight).detach()
    kind = getattr(weight.quant_type, "name", str(weight.quant_type))
    if kind in ("F32", "F16", "BF16"):
        return Weight(values)
    if kind not in _LEGACY_GGUF:
        raise _unknown(owner, weight, kind)
    blocks = weight.as_tensor().detach().view(torch.uint8).reshape(values.numel() // _GGUF_BLOCK, -1)
    step = blocks[:, :2].contiguous().view(torch.float16).float()
    return Weight(values, (step.square() / 12).expand(-1, _GGUF_BLOCK).reshape(values.shape))


def _torchao(owner: object, weight: Any) -> Weight:
    """Int8 and float8 of torchao: one integer or float8 a value, times a scale a block."""
    data, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if data is None or scale is None or data.shape != weight.shape or scale.dim() != data.dim():
        raise _unknown(owner, weight)
    if any(side % part for side, part in zip(data.shape, scale.shape, strict=True)):
        raise _unknown(owner, weight)
    for axis, (side, part) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = scale.repeat_interleave(side // part, axis)
    rounding = _float_rounding(data) if data.is_floating_point() else torch.full(data.shape, 1 / 12, device=data.device)
    return Weight(weight.dequantize().detach(), rounding * scale.float().square())


def _eight_bits(owner: Any, weight: Any) -> Weight:
    """LLM.int8() of bitsandbytes: rows times their largest value."""
    scale = next((one for one in (weight.SCB, owner.state.SCB) if one is not None), None)
    if scale is None:
        raise _unknown(owner, weight)
    step = scale.float()[:, None] / 127
    return Weight(weight.detach().as_subclass(Tensor) * step, (step.square() / 12).expand(weight.shape))


def _four_bits(owner: object, weight: Any) -> Weight:
    """Of bitsandbytes, nf4 and fp4: the nearest of 16 values, times the largest value of a block."""
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    state = weight.quant_state
    if state is None:
        raise _unknown(owner, weight)
    values = dequantize_4bit(weight.detach().as_subclass(Tensor), state).float()
    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(largest, state.state2) + state.offset
    flat = values.flatten()
    blocks = largest.float()
    largest = blocks.repeat_interleave(state.blocksize)[: len(flat)].clamp_min(1e-30)
    code = state.code.to(flat.device, torch.float32).unique()
    borders = (code[1:] + code[:-1]) / 2
    index = torch.bucketize(flat / largest, borders)
    # the mean in each cell, of weights that are spread like a normal distribution
    places = torch.linspace(-1, 1, 8193, device=flat.device)
    cells, density = torch.bucketize(places, borders), (-places.square() / (flat / largest).square().mean() / 2).exp()
    squares, sums = torch.zeros_like(code), torch.zeros_like(code)
    squares.index_add_(0, cells, density * (places - code[cells]).square())
    squares /= sums.index_add_(0, cells, density)
    ends = (index == 0) | (index == len(code) - 1)  # one a block is the largest value itself, and exact
    squares[[0, -1]] *= max(1 - len(blocks) / max(int(ends.sum()), 1), 0)
    return Weight(values, (squares[index] * largest.square()).view(values.shape))


def _float_rounding(values: Tensor) -> Tensor:
    """Mean square of the rounding to a float dtype: a twelfth of the square of its step at each value."""
    limits = torch.finfo(values.dtype)
    mantissa, exponent = torch.frexp(values.float().abs())
    smallest = math.frexp(limits.smallest_normal)[1]
    exponent = exponent.where(mantissa > 0, smallest).clamp_min(smallest)
    step = torch.ldexp(torch.full_like(mantissa, limits.eps / 2), exponent)
    # below a power of two the step is half as long
    share = torch.where((mantissa == 0.5) & (exponent > smallest), 1 / 16, 1 / 12)
    return share * step.square()


def _kind(weight: Tensor) -> str:
    name = type(weight).__name__
    return str(weight.dtype).removeprefix("torch.") if name in ("Parameter", "Tensor") else name


def _unknown(owner: object, weight: Tensor, kind: str | None = None) -> ModelError:
    return ModelError(
        f"weights of a {type(owner).__name__} are stored as {kind or _kind(weight)}, and how that rounds is not known "
        "here, so nobody can tell whose they are. Load them unquantised, in float8, int8 or float8 of torchao, Q8_0 of "
        "GGUF, or with bitsandbytes; or pass allow_other_model=True if you know that they are the token's model's."
    )
