"""What may be said of where something came from: names and hashes, never a path of this machine.

Whatever is written into a record, a card, figures or a report goes through here: paths tell who somebody is (home
folders are named after people) and what they work on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

_LOCAL: Final = re.compile(
    r"file:|~(?:[A-Za-z_][^/\\\s]*)?(?:[/\\]|$)|\.{1,2}(?:[/\\]|$)|[A-Za-z]:[/\\]|\\\\|/(?=[^/\s])"
)
_PART: Final = r"[^\s\"'<>|,;)\]]"
_START: Final = r"(?<![\w/.-])"
_HOMES: Final = rf"{_START}(?:file:/*)?(?:/home/|/Users/|/root/|[A-Za-z]:[/\\]+Users[/\\]+){_PART}*"
_HOME: Final = re.compile(r"(?:(?:file:/*)?/(?:home|Users)/|[A-Za-z]:[/\\]+Users[/\\]+|~)[^/\\]*[/\\]?")


def public_name(source: str) -> str:
    """A Hub id, or any other name, as it is; of a file or folder of this machine only its own name.

    Args:
        source: e.g. what ``--model`` was given.
    """
    return _local_name(source) if _is_local(source) else source


def is_repository(name: str) -> bool:
    """Whether a name is one of a repository on the Hub, ``owner/name``; whether there is one, only the Hub knows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and name.isprintable()


def public(value: Any, *, is_hashed: bool = True) -> Any:
    """A copy of a JSON value in which no string holds a path of this machine.

    Args:
        value: settings, figures or a part of them.
        is_hashed: a file or folder is called ``name (sha256:...)``, so that two of one name are told apart; else
            ``name``. Of a folder, the hash is over the files directly in it.
    """
    if isinstance(value, Mapping):
        return {key: public(inner, is_hashed=is_hashed) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(inner, is_hashed=is_hashed) for inner in value]
    if not isinstance(value, str):
        return value
    if _is_local(value):
        digest = _digest(value) if is_hashed else None
        return _local_name(value) + (f" (sha256:{digest[:16]})" if digest else "")
    return _homes().sub(lambda found: _local_name(found[0]), value)


def local_paths(value: Any) -> list[str]:
    """Strings of a JSON value that hold a path of some machine, by their looks alone."""
    if isinstance(value, Mapping):
        return [path for inner in value.values() for path in local_paths(inner)]
    if isinstance(value, (list, tuple)):
        return [path for inner in value for path in local_paths(inner)]
    return [value] if isinstance(value, str) and (_LOCAL.match(value) or _homes().search(value)) else []


def _is_local(text: str) -> bool:
    if _LOCAL.match(text):
        return True
    try:
        return ("/" in text or "\\" in text) and Path(text).exists()
    except (OSError, ValueError):  # too long, or with a NUL: no path
        return False


def _local_name(path: str) -> str:
    """The last part of a path; ``home`` where that would be somebody's name."""
    if path in (".", ".."):
        path = str(Path(path).resolve())
    if _HOME.fullmatch(path) or path.rstrip("/") == _own_home():
        return "home"
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path.removeprefix("file:")).name or "folder"


def _homes() -> re.Pattern[str]:
    """Paths in the middle of a text: below this user's home, or what looks like anybody's."""
    own = _own_home()
    return re.compile(rf"{_START}{re.escape(own)}(?:/{_PART}*)?(?!\w)|{_HOMES}" if own else _HOMES)


def _own_home() -> str | None:
    try:
        home = str(Path.home())
    except RuntimeError:
        return None
    return home if len(home) > 1 else None


def _digest(text: str) -> str | None:
    try:
        path = Path(text.removeprefix("file://")).expanduser().resolve()
        files = sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]
        stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
        return _hash(stamps, path.is_dir()) if stamps else None
    except (OSError, ValueError, RuntimeError):
        return None


@lru_cache(maxsize=64)
def _hash(stamps: tuple[tuple[str, int, int], ...], is_folder: bool) -> str:
    whole = hashlib.sha256()
    for name, _, _ in stamps:
        with Path(name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if not is_folder:
            return digest.hexdigest()
        whole.update(f"{digest.hexdigest()}  {Path(name).name}\n".encode())
    return whole.hexdigest()
