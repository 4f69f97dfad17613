"""What users write to name a token, taken apart: a folder, ``name@version``, or a URL.

./runs/tokens/weapon/1.0.0        a folder; anything with a slash, or one that starts with '.' or '~'
weapon, weapon@latest             the newest version below a root of tokens
weapon@1.2.0, weapon@^1.2         one version; the newest 1.x from 1.2.0 on
file:///srv/tokens/weapon@^1      the same, where `dagkit publish` put it
hf://acme/weapon-sd15@1.0.0
s3://bucket/prefix@1.0.0
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NoReturn

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dagkit.errors import TokenError, quoted
from dagkit.token.versions import NUMBER, is_version

SCHEMES: Final = ("file", "hf", "s3")
NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")
LATEST: Final = "latest"
_MAX_LENGTH: Final = 1024
_CARET: Final = re.compile(rf"\^({NUMBER})(?:\.({NUMBER}))?(?:\.({NUMBER}))?")
_EXPECTED: Final = (
    "Expected a folder (./tokens/weapon/1.0.0), a name (weapon, weapon@1.2.0, weapon@^1.2, weapon@latest) "
    "or a URL (hf://org/name@1.0.0, s3://bucket/prefix@1.0.0, file:///folder@^1)"
)


@dataclass(frozen=True)
class Reference:
    """A parsed reference: exactly one of ``folder``, ``name`` and ``url`` is set.

    Attributes:
        text: as the user wrote it.
        folder: a token's own folder.
        name: a concept's name, to look up below roots of tokens.
        url: a location to which tokens are published, without the version.
        wanted: ``latest``, a version ``1.2.0``, or a range ``^1.2``.
    """

    text: str
    folder: str | None = None
    name: str | None = None
    url: str | None = None
    wanted: str = LATEST

    @property
    def is_exact(self) -> bool:
        """Whether one version is named, so that the answer never changes."""
        return is_version(self.wanted)


def parse(text: str) -> Reference:
    """Takes a reference apart.

    Raises:
        TokenError: it is none, or its version is neither a version, a range nor ``latest``.
    """
    if len(text) > _MAX_LENGTH:
        raise TokenError(f"{quoted(text)}, of {len(text):,} characters, does not name a token. {_EXPECTED}.")
    if not text.strip() or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise TokenError(f"{text!r} does not name a token. {_EXPECTED}.")
    if "://" in text:
        scheme, _, rest = text.partition("://")
        base, at, wanted = _split(rest)
        if scheme not in SCHEMES:
            near = _near(scheme, SCHEMES)
            raise TokenError(f"{text!r}: {scheme!r} is no place for tokens.{near} Use one of hf://, s3://, file://.")
        _check_url(text, scheme, base)
        return Reference(text, url=f"{scheme}://{base.rstrip('/')}", wanted=_wanted(text, wanted, bool(at)))
    if "/" in text or "\\" in text or text.startswith((".", "~")):
        return Reference(text, folder=text)
    name, at, wanted = text.partition("@")
    if not NAME.fullmatch(name):
        raise TokenError(f"{text!r} does not name a token. {_EXPECTED}.")
    return Reference(text, name=name, wanted=_wanted(text, wanted, bool(at)))


def parse_location(text: str) -> str:
    """Checks the URL of a place to publish to: like a reference, but without a version.

    Raises:
        TokenError: it is no such URL, or has a version.
    """
    reference = parse(text)
    if reference.url is None:
        raise TokenError(
            f"{text!r} is not a place for tokens. Expected hf://org/name, s3://bucket/prefix or file:///folder."
        )
    if "@" in text.rpartition("/")[2]:
        raise TokenError(f"{text!r}: expected a place without a version. Write {reference.url}.")
    return reference.url


def choose(wanted: str, versions: Iterable[str]) -> str | None:
    """The newest version that fits, or None.

    Args:
        wanted: ``latest``, a version, or a range: ``^1.2`` is 1.2.0 <= v < 2.0.0, ``^0.3`` is 0.3.0 <= v < 0.4.0 (as in
            Cargo and npm: the leftmost number that is not 0 stays).
        versions: what there is.
    """
    fits = _range(wanted)
    return max((one for one in versions if fits is None or one in fits), key=Version, default=None)


def refuse_missing(reference: Reference, versions: Iterable[str], where: str) -> NoReturn:
    """Says that no version fits, and which there are."""
    known = sorted(versions, key=Version)
    shown = ", ".join(known[-12:]) or "none"
    near = _near(reference.wanted, known) if reference.is_exact else ""
    raise TokenError(f"{reference.text!r}: {where} has no version {reference.wanted}.{near} Available: {shown}.")


def _range(wanted: str) -> SpecifierSet | None:
    """The versions that fit; None for all. `packaging` has ranges, but no carets."""
    if wanted == LATEST:
        return None
    match = _CARET.fullmatch(wanted)
    if match is None:
        return SpecifierSet(f"=={wanted}")
    given = [int(part) for part in match.groups() if part is not None]
    fixed = next((index for index, number in enumerate(given) if number), len(given) - 1)
    end = [*given[:fixed], given[fixed] + 1]
    return SpecifierSet(f">={'.'.join(map(str, given))},<{'.'.join(map(str, end))}")


def _split(rest: str) -> tuple[str, str, str]:
    """Splits at the last '@' of the last part of a path: buckets and folders may hold others."""
    folder, slash, last = rest.rpartition("/")
    base, at, wanted = last.rpartition("@")
    return (f"{folder}{slash}{base}", at, wanted) if at else (rest, "", "")


def _wanted(text: str, wanted: str, is_given: bool) -> str:
    if not is_given or wanted == LATEST:
        return LATEST
    if is_version(wanted) or _CARET.fullmatch(wanted):
        return wanted
    shorter = wanted.removeprefix("v")
    if is_version(shorter):
        hint = f" Did you mean {shorter!r}?"
    elif _CARET.fullmatch(f"^{shorter}"):
        hint = f" Did you mean '^{shorter}'?"
    else:
        hint = _near(wanted, [LATEST])
    raise TokenError(f"{text!r}: expected a version such as 1.2.0, ^1.2 or latest, but got {wanted!r}.{hint}")


def _check_url(text: str, scheme: str, base: str) -> None:
    parts = base.rstrip("/").split("/")
    fits = {
        "file": base.startswith("/") and len(base) > 1,
        "hf": len(parts) == 2 and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", part) for part in parts),
        "s3": re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts[0]) is not None,
    }[scheme]
    if not fits or any(part in (".", "..") for part in parts) or any(mark in base for mark in "?#%"):
        shape = {"file": "file:///folder", "hf": "hf://org/name", "s3": "s3://bucket/prefix"}[scheme]
        raise TokenError(f"{text!r} is not a place for tokens. Expected {shape}, with @version behind it.")


def _near(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
