"""From a reference to a folder on this disk, and from there to a token that was checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dagkit.errors import TokenError, quoted
from dagkit.registry import roots as token_folders
from dagkit.registry.cache import fetch
from dagkit.registry.reference import parse
from dagkit.registry.signing import load_signed
from dagkit.token import RECORD_FILE, GuidelineToken
from dagkit.token.versions import is_version


@dataclass(frozen=True)
class ResolvedToken:
    """A token found.

    Attributes:
        reference: what was asked for.
        path: its folder on this disk; for a URL, in the user's cache.
        concept: as the reference has it, or None where it names a folder or a location.
        version: the version chosen, or None where the reference names a folder.
        url: the location that it came from, or None.
    """

    reference: str
    path: Path
    concept: str | None = None
    version: str | None = None
    url: str | None = None


def resolve(
    reference: str | Path, *, roots: Sequence[Path] | None = None, workspace: str | Path | None = None
) -> ResolvedToken:
    """Finds a token; for a URL, fetches it into the user's cache.

    Args:
        reference: a folder, ``name@version`` or a URL: see ``dagkit.registry.reference``.
        roots: where names are looked up; default ``token_roots(workspace)``.
        workspace: default ``$DAGKIT_WORKSPACE``, else ``runs``.

    Raises:
        TokenError: it names nothing, or nothing that is there.
        PublishError: a location cannot be read.
    """
    parsed = parse(str(reference)) if not isinstance(reference, Path) else None
    if parsed is None or parsed.folder is not None:
        return ResolvedToken(str(reference), _folder(reference))
    if parsed.name is not None:
        path = token_folders.find(parsed, token_folders.token_roots(workspace) if roots is None else roots)
        return ResolvedToken(parsed.text, path, concept=parsed.name, version=path.name)
    path, pin = fetch(parsed)
    return ResolvedToken(parsed.text, path, concept=pin.concept, version=pin.entry.version, url=parsed.url)


def load_token(
    reference: str | Path, *, workspace: str | Path | None = None, public_key: str | Path | None = None
) -> GuidelineToken:
    """Finds, verifies and loads a token.

    Args:
        reference: a folder, ``name@version`` or a URL.
        workspace: where names are looked up; default ``$DAGKIT_WORKSPACE``, else ``runs``.
        public_key: accept the token only if it was signed with this key.

    Raises:
        TokenError: there is no such token, or it is damaged, or it is another one than its folder's name says, or it is
            not signed with ``public_key``.
        PublishError: a location cannot be read.
    """
    return load_resolved(resolve(reference, workspace=workspace), public_key=public_key)


def load_resolved(resolved: ResolvedToken, *, public_key: str | Path | None = None) -> GuidelineToken:
    """As `load_token`, for a reference that is resolved already."""
    token = GuidelineToken.load(resolved.path) if public_key is None else load_signed(resolved.path, Path(public_key))
    expected = (resolved.concept or token.concept, resolved.version or token.version)
    if (token.concept, token.version) != expected:
        raise TokenError(
            f"{resolved.path}: expected {'@'.join(expected)}, but its {RECORD_FILE} says {token.name}. "
            "Somebody moved or replaced it; fetch or train it again."
        )
    return token


def _folder(text: str | Path) -> Path:
    try:
        return _token_folder(Path(text).expanduser())
    except (RuntimeError, OSError, ValueError) as error:  # no such home; a name too long, with a NUL, or forbidden
        problem = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise TokenError(
            f"{quoted(str(text))} cannot be read: {problem}. See what there is with: dagkit token list"
        ) from error


def _token_folder(path: Path) -> Path:
    if (path / RECORD_FILE).is_file():
        return path
    if path.name == RECORD_FILE and path.is_file():
        return path.parent
    versions = sorted(child.name for child in path.iterdir() if is_version(child.name)) if path.is_dir() else []
    if versions:
        raise TokenError(f"{_shown(path)} holds versions, not a token. Write {_shown(path / versions[-1])}.")
    what = "is not a token's folder: it has no token.json" if path.is_dir() else "does not exist"
    raise TokenError(f"{_shown(path)} {what}. See what there is with: dagkit token list")


def _shown(path: Path) -> str:
    """A path on one line of bounded length."""
    text = " ".join(str(path).split())
    return text if len(text) <= 300 else quoted(text)
