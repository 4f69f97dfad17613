"""How a folder, a Hub id or a single file becomes a base model."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dagkit.errors import ModelError
from dagkit.models import checker, single_file
from dagkit.models.base import BaseModel, match
from dagkit.provenance import is_repository
from dagkit.workspace import sha256_file

DENOISERS: Final = ("unet", "transformer")
TEXT_ENCODERS: Final = ("text_encoder", "text_encoder_2", "text_encoder_3")
FINGERPRINTED: Final = (*DENOISERS, *TEXT_ENCODERS)
WEIGHTED: Final = (*FINGERPRINTED, "vae")
"""Folders of a model whose weights are loaded."""

_OTHER_WEIGHTS: Final = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".safetensors")
_NO_SAFETENSORS: Final = (
    "has no plain safetensors, and dagkit reads neither pickles nor variants such as fp16. Choose a model that has "
    "them, or convert it once with diffusers: DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER)."
)


def load(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
) -> BaseModel:
    """Loads a diffusers pipeline from a folder, the Hub or a single file and freezes it.

    Safety checker and watermarker are left out, and not downloaded: see `dagkit.models.checker`. The weights are the
    plain safetensors on every device, never a variant, so that the fingerprint is the same everywhere. That of a single
    file is the SHA-256 of the file, as Civitai shows it: another one than that of the same weights in a folder, whose
    files are hashed one by one. ``family.fingerprints``, by which guards know a model, are the same for both.

    Args:
        model: folder in diffusers' format, Hub id, or ``.safetensors`` file with a whole model.
        device: e.g. ``"cpu"`` or ``"cuda"``.
        dtype: of the weights; float32 on a CPU and float16 elsewhere where not given.
        config: of a single file: folder in diffusers' format or Hub id that has configuration, tokenizer and scheduler;
            where not given, that of diffusers' guess, if it is in the user's cache.

    Raises:
        ModelError: there is no such folder, id or file, a part is missing, unreadable or not in safetensors, or no
            family knows this architecture.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    is_file = single_file.is_single_file(model)
    if config is not None and not is_file:
        raise ModelError(f"{model}: only a single .safetensors file takes a configuration ({config}). Leave it out.")
    folder = _config_folder(single_file.checked(model), config) if is_file else _folder(model)
    index = _index(folder)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    precision = {
        "dtype"
        if hasattr(diffusers.utils.deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE")
        else "torch_dtype": dtype
    }
    try:
        with _no_progress_bars():
            if is_file:
                pipe = single_file.read_pipeline(Path(model), folder, index, dtype)
            else:
                pipe = DiffusionPipeline.from_pretrained(
                    folder,
                    use_safetensors=True,
                    local_files_only=True,
                    **(_absent(index) | checker.left_out(index)),
                    **precision,
                )
                for part in TEXT_ENCODERS:
                    _fill_text_encoder(pipe, folder, part)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        advice = "Check the file and --model-config" if is_file else "Check the folder"
        raise ModelError(
            f"{model}: diffusers cannot load this model: {_in_short(error)}. {advice}, or download it again."
        ) from error
    family = match(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    fingerprint = sha256_file(Path(model)) if is_file else _fingerprint(folder)
    return BaseModel(pipe.to(device), family, str(model), fingerprint, None if config is None else str(config))


def is_hub_id(model: str | Path) -> bool:
    """Whether a model's name means a repository on the Hub: ``org/name``, and no such folder here."""
    if not isinstance(model, str) or single_file.is_single_file(model):
        return False
    return is_repository(model) and not Path(model).is_dir()


def is_cached(hub_id: str) -> bool:
    """Whether the user's cache has a repository's denoiser; else `load` downloads gigabytes."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, "model_index.json")
    return isinstance(index, str) and any(_plain_weights(Path(index).with_name(part)) for part in DENOISERS)


def _folder(model: str | Path) -> Path:
    """The local folder of a model, downloaded if it is a Hub id, with its index checked."""
    folder = Path(model)
    if is_hub_id(model):
        folder = _downloaded(str(model))
    elif not folder.is_dir():
        raise ModelError(
            f"{model}: no such folder. Expected a folder in diffusers' format, or a Hub id such as org/name."
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: no model_index.json. Expected a folder written by diffusers' save_pretrained.")
    if not any((folder / part).is_dir() for part in DENOISERS):
        raise ModelError(f"{folder}: no unet folder, so there is no denoiser to guard. Download the model again.")
    for part in (folder / name for name in WEIGHTED):
        if not _plain_weights(part) and any(file.suffix in _OTHER_WEIGHTS for file in part.glob("*")):
            raise ModelError(f"{model}: {part.name} {_NO_SAFETENSORS}")
    return folder


def _config_folder(file: Path, config: str | Path | None) -> Path:
    """The local folder with the configuration of a single file, downloaded if a Hub id is named."""
    try:
        name = str(config) if config is not None else single_file.architecture(file)
    except (SafetensorError, OSError, KeyError) as error:
        raise ModelError(f"{file}: not a model in safetensors: {_in_short(error)}. Download it again.") from error
    folder = Path(name)
    if is_hub_id(name):
        places = (True,) if config is None else (True, False)
        folder = next(filter(None, (_snapshot(name, is_local=is_local) for is_local in places)), folder)
    if not (folder / "model_index.json").is_file():
        what = "it looks like a model whose configuration is" if config is None else "its configuration is to be"
        raise ModelError(
            f"{file}: {what} {name}, but no such folder with a model_index.json is here or in the cache. Name one, or "
            "a Hub id (weights are not needed): --model-config FOLDER_OR_ID"
        )
    return folder


def _snapshot(model: str, *, is_local: bool) -> Path | None:
    """The folder of a Hub id's configuration in the user's cache; None where it is not to be had."""
    from huggingface_hub import snapshot_download

    try:
        with _quiet_hub():
            patterns = ["*.json", "*.txt", "*.model"]
            folder = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=is_local))
    except (OSError, ValueError):
        return None
    return folder if (folder / "model_index.json").is_file() else None


def _downloaded(model: str) -> Path:
    """The folder of a Hub id in the user's cache, filled with the plain safetensors and configs of what is loaded."""
    from diffusers import DiffusionPipeline

    try:
        with _quiet_hub():
            return Path(DiffusionPipeline.download(model, use_safetensors=True, safety_checker=None))
    except (OSError, ValueError) as error:
        if "Could not find the necessary `safetensors` weights" in str(error):
            raise ModelError(f"{model}: a part {_NO_SAFETENSORS}") from error
        raise ModelError(
            f"{model}: neither a folder nor a model that can be downloaded: {_in_short(error)}. Check name and "
            "network, then run it again: what is in the cache is kept."
        ) from error


def _index(folder: Path) -> dict[str, Any]:
    """A model's ``model_index.json``."""
    path = folder / "model_index.json"
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {_in_short(error)}. Download the model again.") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path}: expected a JSON object, but got {type(index).__name__}. Download the model again.")
    return dict(index)


def _absent(index: dict[str, Any]) -> dict[str, None]:
    """Parts that a model was saved without, such as SD3's third text encoder: diffusers wants to be told again."""
    return {name: None for name, value in index.items() if value == [None, None]}


def _fill_text_encoder(pipe: Any, folder: Path, part: str) -> None:
    """Reads a text encoder that transformers has left random: before 5.6 it calls weights ``text_model.…``.

    Files that a newer one wrote have other names, and are then taken for those of another model.
    """
    encoder: Any = getattr(pipe, part, None)
    if not hasattr(encoder, "text_model"):
        return
    weights = {name: weight for file in _plain_weights(folder / part) for name, weight in load_file(file).items()}
    if not any(name.startswith("text_model.") for name in weights):
        encoder.text_model.load_state_dict(weights)


def _plain_weights(part: Path) -> list[Path]:
    """The safetensors that are loaded: ``model.safetensors`` or its shards, no variant such as ``model.fp16``."""
    return sorted(file for file in part.glob("*.safetensors") if file.name.count(".") == 1)


def _in_short(error: Exception) -> str:
    """An error of somebody else's, in one line of bounded length."""
    lines = str(error).splitlines() or [""]
    return textwrap.shorten(lines[0] or type(error).__name__, 300).rstrip(".")


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps libraries from warning of a Hub that cannot be reached: no news where the cache has the model."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging

    libraries = (diffusers_logging, hub_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps diffusers and transformers from drawing bars while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    were_on = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_on in zip(libraries, were_on, strict=True):
            if was_on:
                library.enable_progress_bar()


def _fingerprint(folder: Path) -> str:
    """``sha256:`` over the weights of denoiser and text encoders, file by file."""
    digest = hashlib.sha256()
    for part in FINGERPRINTED:
        for file in _plain_weights(folder / part):
            digest.update(f"{part}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
