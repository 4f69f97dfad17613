"""export: the command of `dagkit.stages.export`."""

from __future__ import annotations

from pathlib import Path

import click

from dagkit.commands import _common as common
from dagkit.stages import base, export


@click.command("export")
@common.concept_option
@common.workspace_option
@click.option(
    "--unreviewed",
    "accept_unreviewed",
    is_flag=True,
    help="Take pre-masks that nobody reviewed, too. The card says so.",
)
@click.option("--no-pull", "is_pulled", flag_value=False, default=True, help="Use the answers fetched before.")
@click.option(
    "--label-studio",
    "url",
    metavar="URL",
    envvar="DAGKIT_LABEL_STUDIO",
    help="Where to pull from. Default: the server to which the tasks were pushed.",
)
@click.option("--licence", default="other", show_default=True, help="SPDX identifier for the card.")
@click.option("--note", metavar="TEXT", default="", help="For the card: who reviewed, and how.")
@common.seed_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    accept_unreviewed: bool,
    is_pulled: bool,
    url: str | None,
    licence: str,
    note: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Pull what annotators said, if tasks were pushed, and build the dataset of a concept from it.

    Rows are split into train, validation and test so that images of one prompt or seed stay together; a row keeps its
    split when the dataset grows.
    """
    from datasets import disable_progress_bars

    from dagkit.concept import load_concept
    from dagkit.stages import pull
    from dagkit.workspace import Workspace

    workspace, concept = Workspace(workspace_path), load_concept(concept_name)
    if base.Progress(is_quiet).is_quiet:
        disable_progress_bars()
    if is_pulled and workspace.stage("labeling", concept.name).has("project.json"):
        common.show(pull.run(workspace, concept, url=url, progress=base.Progress(is_quiet)), as_json)
    result = export.run(
        workspace,
        concept,
        accept_unreviewed=accept_unreviewed,
        licence=licence,
        note=note,
        seed=seed,
    )
    common.show(result, as_json)
