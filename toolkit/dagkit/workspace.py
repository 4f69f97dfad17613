"""Run folders: the only module that writes into a workspace.

A workspace has one folder a stage and concept, ``<root>/<stage>/<concept>/``. Each holds files and a ``manifest.jsonl``
with one row a finished item. A file is written under another name and renamed, and its row follows only when it lies
safely on disk; so whatever stops a run, what the manifest names is whole, and the next run goes on behind it. Rows hold
no clock times: a run that was killed and resumed ends with the same manifest as an undisturbed one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagkit.errors import WorkspaceError

if TYPE_CHECKING:
    from PIL.Image import Image

Row = dict[str, Any]


class Workspace:
    """A folder of runs.

    Args:
        root: where stages write; made on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def stage(self, name: str, concept: str) -> StageFolder:
        """The folder ``<root>/<name>/<concept>`` of one stage; nothing is created yet."""
        return StageFolder(self.root / checked_name(name) / checked_name(concept))


class StageFolder:
    """What one stage wrote for one concept: files beside a manifest with one row a finished item."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest(self) -> Path:
        """The JSON-lines file of finished items."""
        return self.path / "manifest.jsonl"

    def rows(self) -> list[Row]:
        """All finished items in the order in which they were finished. A line torn by a crash is left out.

        Raises:
            WorkspaceError: a whole line is not a JSON object with a ``key``.
        """
        try:
            data = self.manifest.read_bytes()
        except FileNotFoundError:
            return []
        rows = []
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
                row["key"]
            except (ValueError, TypeError, KeyError) as error:
                raise WorkspaceError(
                    f"{self.manifest}, line {number}: expected a JSON object with a 'key', but got "
                    f"{line[:60].decode(errors='replace')!r}. Delete that line; its item is then made again."
                ) from error
            rows.append(row)
        return rows

    def keys(self) -> set[str]:
        """Keys of all finished items."""
        return {row["key"] for row in self.rows()}

    def purged(self) -> set[str]:
        """Keys of items whose pictures `dagkit purge` deleted; their rows stay."""
        return set(self.read_json("purged.json")) if (self.path / "purged.json").is_file() else set()

    def present_rows(self) -> list[Row]:
        """As `rows`, without the purged ones."""
        purged = self.purged()
        return [row for row in self.rows() if row["key"] not in purged]

    def append(self, row: Mapping[str, Any]) -> None:
        """Records one finished item: a single line, on disk when this returns.

        Args:
            row: JSON-serialisable, with a ``key`` that is unique in this folder.
        """
        line = json.dumps({"key": row["key"], **row}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with _named_errors(self.manifest):
            self.path.mkdir(parents=True, exist_ok=True)
            with self.manifest.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end and _last_byte(file) != b"\n":
                    file.seek(0)
                    end = file.truncate(file.read().rfind(b"\n") + 1)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.manifest, end)
                    raise

    def write_bytes(self, relative: str, data: bytes) -> Path:
        """Writes one file atomically and returns its path."""
        path = self.inside(relative)
        atomic_write(path, data)
        return path

    def write_json(self, relative: str, value: Any) -> Path:
        """Writes one JSON file (two-space indent, keys in the given order) atomically."""
        return self.write_bytes(relative, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, relative: str) -> Any:
        """Reads one JSON file.

        Raises:
            WorkspaceError: the file is missing or is not JSON.
        """
        path = self.inside(relative)
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise WorkspaceError(f"{path}: no such file. Run the stage that writes it first.") from error
        except ValueError as error:
            raise WorkspaceError(
                f"{path}: expected JSON, but {error}. Delete the file and run its stage again."
            ) from error

    def write_image(self, relative: str, image: Image) -> Path:
        """Writes one PNG atomically."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return self.write_bytes(relative, buffer.getvalue())

    def read_image(self, relative: str, mode: str = "RGB") -> Image:
        """Reads one image, fully decoded.

        Raises:
            WorkspaceError: the file is missing, truncated or no image; the message names it.
        """
        from PIL import Image, UnidentifiedImageError

        path = self.inside(relative)
        try:
            with Image.open(path) as image:
                return image.convert(mode)
        except FileNotFoundError as error:
            raise WorkspaceError(
                f"{path}: no such image, but {self.manifest} names it. Restore it, or delete its row."
            ) from error
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise WorkspaceError(
                f"{path}: expected an image, but it cannot be read ({error}). "
                f"Delete it and its row in {self.manifest}, and run the stage again."
            ) from error

    def settings(self, value: Mapping[str, Any]) -> None:
        """Keeps the settings of this folder's run, and refuses to mix two runs in one folder.

        Raises:
            WorkspaceError: the folder was begun with other settings; the message says which differ.
        """
        value = json.loads(json.dumps(value))
        if not (self.path / "settings.json").exists():
            self.write_json("settings.json", value)
            return
        before = self.read_json("settings.json")
        different = sorted(key for key in {*before, *value} if before.get(key) != value.get(key))
        if different:
            shown = "; ".join(f"{key} was {before.get(key)!r}, now {value.get(key)!r}" for key in different)
            raise WorkspaceError(
                f"{self.path}: begun with other settings: {shown}. "
                "Use the same ones, another --workspace, or delete the folder."
            )

    def claim(self, *marks: str) -> None:
        """Makes sure that this folder is dagkit's to write into: empty, or known by what dagkit leaves in each.

        Args:
            marks: glob patterns of what else it is known by.

        Raises:
            WorkspaceError: it holds something, and dagkit did not make it; nothing was written.
        """
        with _named_errors(self.path):
            names = sorted(one.name for one in self.path.iterdir()) if self.path.exists() else []
            if names and not any(any(self.path.glob(mark)) for mark in (".lock", "manifest.jsonl", *marks)):
                raise WorkspaceError(
                    f"{self.path}: dagkit did not make this folder, and it holds {listed(names)}. "
                    "Nothing was written. Use another --workspace, or move that away."
                )

    def inside(self, relative: str) -> Path:
        """The path of a file in this folder.

        Raises:
            WorkspaceError: ``relative`` leads out of the folder.
        """
        path = self.path / relative
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise WorkspaceError(f"{self.path}: expected a path inside this folder, but got {relative!r}.")
        return path


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or, after a crash or on a full disk, not at all.

    Raises:
        WorkspaceError: the disk is full, read-only, or the folder cannot be made.
    """
    with _named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a folder for one writer; the lock ends with the process, however that ends.

    Raises:
        WorkspaceError: another process is writing there.
    """
    with _named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkspaceError(
                f"{folder}: another dagkit process is writing here. Wait for it, or use another --workspace."
            ) from error
        for stale in folder.rglob(".*.part"):
            stale.unlink(missing_ok=True)
        yield


def sha256_bytes(data: bytes) -> str:
    """``sha256:`` and 64 hex digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sha256_file(path: Path) -> str:
    """``sha256:`` and 64 hex digits of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def sha256_json(value: Any) -> str:
    """``sha256:`` and 64 hex digits of a JSON value, whatever the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def checked_name(name: str) -> str:
    """A name that is safe as one folder of a path.

    Raises:
        WorkspaceError: it is empty, hidden, or holds a separator.
    """
    if not name or name.startswith(".") or any(character in name for character in '/\\\0:*?"<>|'):
        raise WorkspaceError(f"expected a plain folder name, but got {name!r}. Use letters, digits, '-' and '_'.")
    return name


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message: the first ones, and how many more there are."""
    cut = (name if len(name) <= 60 else f"{name[:57]}..." for name in names[:limit])
    shown = ", ".join(name if name.isprintable() else repr(name) for name in cut)
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _last_byte(file: io.BufferedRandom) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system error into one that says what to do; a bug keeps its traceback."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "Free some space and run the same command again: finished work is kept.",
            errno.EDQUOT: "Free some of your quota and run the same command again: finished work is kept.",
            errno.EROFS: "The disk is read-only; use another --workspace.",
            errno.EACCES: "You may not write there; use another --workspace.",
            errno.ENOTDIR: "A file stands where a folder is needed; use another --workspace.",
            errno.EEXIST: "A file stands where a folder is needed; use another --workspace.",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise WorkspaceError(
            f"{path}: cannot be written: {(error.strerror or str(error)).lower()}. {advice}"
        ) from error
