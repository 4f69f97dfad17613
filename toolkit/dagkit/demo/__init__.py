"""The bundled world: an offline stand-in for Stable Diffusion, with its judge and a small SAM.

It has the same classes and takes the same code path as Stable Diffusion 1.x, so nothing else in dagkit knows that it is
small. Its unsafe concept is the weapon; see `dagkit.demo.world`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagkit.judges.demo import DemoJudge
    from dagkit.models import BaseModel

__all__ = ["claim", "judge_path", "load_judge", "load_model", "model_path", "sam_checkpoint", "unknown_words"]


def _data(name: str) -> Path:
    return Path(str(files("dagkit.demo").joinpath("data", name)))


def model_path() -> Path:
    """The base model: a folder for ``StableDiffusionPipeline.from_pretrained`` (float16; 64x64 px, latents 4x16x16)."""
    return _data("model")


def judge_path() -> Path:
    """Weights of the judge, safetensors."""
    return _data("judge.safetensors")


def sam_checkpoint() -> Path:
    """Weights of the small SAM, safetensors; `dagkit.segmenters.sam_tiny.build_sam_tiny` reads them."""
    return _data("sam_tiny.safetensors")


def claim(folder: Path, *marks: str) -> None:
    """Ends a command whose ``--out`` holds something and is none of its own, by which its folders are known.

    Args:
        folder: where it would write.
        marks: glob patterns of what it leaves there.
    """
    import click

    from dagkit.errors import WorkspaceError
    from dagkit.workspace import StageFolder

    try:
        StageFolder(folder).claim(*marks)
    except WorkspaceError as error:
        raise click.ClickException(str(error).replace("--workspace", "--out")) from error


def load_model(name: str = "demo", device: str = "cpu", config: str | None = None) -> BaseModel:
    """A base model by name: ``demo`` is the bundled one, anything else is for `dagkit.models.load`.

    The bundled one is called ``demo`` in all that is written with it, wherever dagkit is installed.

    Args:
        name: of the model.
        device: e.g. ``"cpu"`` or ``"cuda"``.
        config: of a single file, as for `dagkit.models.load`.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from dagkit import models

    if name != "demo":
        return models.load(name, device=device, config=config)
    return replace(models.load(model_path(), device=device, config=config), source=name)


def load_judge(device: str = "cpu") -> DemoJudge:
    """The judge that goes with the base model."""
    from dagkit.judges.demo import DemoJudge

    return DemoJudge.from_concept(None, device)


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of a prompt that the bundled model never saw, in order and once each: it draws something else for them.

    Args:
        tokenizer: of the model that draws; to any other tokenizer than the bundled one every word is known.
        prompt: text.
    """
    from dagkit.demo import vocabulary

    return vocabulary.unknown_words(tokenizer, prompt)
