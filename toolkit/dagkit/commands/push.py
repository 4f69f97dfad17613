"""push: the command of `dagkit.stages.push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dagkit.commands import _common as common
from dagkit.stages import base, push

if TYPE_CHECKING:
    from dagkit.dataset.selection import Selection


@click.command("push")
@common.concept_option
@common.workspace_option
@common.label_studio_option("the embedded server")
@click.option(
    "--label-config",
    "label_config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="XML of the labelling page. Default: made from the concept.",
)
@common.annotators_option
@click.option("--batch-size", type=click.IntRange(1, 1000), help="Tasks a request. Default: 100.")
@common.selection_options(is_drawing=False)
@click.option(
    "--model",
    metavar="MODEL",
    help="Base model for --token (default: the concept's) and --select diverse (default: none, colours decide).",
)
@common.device_option
@common.storage_options
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    url: str | None,
    label_config: Path | None,
    num_annotators: int | None,
    batch_size: int | None,
    selection: Selection | None,
    num_tasks: int | None,
    token: str | None,
    model: str | None,
    device: str,
    storage: str,
    s3_endpoint: str | None,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Send candidates and pre-masks to Label Studio.

    Sends only what is not there yet; run it again after any failure.
    """
    from dagkit.concept import load_concept, read_text
    from dagkit.labelstudio.storage import parse_storage
    from dagkit.workspace import Workspace

    common.check_selection(selection, token)
    concept, workspace = load_concept(concept_name), Workspace(workspace_path)
    place = parse_storage(storage, s3_endpoint)
    base_model = common.load_base_model(concept, model, device) if model or token else None
    common.show(
        push.run(
            workspace,
            concept,
            keys=push.choose(workspace, concept, selection, num_tasks, base_model=base_model, token=token),
            storage=place,
            url=url,
            label_config=read_text(label_config) if label_config else None,
            num_annotators=num_annotators,
            batch_size=batch_size,
            progress=base.Progress(is_quiet),
            tell=lambda line: click.echo(line, err=True),
        ),
        as_json,
    )
