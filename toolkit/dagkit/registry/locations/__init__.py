"""Where tokens are published: a folder, a bucket, or the Hugging Face Hub. One file each, one protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dagkit.registry.index import Entry, Index


class Location(Protocol):
    """A place that holds the published versions of one concept."""

    url: str

    def read_index(self) -> Index | None:
        """What is published, or None where nothing is.

        Raises:
            PublishError: the location cannot be read, or its index is damaged.
        """
        ...

    def read(self, entry: Entry, name: str) -> bytes:
        """One file of a version, at most one byte longer than its entry says; nothing is verified yet.

        Raises:
            PublishError: it cannot be read.
        """
        ...

    def local_folder(self, entry: Entry) -> Path | None:
        """Where a version lies on this disk, or None for a remote location."""
        ...

    def publish(self, concept: str, entry: Entry, files: Mapping[str, bytes]) -> Index:
        """Writes the files, then the index that names them.

        Of a version that is published already with the same content, what it lacks is written again.

        Args:
            concept: of the token.
            entry: describes the version; ``revision`` empty.
            files: bytes by name, as in ``entry.files``.

        Raises:
            PublishError: the version is published already with other content, the location belongs to another concept,
                somebody else published something else at the same time, or it cannot be written.
        """
        ...

    def strangers(self) -> list[str]:
        """Names of what lies there and is not dagkit's: a first version is not published among it.

        Raises:
            PublishError: it cannot be read.
        """
        ...

    def write_page(self, index: Index) -> None:
        """Writes ``INDEX.md`` anew.

        Raises:
            PublishError: it cannot be written.
        """
        ...


def open_location(url: str, *, is_public: bool = False) -> Location:
    """The location of a URL; nothing is read or written yet.

    Args:
        url: ``file:///folder``, ``hf://org/name`` or ``s3://bucket/prefix``, without a version.
        is_public: a Hub repository that is made shall be public.

    Raises:
        TokenError: it is no such URL.
        PublishError: an extra is not installed.
    """
    from dagkit.registry.locations.bucket import Bucket
    from dagkit.registry.locations.folder import Folder
    from dagkit.registry.locations.hub import Hub
    from dagkit.registry.reference import parse_location

    url = parse_location(url)
    if url.startswith("hf://"):
        return Hub(url, is_public=is_public)
    return Bucket(url) if url.startswith("s3://") else Folder(url)
