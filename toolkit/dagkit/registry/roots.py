"""Roots of tokens on this machine: folders ``<root>/<concept>/<version>/`` that `dagkit optimize` writes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from packaging.version import Version

from dagkit.errors import TokenError
from dagkit.registry.reference import NAME, Reference, choose, refuse_missing
from dagkit.token import GuidelineToken, next_version
from dagkit.token.versions import Bump, is_version

_SHIPPED = Path(__file__).parent.parent / "demo" / "tokens"


def token_roots(workspace: str | Path | None = None) -> list[Path]:
    """Where tokens are looked up by name: the workspace's ``tokens/``, then those that ship with dagkit.

    Args:
        workspace: default ``$DAGKIT_WORKSPACE``, else ``runs``.
    """
    chosen = Path(workspace or os.environ.get("DAGKIT_WORKSPACE") or "runs")
    return [chosen / "tokens", *([_SHIPPED] if _SHIPPED.is_dir() else [])]


def concepts_in(root: Path) -> list[str]:
    """Concepts with at least one version below a root, sorted."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted(folder.name for folder in folders if NAME.fullmatch(folder.name) and versions_in(root, folder.name))


def versions_in(root: Path, concept: str) -> list[str]:
    """Versions of a concept below a root, the oldest first."""
    folder = root / concept
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path.name for path in found if is_version(path.name) and path.is_dir()), key=Version)


def next_version_in(root: Path, concept: str, bump: Bump) -> str:
    """The version after all that a root has of a concept; ``1.0.0`` where it has none.

    Args:
        root: e.g. ``runs/tokens``.
        concept: its name.
        bump: patch = same data, new seed or settings; minor = more data; major = other base model or concept.
    """
    return next_version(versions_in(root, concept), bump)


def require_new(folder: Path, version: str) -> Path:
    """The folder of a version that is about to be written.

    Args:
        folder: of the concept, e.g. ``runs/tokens/weapon``.
        version: three numbers.

    Raises:
        TokenError: it is no version, or there is such a one already: none is ever overwritten.
    """
    if not is_version(version):
        raise TokenError(f"expected a version such as 1.2.0, but got {version!r}.")
    target = folder / version
    if target.exists() or target.is_symlink():
        following = next_version_in(folder.parent, folder.name, "patch")
        raise TokenError(
            f"{target} exists, and a version is never overwritten. Use {following}, or let dagkit choose the version."
        )
    return target


def local_tokens(folder: Path) -> list[GuidelineToken]:
    """All versions of a concept, the oldest first.

    Args:
        folder: of the concept, e.g. ``runs/tokens/weapon``.

    Raises:
        TokenError: one of them is damaged.
    """
    return [GuidelineToken.load(folder / version) for version in versions_in(folder.parent, folder.name)]


def find(reference: Reference, roots: Sequence[Path]) -> Path:
    """The folder of the newest version that fits, in the first root that has one.

    Raises:
        TokenError: no root has the concept or a version that fits; the message says what there is.
    """
    name = reference.name or ""
    available: set[str] = set()
    for root in roots:
        versions = versions_in(root, name)
        version = choose(reference.wanted, versions)
        if version is not None:
            return root / name / version
        available |= set(versions)
    if available:
        refuse_missing(reference, available, name)
    shown = ", ".join(map(str, roots))
    known = sorted({concept for root in roots for concept in concepts_in(root)})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if Path(name).is_dir():
        hint += f" For the folder of that name, write ./{name}."
    raise TokenError(
        f"{reference.text!r}: there is no token of {name!r} in {shown}.{hint} Available: {', '.join(known) or 'none'}. "
        f"Train one with: dagkit optimize --concept {name}"
    )
