"""What ships with dagkit (in the wheel below ``dagkit/_data``, in a checkout at its top), and the folder of a cache."""

from __future__ import annotations

import os
from pathlib import Path

from dagkit.errors import WorkspaceError

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """The folder ``annotation_configs`` or ``datasets`` as it ships.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for root in (_PACKAGE / "_data", _PACKAGE.parent.parent):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"dagkit was installed without its folder {name!r}. Install it again from its wheel.")


def user_cache_folder() -> Path:
    """``dagkit`` in the user's cache: ``$XDG_CACHE_HOME``, by default ``~/.cache``. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "dagkit"


def expanded(path: str | Path) -> Path:
    """A path with ``~`` or ``~name`` at its beginning replaced.

    Raises:
        WorkspaceError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WorkspaceError(
            f"{str(path)[:200]!r}: there is no such home folder on this machine. Write the whole path, or set HOME."
        ) from error
