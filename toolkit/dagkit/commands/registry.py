"""registry: what a location has, whether all of it is as it was published, and its index page for people."""

from __future__ import annotations

import json
import sys

import click


@click.command("registry")
@click.argument("location_url", metavar="URL")
@click.option("--write-page", "is_page_written", is_flag=True, help="Write INDEX.md anew.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(location_url: str, is_page_written: bool, as_json: bool) -> None:
    """List the versions published at URL and verify every file of each; exits with 1 if one is damaged.

    Each location keeps an index: index.json, which names all versions with the SHA-256 of their files, and INDEX.md,
    the same for people. 'dagkit publish' writes both.
    """
    from dagkit import registry
    from dagkit.registry.index import plain

    location = registry.open_location(location_url)
    index, problems = registry.check(location)
    if is_page_written:
        location.write_page(index)
    if as_json:
        rows = [
            {**entry.model_dump(mode="json"), "content": entry.content, "problem": problems.get(entry.version)}
            for entry in index.versions
        ]
        click.echo(json.dumps({"url": location.url, "concept": index.concept, "versions": rows}))
    else:
        for entry in index.versions:
            state = problems.get(entry.version, "ok")
            click.echo(f"{index.concept}@{entry.version}  {plain(entry.published)}  {entry.content[:19]}  {state}")
    if problems:
        sys.exit(1)
