"""The error tree. Every message says where, what was expected, what came, and what to do.

    DagkitError
    ├── ConceptError        a concept file is missing or wrong
    ├── WorkspaceError      a run folder, manifest or image in it cannot be read or written
    ├── ModelError          the base model cannot be loaded or is of an unknown kind
    ├── CheckpointError     a segmenter's, proposer's or judge's weights are missing or damaged
    ├── PluginError         an unknown or broken plugin name
    ├── PromptRefused       a prompt that is never generated
    ├── LabelStudioError    the annotation server, or what it sent back
    ├── DatasetError        a dataset is missing, empty or damaged
    ├── TokenError          a guideline token is damaged, or made for another base model
    ├── GuardError          the guard cannot see or cannot act, so nothing is generated
    ├── EngineError         a worker process ended, or there is work that none can do
    ├── MissingPackage      a library that only some of dagkit needs is not installed
    └── PublishError        a token could not be published

The command line prints one line for these and exits with status 1; anything else is a bug and keeps its traceback.
Messages are short whatever came in: foreign text is quoted with `quoted`, foreign errors with `reason`, and what is too
long even so is cut in the middle.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, Final

MAX_QUOTED: Final = 200
"""Characters of foreign text that a message shows."""

MAX_MESSAGE: Final = 4000
"""Characters of a message: twenty mistakes of a file, each with its line."""

CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that are no text: control characters but tab and line feed, and lone surrogates."""


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """Foreign data for a message: on one line, text in quotes, at most ``limit`` characters of it."""
    if isinstance(value, str):
        shown = repr(value[: limit + 1])
        return shown if len(value) <= limit else f"{shown[: limit + 1]}... ({len(value):,} characters)"
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        return f"a {type(value).__name__} that is too large to show"
    return shown if len(shown) <= limit else f"{shown[:limit]}... ({len(shown):,} characters)"


def brief(text: str, limit: int = MAX_QUOTED) -> str:
    """Foreign words for a message, such as a path or a list of names: unquoted, on one line, and cut."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."


def reason(error: BaseException) -> str:
    """What another library's error says, for a message: its first line, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return brief(lines[0]) if lines else type(error).__name__


def _printable(message: str) -> str:
    """A message that is safe to print: not endless, without control characters and lone surrogates."""
    if len(message) > MAX_MESSAGE:
        head, tail = MAX_MESSAGE * 3 // 4, MAX_MESSAGE // 5
        message = f"{message[:head]}... [{len(message) - head - tail:,} characters left out] ...{message[-tail:]}"
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", message)


class DagkitError(Exception):
    """Root of all errors that a user can mend."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(str(message)))


class ConceptError(DagkitError):
    """A concept file is missing or wrong."""


class WorkspaceError(DagkitError):
    """A run folder, a manifest or an image in it cannot be read or written."""


class ModelError(DagkitError):
    """The base model cannot be loaded or is of an unknown kind."""


class CheckpointError(DagkitError):
    """Weights of a segmenter, proposer or judge are missing or damaged."""


class PluginError(DagkitError):
    """A plugin name is unknown, taken twice, or its module cannot be imported."""


class PromptRefused(DagkitError):
    """A prompt that dagkit never generates. There is no switch for this."""


class LabelStudioError(DagkitError):
    """Label Studio could not be reached, refused a request, or sent something unusable."""


class DatasetError(DagkitError):
    """A dataset is missing, empty or damaged."""


class TokenError(DagkitError):
    """A guideline token is damaged, or was made for another base model."""


class GuardError(DagkitError):
    """The guard cannot see or cannot act, so nothing is generated."""


class EngineError(DagkitError):
    """A worker process ended, or there is work that no other process can do."""


class MissingPackage(DagkitError):
    """A library that only some of dagkit needs is not installed, as where it was installed for guarding alone."""


_PACKAGES: Final = {"PIL": "pillow", "yaml": "pyyaml", "pyarrow": "datasets", "markupsafe": "jinja2"}
"""Who brings a module that is called otherwise."""


def missing_package(error: ModuleNotFoundError) -> MissingPackage | None:
    """What to install; None where the module is of no package that dagkit requires, which is a bug."""
    from importlib.metadata import PackageNotFoundError, requires  # not fast to import

    module = (error.name or "").partition(".")[0]
    package = _PACKAGES.get(module, module.replace("_", "-"))
    try:
        lines = requires("dagkit") or ()
    except PackageNotFoundError:  # run from its sources
        lines = ()
    for line in lines if module not in ("", "dagkit") else ():
        wanted = line.partition(";")[0].strip()
        if re.split(r"[^\w.-]", wanted)[0].lower() == package:
            return MissingPackage(f"this needs {package}, which is not installed. Run: pip install '{wanted}'")
    return None


def required(module: str) -> Any:
    """Imports a module that only some of dagkit needs.

    Raises:
        MissingPackage: its package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise missing from error


class PublishError(DagkitError):
    """A token could not be published, or a published one could not be fetched."""
