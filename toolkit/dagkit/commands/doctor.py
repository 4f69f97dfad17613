"""doctor: the command of `dagkit.diagnosis`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import click


@click.command("doctor")
@click.option(
    "--concept", "concept_name", metavar="NAME", help="Look for what this concept needs; missing is then an error."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def command(concept_name: str | None, as_json: bool) -> None:
    """Show versions, devices, checkpoints and servers, with a hint for what is missing.

    Exits with status 1 if something needed is missing.
    """
    from dagkit.diagnosis import diagnose

    os.environ["HF_HUB_OFFLINE"] = "1"  # to look is not to download
    findings = diagnose(concept_name)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        marks = {
            "ok": click.style("ok     ", fg="green"),
            "missing": click.style("MISSING", fg="red"),
            "off": "-      ",
        }
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            hint = f"\n{'':9}{'':<{width}}  {finding.hint}" if finding.hint else ""
            click.echo(f"{marks[finding.status]}  {finding.what:<{width}}  {finding.found}{hint}")
    if any(finding.status == "missing" for finding in findings):
        sys.exit(1)
