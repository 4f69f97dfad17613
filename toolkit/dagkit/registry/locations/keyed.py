"""What a folder and a bucket have in common: files by key, and an index that is replaced in one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dagkit.errors import PublishError
from dagkit.registry.index import INDEX_FILE, MAX_INDEX_BYTES, PAGE_FILE, PAGE_MARK, Entry, Index, page, parse_index
from dagkit.workspace import sha256_bytes

if TYPE_CHECKING:
    from dagkit.registry.locations import Location


class MissingFileError(PublishError):
    """A file of a published version is not there, or cannot be what the index says."""


class ConflictError(PublishError):
    """Somebody else published there at the same time."""


class KeyedLocation(ABC):
    """Files below ``url``; versions in folders of their own, named by version and content."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def _get(self, key: str, limit: int) -> tuple[bytes, str] | None:
        """At most ``limit + 1`` bytes and the state that `_replace` expects; None where there is no such key."""

    @abstractmethod
    def _put(self, key: str, data: bytes) -> None:
        """Writes a file whole or not at all."""

    @abstractmethod
    def _replace(self, key: str, data: bytes, state: str | None) -> None:
        """As `_put`, but PublishError if the file has changed since `_get` (None: if it exists)."""

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        yield

    def local_folder(self, entry: Entry) -> Path | None:
        """None: not on this disk."""
        return None

    def read_index(self) -> Index | None:
        """What is published, or None where nothing is."""
        return self._index()[0]

    def read(self, entry: Entry, name: str) -> bytes:
        """One file of a version."""
        key = f"{entry.folder}/{name}"
        found = self._get(key, entry.files[name].size)
        if found is None:
            raise MissingFileError(
                f"{self.url}/{key}: the index names this file, but it is not there. Publish it again."
            )
        return found[0]

    def publish(self, concept: str, entry: Entry, files: Mapping[str, bytes]) -> Index:
        """Writes the files, then the index that names them; of a version that is there, only what it lacks."""
        if self.read_index() is None:
            refuse_strangers(self)  # before anything is written
        with self._exclusive():
            before, state = self._index()
            index = extend(before, concept, entry, self.url)
            is_new = index is not before
            for name in files if is_new else damaged_files(self, entry):
                self._put(f"{entry.folder}/{name}", files[name])
            if is_new:
                try:
                    self._replace(INDEX_FILE, index.to_bytes(), state)
                except ConflictError:
                    index = self._index()[0] or Index(concept=concept)
                    if not has(index, concept, entry):  # else somebody published the very same meanwhile
                        raise
            self.write_page(index)
        return index

    def write_page(self, index: Index) -> None:
        """Writes ``INDEX.md`` anew."""
        self._put(PAGE_FILE, page(index, self.url).encode())

    def strangers(self) -> list[str]:
        """What lies there and is not dagkit's."""
        found = self._get(PAGE_FILE, MAX_INDEX_BYTES)
        return [PAGE_FILE] if found is not None and PAGE_MARK not in found[0].decode("utf-8", "replace") else []

    def _index(self) -> tuple[Index | None, str | None]:
        found = self._get(INDEX_FILE, MAX_INDEX_BYTES)
        if found is None:
            return None, None
        if len(found[0]) > MAX_INDEX_BYTES:
            raise PublishError(f"{self.url}/{INDEX_FILE} is larger than {MAX_INDEX_BYTES:,} bytes. Restore it.")
        return parse_index(found[0], f"{self.url}/{INDEX_FILE}"), found[1]


def extend(index: Index | None, concept: str, entry: Entry, url: str) -> Index:
    """The index with one version more; the index itself where it has exactly this one already.

    Raises:
        PublishError: it has that version with other content, or belongs to another concept.
    """
    if index is not None and has(index, concept, entry):
        return index
    index = index or Index(concept=concept)
    if index.concept != concept:
        raise PublishError(
            f"{url} holds tokens of {index.concept!r}, but got one of {concept!r}. One location, one concept: "
            "publish it to another."
        )
    if index.entry(entry.version):
        raise PublishError(
            f"{url} has {concept}@{entry.version} already, with other content. A published version never changes: "
            "raise the version and publish that."
        )
    return index.with_entry(entry)


def refuse_strangers(location: Location) -> None:
    """Makes sure that a place without an index is nobody else's.

    Raises:
        PublishError: it holds something that dagkit did not put there, or cannot be read.
    """
    if strangers := location.strangers():
        shown = ", ".join(name[:60] for name in strangers[:5]) + (", ..." if len(strangers) > 5 else "")
        raise PublishError(
            f"{location.url} is not empty, and dagkit has published nothing there: it holds {shown}. Name an empty or "
            "new place."
        )


def has(index: Index, concept: str, entry: Entry) -> bool:
    """Whether an index has a version with exactly this content."""
    there = index.entry(entry.version)
    return index.concept == concept and there is not None and there.content == entry.content


def damaged_files(location: Location, entry: Entry) -> list[str]:
    """Files of a published version that are missing, or not as the index says.

    Raises:
        PublishError: the location cannot be read.
    """
    return [name for name in entry.files if not _is_whole(location, entry, name)]


def _is_whole(location: Location, entry: Entry, name: str) -> bool:
    try:
        return sha256_bytes(location.read(entry, name)) == entry.files[name].sha256
    except MissingFileError:
        return False
