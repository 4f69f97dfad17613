"""The command ``dagkit``: a click group over the commands. Only a running command imports torch or numpy."""

from __future__ import annotations

import importlib
import io
import os
import sys

from dagkit._version import __version__
from dagkit.errors import DagkitError, missing_package

try:
    import click
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {missing_package(error) or error}") from error

from dagkit.commands import OTHER_COMMANDS
from dagkit.resources import source_date
from dagkit.stages import STAGES
from dagkit.system import hush


class _Commands(click.Group):
    """Lists all commands at no cost and imports a command's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*(stage.name for stage in STAGES), *OTHER_COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        module = OTHER_COMMANDS[name][0] if name in OTHER_COMMANDS else name
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"dagkit.commands.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("The way from image to token"):
            formatter.write_dl([(stage.name, stage.help) for stage in STAGES])
        with formatter.section("Other commands"):
            formatter.write_dl([(name, text) for name, (_, text) in OTHER_COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1) if args else []
            if near and not args[0].startswith("-"):
                raise click.UsageError(f"{args[0]!r} is not a command. Did you mean {near[0]!r}?", ctx) from error
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dagkit")
def command() -> None:
    """Teach, check and ship safety for text-to-image diffusion models.

    Try it on any CPU, offline:  dagkit demo
    """
    source_date()  # numpy reads it, too, and would end in a traceback


def main() -> None:
    """Runs the command line: one line and status 1 for an error that a user can mend, a traceback for a bug."""
    _prepare_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a letter shows its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(prog_name="dagkit")
    except DagkitError as error:
        click.echo(f"{click.style('error:', fg='red')} {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        click.echo(f"{click.style('error:', fg='red')} {missing}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        reason = (error.strerror or type(error).__name__).lower()
        click.echo(
            f"{click.style('error:', fg='red')} {str(error.filename)[:300]}: {reason}. Mend that path.", err=True
        )
        sys.exit(1)


def _prepare_libraries() -> None:
    """Defaults for libraries that are not loaded yet; what the user has set stays."""
    defaults = {
        # progress bars and chatter beside ours
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # idle threads that spin take the cores of those that work
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    hush()
    if not os.environ.get("SOURCE_DATE_EPOCH"):
        os.environ.pop("SOURCE_DATE_EPOCH", None)  # empty means unset, but numpy wants a number


if __name__ == "__main__":
    main()
