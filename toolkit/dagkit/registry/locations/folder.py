"""``file:///folder``: a folder on this machine or a mounted share."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from dagkit.errors import PublishError, WorkspaceError
from dagkit.registry.index import PAGE_FILE, Entry
from dagkit.registry.locations.keyed import KeyedLocation
from dagkit.registry.plain import read_plain
from dagkit.workspace import StageFolder, atomic_write, lock, sha256_bytes

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
        with _publish_errors(), _patient_lock(self.root):
            yield

    def _get(self, key: str, limit: int) -> tuple[bytes, str] | None:
        path = self._path(key)
        try:
            data = read_plain(path, limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PublishError(f"{path} cannot be read: {error.strerror}. Check its rights and kind.") from error
        return data, sha256_bytes(data)

    def _put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        if path.is_dir():
            raise PublishError(f"{path} is a folder, but a file of the token belongs there. Remove it.")
        with _publish_errors():
            atomic_write(path, data)

    def _path(self, key: str) -> Path:
        """Where a file lies; never outside the folder, and never through a link."""
        path = self.root / key
        try:
            is_plain = StageFolder(self.root).inside(key).parent.resolve() == (self.root.resolve() / key).parent
        except (WorkspaceError, OSError, RuntimeError):  # out of the folder, or links in a loop
            is_plain = False
        if not is_plain:
            raise PublishError(f"{path} leads through a symbolic link, which no published token does. Remove it.")
        return path

    def _replace(self, key: str, data: bytes, state: str | None) -> None:
        self._put(key, data)  # the lock is held since the index was read

    def _strangers(self) -> list[str]:
        try:
            names = [path.name for path in self.root.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PublishError(f"{self.root} cannot be read: {error.strerror}. Publish to another place.") from error
        return sorted([*(name for name in names if not _OWN.fullmatch(name)), *super()._strangers()])


@contextmanager
def _patient_lock(folder: Path) -> Iterator[None]:
    """As `lock`, but waits for another publisher: it may be about to publish the very same."""
    end = time.monotonic() + PATIENCE_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(folder))
                break
            except WorkspaceError as error:
                if not isinstance(error.__cause__, BlockingIOError) or time.monotonic() > end:
                    raise
            time.sleep(0.05)
        yield


@contextmanager
def _publish_errors() -> Iterator[None]:
    try:
        yield
    except WorkspaceError as error:
        message = str(error).replace("use another --workspace", "publish --to another place")
        raise PublishError(message) from error
