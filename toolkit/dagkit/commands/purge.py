"""purge: the command of `dagkit.stages.purge`."""

from __future__ import annotations

from pathlib import Path

import click

from dagkit.commands import _common as common
from dagkit.stages import purge


@click.command("purge")
@common.concept_option
@common.workspace_option
@click.option("--yes", "is_confirmed", is_flag=True, help="Delete. Without it, only say what would be deleted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def command(concept_name: str, workspace_path: Path, is_confirmed: bool, as_json: bool) -> None:
    """Delete candidate images that no dataset uses, with their masks. A dry run unless --yes is given.

    Kept are those that annotators have yet to answer, and those whose answers were not exported yet.
    """
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    common.show(purge.run(Workspace(workspace_path), load_concept(concept_name), is_dry_run=not is_confirmed), as_json)
