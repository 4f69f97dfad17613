"""label-studio: the embedded annotation server, up and down. No stage of its own; `push` starts it by itself."""

from __future__ import annotations

import json

import click


@click.group("label-studio")
def command() -> None:
    """Run the embedded Label Studio server.

    It is installed into a virtual environment of its own on first use, listens on this machine only and sends nothing
    out.
    """


@command.command("up")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="TCP port on 127.0.0.1. Default: that of the last start, or 8080."
)
@click.option(
    "--serve-files",
    "files",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Folder from which it may serve images: for push --storage local:FOLDER.",
)
@click.option("--with-aws", "is_with_aws", is_flag=True, help="Hand on AWS_... variables: for push --storage s3://...")
def up(port: int | None, files: str | None, is_with_aws: bool) -> None:
    """Start the server (and install it on first use).

    What it may serve is kept for later starts.
    """
    from dagkit.labelstudio.server import EmbeddedServer, Sharing

    server = EmbeddedServer()
    sharing = Sharing(files, is_with_aws) if files or is_with_aws else None
    login = server.up(port, lambda line: click.echo(line, err=True), sharing)
    click.echo(f"Label Studio is up: {login.url}")
    click.echo(f"User and password are in {server.login_file} (only you can read it).")


@command.command("down")
def down() -> None:
    """Stop the server. Its data stay."""
    from dagkit.labelstudio.server import EmbeddedServer

    click.echo("Label Studio is down." if EmbeddedServer().down() else "Label Studio was not running.")


@command.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def status(as_json: bool) -> None:
    """Say whether the server is installed and running, and where its data are."""
    from dagkit.labelstudio.server import VERSION, EmbeddedServer

    server = EmbeddedServer()
    login = server.login()
    facts = {
        "version": VERSION,
        "is_installed": server.is_installed,
        "is_running": server.is_healthy(),
        "url": login.url if login else None,
        "login_file": str(server.login_file),
        "data": str(server.folder / "data"),
        "log": str(server.log),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    if facts["is_running"]:
        click.echo(f"Label Studio {VERSION} runs at {facts['url']}.")
    else:
        state = "is installed, but not running" if facts["is_installed"] else "is not installed"
        click.echo(f"Label Studio {VERSION} {state}. Start it with: dagkit label-studio up")
    click.echo(f"login {facts['login_file']}\ndata  {facts['data']}\nlog   {facts['log']}")
