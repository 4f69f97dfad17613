"""What a token is stamped with when it is made: software and time."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version as installed_version

from dagkit._version import __version__
from dagkit.resources import source_date


def software() -> dict[str, str]:
    """Versions that a token was made with."""
    return {"dagkit": __version__, **{name: installed_version(name) for name in ("torch", "diffusers", "transformers")}}


def now() -> str:
    """The present time for ``created``: ISO 8601 in UTC; ``SOURCE_DATE_EPOCH`` where it is set.

    Raises:
        DagkitError: ``SOURCE_DATE_EPOCH`` is no time.
    """
    return (source_date() or datetime.now(UTC)).isoformat(timespec="seconds")
