"""What ships with dagkit (in the wheel below ``dagkit/_data``, in a checkout at its top), and the folder of a cache."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

from dagkit.errors import DagkitError

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
    """``dagkit`` in the user's cache: ``$XDG_CACHE_HOME``, by default ``~/.cache``. It need not exist.

    Raises:
        DagkitError: as for `expanded`.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else expanded("~/.cache", "the user's cache")) / "dagkit"


def source_date() -> datetime | None:
    """The time that ``SOURCE_DATE_EPOCH`` puts in the place of now; None where it is not set.

    Raises:
        DagkitError: it is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.fromtimestamp(int(epoch), UTC) if epoch else None
    except (ValueError, OverflowError, OSError) as error:
        raise DagkitError(
            f"SOURCE_DATE_EPOCH: expected whole seconds since 1970 up to the year 9999, but got {str(epoch)[:60]!r}. "
            "Set it to the output of `date +%s`, or unset it."
        ) from error


def expanded(path: str | Path, where: str) -> Path:
    """A path in which ``~`` and ``~name`` are somebody's home.

    Args:
        path: as a user wrote it.
        where: what named it, for the message.

    Raises:
        DagkitError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DagkitError(
            f"{where}: expected a path, but {str(path)[:200]!r} begins with a home folder that is not known. "
            "Write the whole path, or set HOME."
        ) from error
