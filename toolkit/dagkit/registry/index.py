"""``index.json``: which versions a location has, and the SHA-256 of every file of each.

A version is published when the index names it, and only then: its files are written before. The index carries its own
checksum and has one canonical form, so that a single changed byte is seen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from packaging.version import Version as Number
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from dagkit.errors import PublishError, quoted
from dagkit.manifests import explain, parse_json
from dagkit.token import MAX_BYTES
from dagkit.token.record import Name, Version
from dagkit.workspace import sha256_bytes, sha256_json

INDEX_FILE: Final = "index.json"
PAGE_FILE: Final = "INDEX.md"
SIGNATURE_FILE: Final = "model.sig"
FIGURES_FILE: Final = "figures.json"
EXAMPLES: Final = "examples/"
PAGE_MARK: Final = "Written by `dagkit publish`; a version never changes once it is listed here."
INDEX_SCHEMA: Final = 1
MAX_INDEX_BYTES: Final = 4 << 20
MAX_FILE_BYTES: Final = 16 << 20
MAX_EXAMPLES: Final = 64

FileName = Annotated[str, StringConstraints(pattern=r"^(examples/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=500)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PublishedFile(_Strict):
    """One file of a version."""

    sha256: Digest
    size: Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)]


class Entry(_Strict):
    """One published version.

    Attributes:
        version: semantic version.
        published: ISO 8601, UTC.
        base_model: id of the model that it guards.
        architecture: that model's family.
        figures: headline figures of its evaluation, by name.
        files: by name, relative to the version's folder.
        revision: commit of a Hub repository; empty elsewhere.
    """

    version: Version
    published: Text
    base_model: Text
    architecture: Name
    figures: Annotated[dict[Text, float], Field(max_length=32)] = {}
    files: Annotated[dict[FileName, PublishedFile], Field(max_length=len(MAX_BYTES) + 8 + MAX_EXAMPLES)]
    revision: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40})?$")] = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        missing = sorted(set(MAX_BYTES) - set(self.files))
        if missing:
            raise ValueError(f"files lacks {', '.join(missing)}")
        return self

    @property
    def content(self) -> str:
        """``sha256:`` over names and hashes of the files: equal for equal content."""
        return sha256_json({name: file.sha256 for name, file in self.files.items()})

    @property
    def folder(self) -> str:
        """Where a folder or bucket has the files. The content is in the name: writers who race never mix."""
        return f"{self.version}-{self.content.removeprefix('sha256:')[:16]}"


class Index(_Strict):
    """All versions that a location has of one concept."""

    schema_version: Literal[1] = INDEX_SCHEMA
    concept: Name
    versions: Annotated[tuple[Entry, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        numbers = [Number(entry.version) for entry in self.versions]
        if numbers != sorted(set(numbers)):
            raise ValueError("versions must be unique and rise")
        return self

    def entry(self, version: str) -> Entry | None:
        """One version, or None."""
        return next((entry for entry in self.versions if entry.version == version), None)

    def with_entry(self, entry: Entry) -> Index:
        """A new index that has ``entry``, in place of one of its version."""
        others = (one for one in self.versions if one.version != entry.version)
        entries = sorted([*others, entry], key=lambda one: Number(one.version))
        return Index(concept=self.concept, versions=tuple(entries))

    def to_bytes(self) -> bytes:
        """The canonical form."""
        value = self.model_dump(mode="json")
        return _canonical({**value, "sha256": sha256_json(value)})


def describe(files: Mapping[str, bytes]) -> dict[str, PublishedFile]:
    """Hashes and sizes of files by name."""
    return {name: PublishedFile(sha256=sha256_bytes(data), size=len(data)) for name, data in sorted(files.items())}


def parse_index(data: bytes, where: str) -> Index:
    """Reads and checks an index.

    Raises:
        PublishError: it is damaged, changed by hand, or of a schema that this dagkit does not know.
    """
    try:
        value: Any = parse_json(data)
    except ValueError as error:
        raise PublishError(
            f"{where} is not JSON: {quoted(str(error))[1:-1]}. It is damaged; publish again or restore it."
        ) from error
    if not isinstance(value, dict):
        raise PublishError(f"{where}: expected a JSON object, but got {type(value).__name__}. Restore it.")
    schema = value.get("schema_version")
    if isinstance(schema, int) and schema > INDEX_SCHEMA:
        raise PublishError(
            f"{where} has schema {quoted(schema)}, but this dagkit knows {INDEX_SCHEMA} at most. Upgrade dagkit."
        )
    checksum = value.pop("sha256", None)
    try:
        index = Index.model_validate(value)
    except ValidationError as error:
        raise PublishError(f"{where} does not fit the schema: {explain(error)}. Restore it.") from error
    if checksum != sha256_json(index.model_dump(mode="json")) or index.to_bytes() != data:
        raise PublishError(f"{where} was changed by hand or damaged: its checksum does not fit. Restore it.")
    return index


def page(index: Index, url: str) -> str:
    """``INDEX.md``: the index for people."""
    lines = [
        f"# {index.concept}: {len(index.versions)} published version{'' if len(index.versions) == 1 else 's'}",
        "",
        PAGE_MARK,
        "",
        "| version | published | base model | signed | figures | content |",
        "|---|---|---|---|---|---|",
    ]
    for entry in reversed(index.versions):
        figures = ", ".join(f"{plain(name)} {value:.3g}" for name, value in entry.figures.items()) or "-"
        signed = "yes" if SIGNATURE_FILE in entry.files else "no"
        lines.append(
            f"| {entry.version} | {plain(entry.published)} | {plain(entry.base_model)} ({entry.architecture}) "
            f"| {signed} | {figures} | `{entry.content[7:19]}` |"
        )
    newest = index.versions[-1].version if index.versions else "latest"
    lines += ["", "```python", "import dagkit", "", f'token = dagkit.load_token("{url}@{newest}")', "```", ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """A text of an index without what could break a page, or drive a terminal."""
    return re.sub(r"[^\w ./:@,+-]", "_", text)


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def digest(url: str) -> str:
    """32 hex digits that stand for a location in file names."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]
