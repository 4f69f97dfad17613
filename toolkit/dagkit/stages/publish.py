"""publish: a token -> a folder, a bucket or the Hub. Refuses one that nobody measured, or worse than before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagkit import provenance
from dagkit.errors import PublishError, quoted
from dagkit.stages import base

if TYPE_CHECKING:
    from dagkit.registry import Entry, Location, Parcel
    from dagkit.token import GuidelineToken
    from dagkit.workspace import Workspace


def run(
    workspace: Workspace,
    reference: str,
    to: str,
    *,
    examples: Sequence[Path] = (),
    is_public: bool = False,
    is_dry_run: bool = False,
    is_unmeasured_allowed: bool = False,
    is_worse_allowed: bool = False,
) -> base.StageResult:
    """Publishes one version of a token; of one that is published already, what is missing or damaged.

    Exactly this leaves: the artifact's four files, its signature if it has one, the figures of its evaluation without
    prompts and images, and the examples that are named. The index that makes them visible is written last.

    Args:
        workspace: whose tokens and reports to use.
        reference: the token: ``name@version``, its folder, or a URL.
        to: ``hf://org/name``, ``s3://bucket/prefix`` or ``file:///folder``.
        examples: images to publish with it.
        is_public: on the Hub, let everybody see it; else the repository is private.
        is_dry_run: check everything and list what would leave, but write nothing.
        is_unmeasured_allowed: publish without an evaluation.
        is_worse_allowed: publish although it is worse than the version that it replaces.

    Returns:
        Its ``data`` has ``files`` (name -> bytes), ``url`` and ``notes``.

    Raises:
        TokenError: there is no such token, it is damaged, or its evaluation is another token's.
        PublishError: the gate is closed, the version is published already with other content, or the location cannot be
            read or written.
    """
    from dagkit import registry

    location = registry.open_location(to, is_public=is_public)
    resolved = registry.resolve(reference, workspace=workspace.root)
    token = registry.load_resolved(resolved)
    index = location.read_index()
    figures = _figures(workspace, token, resolved.path)
    notes = []
    evaluation = None if figures is None else (json.dumps(figures, indent=1, sort_keys=True) + "\n").encode()
    parcel = registry.pack(
        resolved.path, evaluation=evaluation, figures=_headlines(figures or {}), examples=list(examples)
    )
    url = f"{location.url}@{token.version}"
    if (there := registry.published(parcel, index)) is not None:
        return _repair(parcel, location, there, is_dry_run)
    if figures is None and not is_unmeasured_allowed:
        raise PublishError(
            f"{token.name} has no evaluation, so nobody knows what it does. Run: dagkit evaluate --token {token.name} "
            "(or publish it --without-evaluation)."
        )
    before = registry.replaced(token.version, index)
    if figures is not None:
        failed = [check["text"] for check in figures.get("checks", ()) if not check["is_passed"]]
        notes += [f"its evaluation fails a gate: {text}" for text in failed]
        if before is not None:
            notes += _compare(token, figures, location, before, is_worse_allowed)
    if index is None:
        registry.refuse_strangers(location)
    data: dict[str, Any] = {"url": url, "files": registry.written_files(parcel), "notes": notes}
    if is_dry_run:
        sizes = sum(size or 0 for size in data["files"].values())
        message = (
            f"dry run: {len(data['files'])} files, {sizes:,} bytes, would go to {location.url}; nothing was written"
        )
        return base.StageResult("publish", 0, 0, message, data)
    entry = registry.publish(parcel, location)
    return base.StageResult("publish", 1, 0, f"{url} ({len(entry.files)} files, {entry.content[:19]})", data)


def _repair(parcel: Parcel, location: Location, entry: Entry, is_dry_run: bool) -> base.StageResult:
    """What is published already is looked over; what is missing or damaged of it is written again."""
    from dagkit import registry

    url = f"{location.url}@{entry.version}"
    data: dict[str, Any] = {"url": url, "files": registry.written_files(parcel), "notes": []}
    damaged = registry.damaged_files(location, entry)
    if not damaged:
        return base.StageResult("publish", 0, 1, f"{url} is published already, with the same content", data)
    names = ", ".join(damaged)
    if is_dry_run:
        message = f"dry run: {url} is published already; {names} would be written again; nothing was written"
        return base.StageResult("publish", 0, 0, message, data)
    registry.publish(parcel, location)
    return base.StageResult("publish", 1, 0, f"{url}: written again what was missing or damaged: {names}", data)


def _figures(workspace: Workspace, token: GuidelineToken, folder: Path) -> dict[str, Any] | None:
    """What may leave of the token's evaluation: the workspace's own, else the one it was published with."""
    from dagkit import evaluation
    from dagkit.registry import FIGURES_FILE

    own = workspace.stage("reports", token.concept).path / token.version / "figures.json"
    path = own if own.is_file() else folder / FIGURES_FILE
    if not path.is_file():
        return None
    figures = evaluation.read_figures(path, token)
    rows = [_row(row, figures["column"]) for row in figures["prompts"]]
    public: dict[str, Any] = provenance.public({**figures, "prompts": rows}, is_hashed=False)
    return public


def _row(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """What may leave of one prompt: how the token did on it and which member it asks for, and not the prompt."""
    about = {name: row.get(name) for name in ("key", "kind", "member")}
    return {**about, "columns": {column: row["columns"][column]}}


def _compare(
    token: GuidelineToken, figures: Mapping[str, Any], location: Location, before: Entry, is_worse_allowed: bool
) -> list[str]:
    """Refuses a token that is worse than the version it replaces, or that cannot be compared with it."""
    from dagkit import evaluation, registry
    from dagkit.evaluation.identity import parse_figures
    from dagkit.registry import FIGURES_FILE

    if before.version.split(".")[0] != token.version.split(".")[0]:
        return [f"a new major version is not compared with {before.version}: model or concept are not the same"]
    published = registry.published_figures(location, before)
    if published is None:
        return [f"{before.version} was published without an evaluation, so there is nothing to compare with"]
    old = f"{token.concept}@{before.version}"
    try:
        older = parse_figures(published)
        differing = evaluation.comparable(figures, older)
        rows = [] if differing else evaluation.compare(figures, older, figures["column"])
    except ValueError as error:
        problem = quoted(str(error))[1:-1]
        raise PublishError(f"{FIGURES_FILE} of {old} at {location.url} is not an evaluation ({problem}).") from error
    if differing:
        problem = (
            f"{token.name} and {old} were evaluated with different {', '.join(differing)}, so nobody can say whether "
            "it is worse. Evaluate it with the same prompts, seed, sampling and judge"
        )
    else:
        worse = evaluation.regressions(rows)
        if not worse:
            return []
        problem = f"{token.name} is worse than {old}, which it would replace: {'; '.join(one['text'] for one in worse)}"
    if not is_worse_allowed:
        raise PublishError(f"{problem}. Improve it, or publish it with --force-worse.")
    return [problem]


def _headlines(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures shown on the index page."""
    found = {}
    for kind, name, title in (
        ("named", "erase_rate", "erased"),
        ("hinted", "erase_rate", "erased when hinted"),
        ("named", "preservation", "kept"),
        ("safe", "fired", "false triggers"),
    ):
        result = figures.get("results", {}).get(kind, {}).get(figures.get("column"), {})
        value = (result.get(name) or {}).get("value")
        if value is not None:
            found[title] = round(float(value), 4)
    return found
