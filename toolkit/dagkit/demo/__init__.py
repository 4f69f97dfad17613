"""The bundled world: an offline stand-in for Stable Diffusion, with its judge and a small SAM.

It has the same classes and takes the same code path as Stable Diffusion 1.x, so nothing else in dagkit knows that it is
small. Its unsafe concept is the weapon; see `dagkit.demo.world`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dagkit.judges.demo import DemoJudge
    from dagkit.models import BaseModel, Encoding

__all__ = ["claim", "judge_path", "load_judge", "load_model", "model_path", "sam_checkpoint", "unknown_words"]


def _data(name: str) -> Path:
    return Path(str(files("dagkit.demo").joinpath("data", name)))


MODELS: Final = {"demo": "model", "demo-sd3": "sd3"}
"""Names of the bundled base models, and their folders."""


def model_path(name: str = "demo") -> Path:
    """A bundled base model (float16; 64x64 px, latents 4x16x16), as a folder for ``from_pretrained``.

    ``demo`` is a `StableDiffusionPipeline`, ``demo-sd3`` a `StableDiffusion3Pipeline`.
    """
    return _data(MODELS[name])


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
    """A base model by name: those of `MODELS` are bundled, anything else is for `dagkit.models.load`.

    A bundled one is called by its name in all that is written with it, wherever dagkit is installed. ``demo-sd3`` has
    no T5, and one row of zeros stands in for it: ``max_sequence_length`` is 1.

    Args:
        name: of the model.
        device: e.g. ``"cpu"`` or ``"cuda"``.
        config: of a single file, as for `dagkit.models.load`.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from dagkit import models

    if name not in MODELS:
        return models.load(name, device=device, config=config)
    loaded = models.load(model_path(name), device=device, config=config)
    return replace(loaded, source=name, encoding=encoding_of(name))


def encoding_of(name: str) -> Encoding:
    """How a bundled base model encodes prompts."""
    from dagkit.models import Encoding

    return Encoding(max_sequence_length=1) if name == "demo-sd3" else Encoding()


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
