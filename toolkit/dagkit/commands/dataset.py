"""dataset: look at a dataset, check it, publish it, bring one in from elsewhere and write it for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dagkit.commands import _common as common
from dagkit.stages import base

if TYPE_CHECKING:
    from dagkit.dataset import Finding


def run(source: str | Path) -> tuple[base.StageResult, list[Finding]]:
    """Checks a dataset.

    Args:
        source: a folder or ``hf://owner/name``.

    Returns:
        What was counted, and the findings, errors first.

    Raises:
        DatasetError: there is no whole dataset.
    """
    from dagkit.dataset import check, load_dataset

    data = load_dataset(source)
    findings = check(data)
    num_errors = sum(finding.is_error for finding in findings)
    num_rows = sum(len(rows) for rows in data.values())
    message = f"{num_rows} rows: {num_errors} errors, {len(findings) - num_errors} warnings"
    return base.StageResult("dataset check", num_rows, 0, message), findings


@click.group("dataset")
def command() -> None:
    """Check, publish, import or export a dataset."""


@command.command("check")
@click.argument("source", required=False)
@click.option("--concept", "concept_name", metavar="NAME", help="Check the dataset of this concept in the workspace.")
@common.workspace_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def check_command(source: str | None, concept_name: str | None, workspace_path: Path, as_json: bool) -> None:
    """Look for what would spoil a token or a figure; status 1 if there is an error.

    SOURCE is a folder or hf://owner/name. Found are: empty masks on unsafe images, masks on safe ones, masks of another
    size, leaks between splits, duplicates, unreadable images; each with the row's key.
    """
    result, findings = run(source or _in_workspace(workspace_path, concept_name))
    if as_json:
        rows = [
            {name: getattr(finding, name) for name in ("problem", "key", "split", "message", "is_error")}
            for finding in findings
        ]
        click.echo(json.dumps({"stage": result.stage, "message": result.message, "findings": rows}))
    else:
        for finding in findings:
            kind = "error" if finding.is_error else "warning"
            click.echo(f"{kind}: {finding.split}: {finding.key}: {finding.problem}: {finding.message}")
        common.show(result, as_json=False)
    if any(finding.is_error for finding in findings):
        raise click.exceptions.Exit(1)


@command.command("push")
@click.argument("to")
@click.argument("source", required=False)
@click.option("--concept", "concept_name", metavar="NAME", help="Publish the dataset of this concept in the workspace.")
@common.workspace_option
@click.option("--public", is_flag=True, help="Make a new repository on the Hub public. Default: private.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def push_command(
    to: str, source: str | None, concept_name: str | None, workspace_path: Path, public: bool, as_json: bool
) -> None:
    """Publish a dataset to TO: hf://owner/name, or a folder in the Hub's layout (parquet).

    SOURCE is a folder or hf://owner/name. A folder or repository that holds anything but an older dataset from this
    command is refused.
    """
    from dagkit.dataset import load_with_summary, push_dataset

    data, summary = load_with_summary(source or _in_workspace(workspace_path, concept_name))
    where = push_dataset(data, to, summary, private=not public)
    num_rows = sum(len(rows) for rows in data.values())
    common.show(base.StageResult("dataset push", num_rows, 0, f"{num_rows} rows -> {where}"), as_json)


@command.command("import")
@click.argument("source")
@common.concept_option
@common.workspace_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["folder", "coco", "label-studio", "labelme", "huggingface"]),
    help="Default: found out.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the pictures are that JSON files name. Default: beside these.",
)
@click.option("--label", "meanings", multiple=True, metavar="THEIRS=OURS", help="What a label means; repeatable.")
@click.option(
    "--ignore", "ignored", multiple=True, metavar="THEIRS", help="A label that means nothing; '*': all others."
)
@click.option("--image-column", default="image", show_default=True, help="Of a Hugging Face dataset.")
@click.option("--mask-column", default="mask", show_default=True, help="Of a Hugging Face dataset.")
@common.output_options
def import_command(
    source: str,
    concept_name: str,
    workspace_path: Path,
    format_name: str | None,
    images: Path | None,
    meanings: tuple[str, ...],
    ignored: tuple[str, ...],
    image_column: str,
    mask_column: str,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Take pictures with masks into the workspace, as candidates that are marked already; then: dagkit export.

    SOURCE is a folder of images and masks (images/ and masks/, or NAME.jpg and NAME_mask.png; safe/ for pictures
    without the concept), COCO instances, a JSON export of Label Studio, files of LabelMe, or a Hugging Face dataset
    (a folder, or hf://owner/name). Pictures are scaled and cropped to the size that the concept's model draws.

    What cannot be taken is named, and nothing that a file names outside of SOURCE is opened.
    """
    from dagkit.concept import load_concept
    from dagkit.exchange import LabelNames, find_source
    from dagkit.stages import importing
    from dagkit.workspace import Workspace

    meant = dict(one.rpartition("=")[::2] for one in meanings)
    if wrong := next((one for one in meanings if not all(one.rpartition("=")[::2])), None):
        raise click.UsageError(f"--label {wrong!r}: expected THEIRS=OURS, such as --label knife=weapon.")
    concept = load_concept(concept_name)
    names = LabelNames(concept.labels, meant, ignored)
    found = find_source(
        source, names, format=format_name, images=images, image_column=image_column, mask_column=mask_column
    )
    progress = base.Progress(is_quiet)
    result = importing.run(Workspace(workspace_path), concept, found, names=names, progress=progress)
    common.show_import(result, as_json)
    if not as_json:
        click.echo(f"Next: dagkit export --concept {concept_name}, or dagkit push to have the masks reviewed.")


@command.command("export")
@click.argument("to", type=click.Path(file_okay=False, path_type=Path))
@click.argument("source", required=False)
@click.option("--format", "format_name", required=True, type=click.Choice(["masks", "coco", "label-studio"]))
@click.option("--concept", "concept_name", metavar="NAME", help="Export the dataset of this concept in the workspace.")
@common.workspace_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def export_command(
    to: Path, source: str | None, format_name: str, concept_name: str | None, workspace_path: Path, as_json: bool
) -> None:
    """Write a dataset into the folder TO in another format; dagkit dataset import reads each of them back.

    SOURCE is a folder or hf://owner/name. A folder that holds anything but an older export is refused.
    """
    from dagkit.dataset import load_with_summary
    from dagkit.exchange import export_dataset

    data, summary = load_with_summary(source or _in_workspace(workspace_path, concept_name))
    num_rows = export_dataset(data, to, format_name, summary)
    common.show(base.StageResult("dataset export", num_rows, 0, f"{num_rows} rows as {format_name} -> {to}"), as_json)


def _in_workspace(workspace_path: Path, concept_name: str | None) -> Path:
    if concept_name is None:
        raise click.UsageError("Give a folder, hf://owner/name, or --concept.")
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    return Workspace(workspace_path).stage("dataset", load_concept(concept_name).name).path
