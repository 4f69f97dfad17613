"""generate: the command of `dagkit.stages.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import click

from dagkit.commands import _common as common
from dagkit.stages import base, generate

_OF_DRAWING: Final = ("num_images", "safe_share", "batch_size", "selection", "model", "workers", "device", "seed")


@click.command("generate")
@common.concept_option
@common.workspace_option
@common.model_option
@common.num_images_option
@click.option("--safe-share", type=common.SHARE, default=0.4, show_default=True, help="Share of safe prompts.")
@click.option("--batch-size", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option("--select", "selection", type=click.Choice(["weak"]), help="Draw more of what --token sees weakly.")
@click.option("--token", metavar="TOKEN", help="name@version, folder or URL of the token, for --select weak.")
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Take the pictures of this folder instead of drawing any.",
)
@click.option(
    "--images-show",
    type=click.Choice(["unsafe", "safe"]),
    default="unsafe",
    show_default=True,
    help="What --images may show; safe ones are not looked at by premask.",
)
@common.workers_option
@common.device_option
@common.seed_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    model: str | None,
    num_images: int,
    safe_share: float,
    batch_size: int,
    selection: str | None,
    token: str | None,
    images: Path | None,
    images_show: Literal["unsafe", "safe"],
    workers: int,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Draw candidate images, unsafe and safe, with the base model; or take those of a folder.

    Resumes where an earlier run stopped. Prompts that sexualise minors are refused, always.
    """
    from dagkit.concept import load_concept
    from dagkit.exchange import pictures_of
    from dagkit.stages import importing
    from dagkit.workspace import Workspace

    if token is not None and selection is None:
        raise click.UsageError("--token says what is weak: add --select weak, or leave it out.")
    concept, workspace = load_concept(concept_name), Workspace(workspace_path)
    _check_options(images)
    if images is not None:
        taken = importing.run(
            workspace,
            concept,
            pictures_of(images),
            kind=images_show,
            is_masked=False,
            progress=base.Progress(is_quiet),
        )
        common.show_import(taken, as_json)
        return
    members = common.weak_members(workspace, concept, token) if selection else ()
    base_model = common.load_base_model(concept, model, device)
    with common.open_engine(workers, str(base_model.device)) as engine:
        result = generate.run(
            workspace,
            concept,
            base_model,
            num_images=num_images,
            safe_share=safe_share,
            seed=seed,
            batch_size=batch_size,
            members=members,
            engine=engine,
            progress=base.Progress(is_quiet),
        )
    common.show(result, as_json)


def _check_options(images: Path | None) -> None:
    """Refuses options that say nothing where pictures are taken, or where none are."""
    context = click.get_current_context()
    source = context.get_parameter_source
    given = [name for name in _OF_DRAWING if source(name) is click.core.ParameterSource.COMMANDLINE]
    names = {option.name: option.opts[0] for option in context.command.params}
    if images is not None and given:
        raise click.UsageError(f"--images takes pictures and draws none: leave out {names[given[0]]}.")
    if images is None and source("images_show") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--images-show says what --images may show: add it, or leave that out.")
