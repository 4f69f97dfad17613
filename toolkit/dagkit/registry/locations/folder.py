"""``file:///folder``: a folder on this machine or a mounted share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from dagkit.errors import PublishError, WorkspaceError
from dagkit.registry.index import Entry
from dagkit.registry.locations.keyed import KeyedLocation
from dagkit.workspace import atomic_write, lock, sha256_bytes


class Folder(KeyedLocation):
    """A folder, locked while it is written."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = Path(urlsplit(url).path)

    def local_folder(self, entry: Entry) -> Path | None:
        """Where a version lies."""
        return self.root / entry.folder

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with _publish_errors(), lock(self.root):
            yield

    def _get(self, key: str, limit: int) -> tuple[bytes, str] | None:
        path = self.root / key
        if path.parent.resolve() != (self.root.resolve() / key).parent:
            raise PublishError(f"{path} leads through a symbolic link, which no published token does. Remove it.")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PublishError(f"{path} cannot be read: {error.strerror}. Check its rights and kind.") from error
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PublishError(f"{path} is not a plain file, as all files of a token are. Remove it.")
            data = file.read(limit + 1)
        return data, sha256_bytes(data)

    def _put(self, key: str, data: bytes) -> None:
        with _publish_errors():
            atomic_write(self.root / key, data)

    def _replace(self, key: str, data: bytes, state: str | None) -> None:
        self._put(key, data)  # the lock is held since the index was read


@contextmanager
def _publish_errors() -> Iterator[None]:
    try:
        yield
    except WorkspaceError as error:
        message = str(error).replace("use another --workspace", "publish --to another place")
        raise PublishError(message) from error
