"""Ways to store the weights of a model, and a fine-tune of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from torch import nn


def fine_tuned(pipe: Any, share: float, part: str = "unet") -> Any:
    """A copy in which each matrix of a part is moved by noise of this share of its size."""
    other = copy.copy(pipe)
    tuned = copy.deepcopy(getattr(pipe, part))
    generator = torch.Generator().manual_seed(9)
    for weight in tuned.parameters():
        if weight.dim() > 1:
            weight.data += share * weight.std() * torch.randn(weight.shape, generator=generator)
    setattr(other, part, tuned)
    return other


def with_denoiser(pipe: Any, unet: Any) -> Any:
    other = copy.copy(pipe)
    other.unet = unet
    return other


def layers(unet: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of all linear layers."""
    return [
        (parent, name, layer)
        for parent in unet.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]


def fp16(pipe: Any, _: Path) -> Any:
    return with_denoiser(pipe, copy.deepcopy(pipe.unet).half().float())


def bf16(pipe: Any, _: Path) -> Any:
    return with_denoiser(pipe, copy.deepcopy(pipe.unet).bfloat16().float())


def fp8(pipe: Any, _: Path) -> Any:
    """diffusers' layerwise casting."""
    unet = copy.deepcopy(pipe.unet)
    cast(unet, torch.float32)
    return with_denoiser(pipe, unet)


def cast(unet: Any, compute_dtype: torch.dtype) -> None:
    """Switches layerwise casting to fp8 on."""
    if not hasattr(unet, "enable_layerwise_casting"):
        pytest.skip("this release of diffusers has no layerwise casting")
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)


def torchao_int8(pipe: Any, folder: Path) -> Any:
    """Loaded with diffusers' TorchAoConfig."""
    pytest.importorskip("torchao", exc_type=ImportError)
    if Version(diffusers.__version__) < Version("0.35"):
        pytest.skip("this release of diffusers takes no configuration objects of torchao")
    from diffusers import TorchAoConfig, UNet2DConditionModel
    from torchao.quantization import Int8WeightOnlyConfig

    pipe.unet.save_pretrained(folder / "unet")
    unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", torch_dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    return with_denoiser(pipe, unet.requires_grad_(False))


def torchao_float8(pipe: Any, _: Path) -> Any:
    pytest.importorskip("torchao", exc_type=ImportError)
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    unet = copy.deepcopy(pipe.unet)
    quantize_(unet, Float8WeightOnlyConfig())
    return with_denoiser(pipe, unet)


def gguf(kind: str) -> Callable[[Any, Path], Any]:
    """A single file of diffusers' names, loaded with its GGUFQuantizationConfig."""

    def store(pipe: Any, folder: Path) -> Any:
        library = pytest.importorskip("gguf")
        from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

        linear = {f"{name}.weight" for name, layer in pipe.unet.named_modules() if type(layer) is nn.Linear}
        writer = library.GGUFWriter(folder / "unet.gguf", "sd")
        chosen = getattr(library.GGMLQuantizationType, kind)
        for name, weight in pipe.unet.state_dict().items():
            values = weight.float().numpy()
            if name in linear and values.shape[1] % 32 == 0:
                writer.add_tensor(name, library.quants.quantize(values, chosen), raw_dtype=chosen)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        pipe.unet.save_config(folder / "config")
        unet = UNet2DConditionModel.from_single_file(
            str(folder / "unet.gguf"),
            config=str(folder / "config"),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )
        return with_denoiser(pipe, unet.requires_grad_(False))

    return store


def bitsandbytes(kind: str) -> Callable[[Any, Path], Any]:
    """Layers of bitsandbytes, which run on a CPU; diffusers' BitsAndBytesConfig asks for a GPU."""

    def store(pipe: Any, _: Path) -> Any:
        bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
        unet = copy.deepcopy(pipe.unet)
        for parent, name, layer in layers(unet):
            sides, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(*sides, bias=has_bias, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*sides, bias=has_bias, quant_type=kind, compute_dtype=torch.float32)
            new.load_state_dict(layer.state_dict())
            setattr(parent, name, new.to("cpu"))  # quantises
        return with_denoiser(pipe, unet.requires_grad_(False))

    return store


KINDS: dict[str, Callable[[Any, Path], Any]] = {
    "fp8": fp8,
    "torchao-int8": torchao_int8,
    "torchao-float8": torchao_float8,
    "gguf-Q8_0": gguf("Q8_0"),
    "gguf-Q5_1": gguf("Q5_1"),
    "gguf-Q4_0": gguf("Q4_0"),
    "bitsandbytes-int8": bitsandbytes("int8"),
    "bitsandbytes-nf4": bitsandbytes("nf4"),
}
"""How the denoiser of a copy of a pipeline is stored; each takes the pipeline and an empty folder."""
