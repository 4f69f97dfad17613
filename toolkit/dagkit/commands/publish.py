"""publish: the command of `dagkit.stages.publish`."""

from __future__ import annotations

from pathlib import Path

import click

from dagkit.commands import _common as common
from dagkit.stages import publish


@click.command("publish")
@click.argument("reference", metavar="TOKEN")
@click.option(
    "--to", required=True, metavar="URL", help="hf://org/name, s3://bucket/prefix or file:///folder; no version."
)
@click.option(
    "--with-examples",
    "examples",
    multiple=True,
    metavar="IMAGE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Publish this image too; repeatable. No image leaves unless it is named.",
)
@click.option("--public", "is_public", is_flag=True, help="Hub only: let everybody see it. Default: private.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Check everything, list every file, write nothing.")
@click.option(
    "--without-evaluation", "is_unmeasured_allowed", is_flag=True, help="Publish although nobody has measured it."
)
@click.option(
    "--force-worse", "is_worse_allowed", is_flag=True, help="Publish although it is worse than what it replaces."
)
@common.workspace_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def command(
    reference: str,
    to: str,
    examples: tuple[Path, ...],
    is_public: bool,
    is_dry_run: bool,
    is_unmeasured_allowed: bool,
    is_worse_allowed: bool,
    workspace_path: Path,
    as_json: bool,
) -> None:
    """Publish a version of a token: TOKEN is name@version, a folder or a URL.

    A published version never changes. It needs an evaluation, and must not be worse than the version that it replaces.
    """
    from dagkit.workspace import Workspace

    if is_public and not to.startswith("hf://"):
        raise click.UsageError("--public is for hf:// only; who may read a bucket or folder is set there.")
    result = publish.run(
        Workspace(workspace_path),
        reference,
        to,
        examples=examples,
        is_public=is_public,
        is_dry_run=is_dry_run,
        is_unmeasured_allowed=is_unmeasured_allowed,
        is_worse_allowed=is_worse_allowed,
    )
    if not as_json:
        for note in result.data["notes"]:
            click.echo(f"note: {note}", err=True)
        if is_dry_run:
            for name, size in result.data["files"].items():
                click.echo(f"  {name:<24} {'' if size is None else f'{size:>9,} bytes'}".rstrip())
    common.show(result, as_json)
