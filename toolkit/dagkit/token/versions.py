"""Versions of tokens: three plain numbers, ``1.2.0``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

from packaging.version import Version

Bump = Literal["patch", "minor", "major"]
NUMBER: Final = r"(?:0|[1-9]\d{0,5})"
_VERSION: Final = re.compile(rf"{NUMBER}\.{NUMBER}\.{NUMBER}")


def is_version(text: str) -> bool:
    """Whether ``text`` is a semantic version of three plain numbers, as all tokens have."""
    return _VERSION.fullmatch(text) is not None


def next_version(existing: Iterable[str], bump: Bump = "patch") -> str:
    """The version after all existing ones: ``1.0.0`` where there is none.

    Args:
        existing: semantic versions; other names are left out.
        bump: patch = same data, new seed or settings; minor = more data; major = other base model or concept
            definition.
    """
    newest = max((Version(name) for name in existing if is_version(name)), default=None)
    if newest is None:
        return "1.0.0"
    following = {
        "patch": (newest.major, newest.minor, newest.micro + 1),
        "minor": (newest.major, newest.minor + 1, 0),
        "major": (newest.major + 1, 0, 0),
    }
    return ".".join(map(str, following[bump]))
