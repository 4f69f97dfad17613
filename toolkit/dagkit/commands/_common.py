"""What all commands share: click options, results on the terminal, and the way from a model's name to the model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dagkit.concept import Concept
    from dagkit.engines import Engine
    from dagkit.models import BaseModel
    from dagkit.stages.base import StageResult
    from dagkit.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL_CONFIG: Final = "dagkit.model_config"
"""Where click keeps ``--model-config``."""


def show(result: StageResult, as_json: bool) -> None:
    """Prints what a stage did: one line, or one JSON object."""
    if as_json:
        shown = {
            "stage": result.stage,
            "done": result.done,
            "skipped": result.skipped,
            "message": result.message,
            **result.data,
        }
        click.echo(json.dumps(shown, ensure_ascii=False, default=str))
    else:
        click.echo(f"{result.stage}: {result.message}")


_MAX_LINES: Final = 20
"""Of an import, how many lines of what was not taken, and of notes, are printed."""


def show_import(result: StageResult, as_json: bool) -> None:
    """Prints what an import took, and what it did not; the rest of many lines is in its report."""
    if not as_json:
        for what, lines in (("not taken", result.data["refused"]), ("note", result.data["notes"])):
            for entry, text in lines[:_MAX_LINES]:
                click.echo(f"{what}: {entry}: {text}")
            if len(lines) > _MAX_LINES:
                click.echo(f"{what}: ... and {len(lines) - _MAX_LINES} more, see the report")
        for name in result.data["labels_never_met"]:
            click.echo(f"note: the label {name!r} was never met")
    show(result, as_json)


class _Share(click.FloatRange):
    """A number in [0, 1], and not nan, which no bound keeps out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not in the range 0<=x<=1.", param, ctx)
        return number


SHARE: Final = _Share(0, 1)
"""Type of options that are shares."""


class WorkspacePath(click.Path):
    """A folder of runs, there already or not; one that could never be made is refused before anything is done."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from dagkit.workspace import checked_root

        return checked_root(Path(os.fsdecode(super().convert(value, param, ctx))))


def concept_option(command: Command) -> Command:
    """``--concept NAME``: a concept's name or file."""
    return click.option(
        "--concept", "concept_name", required=True, metavar="NAME", help="Concept: a name, or its YAML file."
    )(command)


def workspace_option(command: Command) -> Command:
    """``--workspace FOLDER``."""
    return click.option(
        "--workspace",
        "workspace_path",
        type=WorkspacePath(),
        default=Path("runs"),
        show_default=True,
        envvar="DAGKIT_WORKSPACE",
        help="Folder that stages read and write.",
    )(command)


def model_option(command: Command) -> Command:
    """``--model X`` and, for `load_base_model`, ``--model-config Y``."""
    command = model_config_option(command)
    return click.option(
        "--model",
        metavar="MODEL",
        help="Base model: 'demo', a diffusers folder, a Hub id or one .safetensors file. Default: the concept's.",
    )(command)


def model_config_option(command: Command) -> Command:
    """``--model-config Y``, which `model_config` tells."""
    return click.option(
        "--model-config",
        metavar="FOLDER_OR_ID",
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.update({_MODEL_CONFIG: value}),
        help="Where one .safetensors file has its configuration, tokenizer and scheduler from. Default: the cache.",
    )(command)


def model_config() -> str | None:
    """What ``--model-config`` says in the command that runs."""
    value: str | None = click.get_current_context().meta.get(_MODEL_CONFIG)
    return value


def device_option(command: Command) -> Command:
    """``--device D``."""
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")(command)


def seed_option(command: Command) -> Command:
    """``--seed N``."""
    return click.option(
        "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Same seed, same result."
    )(command)


def num_images_option(command: Command) -> Command:
    """``--num-images N``, of candidates."""
    return click.option(
        "--num-images", type=click.IntRange(1, 1_000_000), default=64, show_default=True, help="Candidates in all."
    )(command)


def checkpoint_option(command: Command) -> Command:
    """``--checkpoint FILE``, of the segmenter."""
    return click.option(
        "--checkpoint",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Weights of the segmenter. Default: the concept's, or the file that dagkit doctor names.",
    )(command)


def label_studio_option(default: str) -> Callable[[Command], Command]:
    """``--label-studio URL``; ``default`` says which server is meant without it."""
    return click.option(
        "--label-studio",
        "url",
        metavar="URL",
        envvar="DAGKIT_LABEL_STUDIO",
        help=f"A team's server; its token is read from LABEL_STUDIO_API_KEY. Default: {default}.",
    )


def annotators_option(command: Command) -> Command:
    """``--num-annotators N``."""
    return click.option(
        "--num-annotators", type=click.IntRange(1, 100), help="Answers that a task needs. Default: as before, or 1."
    )(command)


def workers_option(command: Command) -> Command:
    """``--workers N``, for `open_engine`."""
    return click.option(
        "--workers",
        type=click.IntRange(1, 256),
        default=1,
        show_default=True,
        help="Processes that work at once, each with one thread and models of its own.",
    )(command)


def output_options(command: Command) -> Command:
    """``--json`` and ``--quiet``."""
    command = click.option("--quiet", "is_quiet", is_flag=True, help="No progress bars.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")(command)


def guarded_options(command: Command) -> Command:
    """``--token`` and ``--concept`` of commands that are about a token's guard."""
    for option in (
        click.option(
            "--concept", "concept_name", metavar="NAME", help="Concept: a name, or its file. Default: the token's."
        ),
        click.option("--token", "token_name", required=True, metavar="TOKEN", help="name@version, a folder, or a URL."),
    ):
        command = option(command)
    return command


def steps_option(command: Command) -> Command:
    """``--num-inference-steps``."""
    return click.option("--num-inference-steps", type=click.IntRange(1, 1000), help="Default: the concept's.")(command)


def selection_options(is_drawing: bool) -> Callable[[Command], Command]:
    """``--select``, ``--num-tasks`` and ``--token``, for `choose`; with ``weak`` where candidates are drawn, too."""
    choices = ["uncertain", "diverse", "all", *(["weak"] if is_drawing else [])]
    weak = " weak: draw more of what --token sees weakly, and send all." if is_drawing else ""
    options = (
        click.option(
            "--token",
            metavar="TOKEN",
            help="name@version, folder or URL: uncertain is then where it and the pre-mask disagree.",
        ),
        click.option(
            "--num-tasks", type=click.IntRange(1), help="Send the first N of the selection. Default: all of it."
        ),
        click.option(
            "--select",
            "selection",
            type=click.Choice(choices),
            help=f"Send first those that teach most, and no near-duplicates.{weak} Default: all, in their order.",
        ),
    )

    def decorate(command: Command) -> Command:
        for option in options:
            command = option(command)
        return command

    return decorate


def weak_members(workspace: Workspace, concept: Concept, token: str | None) -> list[str]:
    """What ``--select weak`` draws more of, see `dagkit.stages.generate.weak_members`; refuses it without a token."""
    from dagkit.stages import generate

    if token is None:
        raise click.UsageError("--select weak draws more of what a token sees weakly: say which with --token.")
    return generate.weak_members(workspace, concept, token)


def check_selection(selection: str | None, token: str | None) -> None:
    """Refuses ``--token`` without ``--select uncertain``."""
    if token is not None and selection != "uncertain":
        raise click.UsageError("--token says what is uncertain: add --select uncertain, or leave it out.")


def storage_options(command: Command) -> Command:
    """``--storage`` and ``--s3-endpoint``, for `dagkit.labelstudio.storage.parse_storage`."""
    command = click.option("--s3-endpoint", metavar="URL", help="Of an S3-compatible store. Default: AWS.")(command)
    return click.option(
        "--storage",
        metavar="WHERE",
        default="upload",
        show_default=True,
        help="Where the server gets the images: upload, local:FOLDER (which it may serve) or s3://BUCKET/FOLDER.",
    )(command)


def read_text(path: Path) -> str:
    """The text of a file that a user names.

    Raises:
        DagkitError: it is not UTF-8, or cannot be read.
    """
    from dagkit.errors import DagkitError

    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DagkitError(
            f"{path}: expected UTF-8 text, but {error.reason} at byte {error.start}. Save the file as UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise DagkitError(f"{path}: expected a text file, but {reason}. Name another one.") from error


def resolve_device(device: str) -> str:
    """Turns ``auto`` into the best device that there is.

    Raises:
        ModelError: the device does not exist here.
    """
    import torch

    from dagkit.errors import ModelError

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}. Use --device cpu."
        ) from error
    return device


def open_engine(workers: int, device: str) -> AbstractContextManager[Engine]:
    """The engine for a number of workers; says so where they share an accelerator.

    Args:
        workers: >= 1.
        device: as from `resolve_device`.
    """
    from dagkit import engines

    if workers > 1 and not device.startswith("cpu"):
        click.echo(f"{workers} workers share {device}, and each holds its own copy of the models there.", err=True)
    return engines.open_engine(workers)


def load_base_model(concept: Concept, model: str | None, device: str) -> BaseModel:
    """Loads the base model that a concept names, or the one that overrides it, as ``--model-config`` says.

    Args:
        concept: names the default model.
        model: overrides it; ``demo`` is the bundled model.
        device: as ``--device``.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from dagkit import demo, models

    name, device = model or concept.model, resolve_device(device)
    if models.is_hub_id(name) and not models.is_cached(name):
        click.echo(f"{name} is downloaded from the Hub, once. This can take minutes.", err=True)
    base_model = demo.load_model(name, device, model_config())
    length = concept.sampling.max_sequence_length
    if length is None:
        return base_model
    return replace(base_model, encoding=base_model.encoding._replace(max_sequence_length=length))
