"""``file:///folder``: a folder on this machine or a mounted share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from dagkit.errors import PublishError, WorkspaceError
from dagkit.registry.index import PAGE_FILE, Entry
from dagkit.registry.locations.keyed import KeyedLocation
from dagkit.workspace import StageFolder, atomic_write, lock, open_plain, sha256_bytes

_OWN: Final = re.compile(rf"\.lock|{PAGE_FILE}|\..*\.part|\d+\.\d+\.\d+-[0-9a-f]{{16}}")
PATIENCE_S: Final = 10.0
"""How long a publisher waits for another one that is writing into the same folder."""


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
        with _publish_errors(), lock(self.root, patience_s=PATIENCE_S):
            yield

    def _get(self, key: str, limit: int) -> tuple[bytes, str] | None:
        try:
            with _publish_errors(), open_plain(self._path(key)) as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            return None
        return data, sha256_bytes(data)

    def _put(self, key: str, data: bytes) -> None:
        with _publish_errors():
            atomic_write(self._path(key), data)

    def _path(self, key: str) -> Path:
        """Where a file lies; never outside the folder, and never through a link."""
        path = self.root / key
        try:
            is_plain = StageFolder(self.root).inside(key).resolve() == self.root.resolve() / key
        except (WorkspaceError, OSError, RuntimeError):  # out of the folder, or links in a loop
            is_plain = False
        if not is_plain:
            raise PublishError(f"{path} leads through a symbolic link, which no published token does. Remove it.")
        return path

    def _replace(self, key: str, data: bytes, state: str | None) -> None:
        self._put(key, data)  # the lock is held since the index was read

    def strangers(self) -> list[str]:
        """What lies there and is not dagkit's."""
        try:
            names = [path.name for path in self.root.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PublishError(f"{self.root} cannot be read: {error.strerror}. Publish to another place.") from error
        return sorted([*(name for name in names if not _OWN.fullmatch(name)), *super().strangers()])


@contextmanager
def _publish_errors() -> Iterator[None]:
    try:
        yield
    except WorkspaceError as error:
        message = str(error).replace("use another --workspace", "publish --to another place")
        raise PublishError(message) from error
