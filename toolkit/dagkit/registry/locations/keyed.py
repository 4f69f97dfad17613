"""What a folder and a bucket have in common: files by key, and an index that is replaced in one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dagkit.errors import PublishError
from dagkit.registry.index import INDEX_FILE, MAX_INDEX_BYTES, PAGE_FILE, Entry, Index, page, parse_index


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
            raise PublishError(f"{self.url}/{key}: the index names this file, but it is not there. Publish it again.")
        return found[0]

    def publish(self, concept: str, entry: Entry, files: Mapping[str, bytes]) -> Index:
        """Writes the files, then the index that names them."""
        with self._exclusive():
            before, state = self._index()
            index = extend(before, concept, entry, self.url)
            for name, data in files.items():
                self._put(f"{entry.folder}/{name}", data)
            self._replace(INDEX_FILE, index.to_bytes(), state)
            self.write_page(index)
        return index

    def write_page(self, index: Index) -> None:
        """Writes ``INDEX.md`` anew."""
        self._put(PAGE_FILE, page(index, self.url).encode())

    def _index(self) -> tuple[Index | None, str | None]:
        found = self._get(INDEX_FILE, MAX_INDEX_BYTES)
        if found is None:
            return None, None
        if len(found[0]) > MAX_INDEX_BYTES:
            raise PublishError(f"{self.url}/{INDEX_FILE} is larger than {MAX_INDEX_BYTES:,} bytes. Restore it.")
        return parse_index(found[0], f"{self.url}/{INDEX_FILE}"), found[1]


def extend(index: Index | None, concept: str, entry: Entry, url: str) -> Index:
    """The index with one version more.

    Raises:
        PublishError: it has that version already, or belongs to another concept.
    """
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
