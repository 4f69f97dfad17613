"""pull: the command of `dagkit.stages.pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dagkit.commands import _common as common
from dagkit.stages import base, pull

if TYPE_CHECKING:
    from dagkit.labelstudio.answers import Consensus


@click.command("pull")
@common.concept_option
@common.workspace_option
@common.label_studio_option("where the tasks were pushed")
@click.option(
    "--consensus",
    type=click.Choice(["majority", "union", "intersection"]),
    help="How several answers to one task make a mask. Default: as at the last pull, or majority.",
)
@click.option(
    "--min-iou",
    type=click.FloatRange(0, 1),
    help="Two masks with a lower IoU count as a disagreement. Default: as at the last pull, or 0.7.",
)
@click.option(
    "--review", is_flag=True, help="Send the tasks on which annotators disagree to a second project, for a reviewer."
)
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    url: str | None,
    consensus: Consensus | None,
    min_iou: float | None,
    review: bool,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Fetch what annotators made of the pre-masks.

    Fetches only what is new or changed; run it as often as you like.
    """
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    common.show(
        pull.run(
            Workspace(workspace_path),
            load_concept(concept_name),
            url=url,
            consensus=consensus,
            min_iou=min_iou,
            review=review,
            progress=base.Progress(is_quiet),
            tell=lambda line: click.echo(line, err=True),
        ),
        as_json,
    )
