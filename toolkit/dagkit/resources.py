"""What ships with dagkit (in the wheel below ``dagkit/_data``, in a checkout at its top), and the folder of a cache."""

from __future__ import annotations

import os
import stat
from pathlib import Path

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


def exists(path: Path) -> bool:
    """Whether there is anything at a path that somebody gave; a path that cannot be, such as one with a NUL, is not."""
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether there is a plain file, or a link to one, at a path that somebody gave; as `exists`."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def user_cache_folder() -> Path:
    """``dagkit`` in the user's cache: ``$XDG_CACHE_HOME``, by default ``~/.cache``. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dagkit"
