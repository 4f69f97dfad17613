"""dataset: look at a dataset, check it, publish it."""

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
    """Check or publish a dataset."""


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


def _in_workspace(workspace_path: Path, concept_name: str | None) -> Path:
    if concept_name is None:
        raise click.UsageError("Give a folder, hf://owner/name, or --concept.")
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    return Workspace(workspace_path).stage("dataset", load_concept(concept_name).name).path
