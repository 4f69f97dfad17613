"""Models in one file, as Civitai and ComfyUI have them: the names of the weights are those of latent-diffusion.

The file holds weights alone. What the networks look like, tokenizer and scheduler come from a folder in diffusers'
format, whose weights are not needed and not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dagkit.errors import ModelError, reason
from dagkit.models import checker

SUFFIXES: Final = (".safetensors", ".ckpt")
_BLOCK: Final = re.compile(r"(model\.diffusion_model\.(input|output)_blocks)\.(\d+)\.(.+)")


def is_single_file(model: str | Path) -> bool:
    """Whether a model's name means one file, there or not."""
    return Path(model).suffix.lower() in SUFFIXES


def checked(model: str | Path) -> Path:
    """The path of a single file that can be read.

    Raises:
        ModelError: there is none, or it is a pickle.
    """
    path = Path(model)
    if not path.is_file():
        raise ModelError(f"{path}: no such file. Expected one .safetensors file with a whole model.")
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path}: dagkit reads no pickles. Choose the .safetensors file of this model.")
    return path


def architecture(path: Path) -> str:
    """The Hub id whose configuration fits a file, as diffusers tells from the names and shapes of its weights."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(load_file(path))["pretrained_model_name_or_path"])


def read_pipeline(path: Path, folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline of a file.

    Args:
        path: of the file.
        folder: with the configuration, tokenizer and scheduler.
        index: of that folder, its ``model_index.json``.
        dtype: of the weights.

    Raises:
        ModelError: diffusers does not load such pipelines from one file, or the file lacks weights.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    name = index.get("_class_name")
    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not hasattr(cls, "from_single_file"):
        raise ModelError(f"{folder}: diffusers loads no {name} from one file. Name the configuration of another one.")
    parts = checker.left_out(index) | _uneven_unet(path, folder, index, dtype)
    try:
        pipe: Any = cls.from_single_file(
            str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **parts
        )
    except SingleFileComponentError as error:
        raise ModelError(f"{path}: {reason(error)} Name another --model-config, or download the file again.") from error
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module) and any(weight.is_meta for weight in module.parameters()):
            raise ModelError(
                f"{path}: it lacks weights that {part} has by {folder}. Name the configuration of its architecture: "
                "--model-config FOLDER_OR_ID"
            )
    return pipe


def _uneven_unet(path: Path, folder: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A U-Net whose levels have unlike numbers of layers, which diffusers' conversion cannot count; else nothing."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    if index.get("unet") != ["diffusers", "UNet2DConditionModel"]:
        return {}
    config = UNet2DConditionModel.load_config(folder, subfolder="unet", local_files_only=True)
    layers = config["layers_per_block"]
    if isinstance(layers, int):
        return {}
    weights = convert_ldm_unet_checkpoint(_evened(load_file(path), layers), config | {"layers_per_block": max(layers)})
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights)
    return {"unet": unet.to(dtype)}


def _evened(weights: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """Weights whose blocks are numbered as if each level had as many layers as the largest one.

    Latent-diffusion counts blocks through all levels: a level's layers, then what changes the resolution.
    """
    most, empty = max(layers), torch.empty(0)
    down = [0]
    for level, count in enumerate(layers):
        first = 1 + level * (most + 1)
        down += [*range(first, first + count), *([first + most] if level + 1 < len(layers) else [])]
    up = [level * (most + 1) + i for level, count in enumerate(reversed(layers)) for i in range(count + 1)]
    numbers = {"input": down, "output": up}
    # diffusers counts the blocks that it finds
    evened = {
        f"model.diffusion_model.{way}_blocks.{i}.none": empty for way in numbers for i in range(max(numbers[way]))
    }
    for name, weight in weights.items():
        block = _BLOCK.fullmatch(name)
        evened[f"{block[1]}.{numbers[block[2]][int(block[3])]}.{block[4]}" if block else name] = weight
    return evened
