"""Run folders: the only module that writes into a workspace.

A workspace has one folder a stage and concept, ``<root>/<stage>/<concept>/``. Each holds files and a ``manifest.jsonl``
with one row a finished item. A file is written under another name and renamed, and its row follows only when it lies
safely on disk; so whatever stops a run, what the manifest names is whole, and the next run goes on behind it. Rows hold
no clock times: a run that was killed and resumed ends with the same manifest as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from dagkit import manifests, system
from dagkit.errors import WorkspaceError, quoted
from dagkit.png import picture_png

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Row = dict[str, Any]

_MAX_LINE_BYTES: Final = 64 * 2**20
MAX_JSON_BYTES: Final = 256 * 2**20
IMAGE_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no format that calls another program
_LOCK: Final = b"dagkit\n"
_held: ContextVar[tuple[tuple[Path, str], ...]] = ContextVar("held", default=())
"""Of this writer's locks: below which folder it writes, and how the parts of its files are called there."""


class Workspace:
    """A folder of runs.

    Args:
        root: where stages write; made on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def stage(self, name: str, concept: str) -> StageFolder:
        """The folder ``<root>/<name>/<concept>`` of one stage; nothing is created yet."""
        path = self.root / checked_name(name) / checked_name(concept)
        return StageFolder(path, manifests.ROWS.get(name, manifests.Row))


class StageFolder:
    """What one stage wrote for one concept: files beside a manifest with one row a finished item.

    Args:
        path: of the folder.
        schema: what each row of its manifest must be.
    """

    def __init__(self, path: Path, schema: type[manifests.Row] = manifests.Row) -> None:
        self.path, self.schema = path, schema

    @property
    def manifest(self) -> Path:
        """The JSON-lines file of finished items."""
        return self.path / "manifest.jsonl"

    def has(self, relative: str) -> bool:
        """Whether there is anything of this name in the folder; whether it can be read shows when it is read.

        Raises:
            WorkspaceError: the folder cannot be looked into.
        """
        path = self.inside(relative)
        with _named_errors(path, "read"):
            return path.exists()

    def rows(self, schema: type[manifests.Row] | None = None) -> list[Row]:
        """All finished items in the order in which they were finished. A line torn by a crash is left out.

        Args:
            schema: what each row must be, where the folder's own schema is not enough.

        Raises:
            WorkspaceError: a whole line is not as the schema says, or repeats a key; the message has its number.
        """
        rows: dict[str, tuple[int, Row]] = {}
        for number, line in enumerate(self._whole_lines(), 1):
            where, again = f"{_shown(self.manifest)}, line {number}", "Delete that line; its item is then made again."
            try:
                row, reason = manifests.parse_json(line), ""
            except ValueError as error:
                row, reason = None, _reason(error)
            if not isinstance(row, dict) or "key" not in row:
                text = quoted(line[:60].decode(errors="replace"))
                raise WorkspaceError(f"{where}: expected a JSON object with a 'key', but got {text}{reason}. {again}")
            manifests.check(schema or self.schema, row, where, again)
            if row["key"] in rows:
                raise WorkspaceError(
                    f"{where}: expected each key once, but {quoted(row['key'])} is in line {rows[row['key']][0]}, too. "
                    "Delete one of these lines."
                )
            rows[row["key"]] = number, row
        return [row for _, row in rows.values()]

    def _whole_lines(self) -> Iterator[bytes]:
        """The lines of the manifest, without one that a crash has torn."""
        path = self.inside(self.manifest.name)
        try:
            with _named_errors(path, "read"), open_plain(path) as file:
                while (line := file.readline(_MAX_LINE_BYTES)).endswith(b"\n"):
                    yield line
        except FileNotFoundError:
            return
        if len(line) >= _MAX_LINE_BYTES:
            raise WorkspaceError(
                f"{_shown(path)}: expected lines of text, but one is larger than {_MAX_LINE_BYTES} bytes."
            )

    def keys(self) -> set[str]:
        """Keys of all finished items."""
        return {row["key"] for row in self.rows()}

    def purged(self) -> set[str]:
        """Keys of items whose pictures `dagkit purge` deleted; their rows stay."""
        return set(self.read_json("purged.json")) if self.has("purged.json") else set()

    def present_rows(self) -> list[Row]:
        """As `rows`, without the purged ones."""
        purged = self.purged()
        return [row for row in self.rows() if row["key"] not in purged]

    def append(self, row: Mapping[str, Any]) -> None:
        """Records one finished item: a single line, on disk when this returns.

        Args:
            row: JSON-serialisable, with a ``key`` that is unique in this folder.
        """
        path = self.inside(self.manifest.name)
        line = _json({"key": row["key"], **row}, path, separators=(",", ":")) + b"\n"
        with _named_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            with open_plain(path, "a+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end and _last_byte(file) != b"\n":
                    file.seek(0)
                    end = file.truncate(file.read().rfind(b"\n") + 1)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(path, end)
                    raise

    def commit(self, row: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Finishes one item: its files, and then its row.

        Args:
            row: as for `append`.
            files: path in this folder -> content.
        """
        for relative, data in files.items():
            self.write_bytes(relative, data)
        self.append(row)

    def write_bytes(self, relative: str, data: bytes) -> Path:
        """Writes one file atomically and returns its path."""
        path = self.inside(relative)
        atomic_write(path, data)
        return path

    def delete(self, relative: str) -> None:
        """Deletes one file, if it is there."""
        path = self.inside(relative)
        with _named_errors(path):
            path.unlink(missing_ok=True)

    def write_json(self, relative: str, value: Any) -> Path:
        """Writes one JSON file (two-space indent, keys in the given order) atomically."""
        return self.write_bytes(relative, _json(value, self.path / relative, indent=2) + b"\n")

    def read_json(self, relative: str) -> Any:
        """Reads one JSON file; one of `manifests.FILES` is as its schema says.

        Raises:
            WorkspaceError: the file is missing, is not JSON, or not as its schema says.
        """
        path = self.inside(relative)
        again = "Delete the file and run its stage again."
        try:
            with _named_errors(path, "read"), open_plain(path) as file:
                value = manifests.parse_json(file.read(MAX_JSON_BYTES))
        except FileNotFoundError as error:
            raise WorkspaceError(f"{_shown(path)}: no such file. Run the stage that writes it first.") from error
        except ValueError as error:
            raise WorkspaceError(f"{_shown(path)}: expected JSON, but {quoted(str(error))[1:-1]}. {again}") from error
        if path.name in manifests.FILES:
            manifests.check(manifests.FILES[path.name], value, _shown(path), again)
        return value

    def write_image(self, relative: str, image: Image) -> Path:
        """Writes one PNG atomically."""
        return self.write_bytes(relative, picture_png(image))

    def read_image(self, relative: str, mode: str = "RGB") -> Image:
        """Reads one image, fully decoded.

        Raises:
            WorkspaceError: the file is missing, truncated, no image or too large for one; the message names it.
        """
        from PIL import Image

        path = self.inside(relative)
        try:
            with open_plain(path) as file, warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=IMAGE_FORMATS) as image:
                    return image.convert(mode)
        except FileNotFoundError as error:
            raise WorkspaceError(
                f"{_shown(path)}: no such image, but {_shown(self.manifest)} names it. Restore it, or delete its row."
            ) from error
        except WorkspaceError:
            raise
        except Exception as error:  # a decoder that is fed foreign bytes may raise anything
            raise WorkspaceError(
                f"{_shown(path)}: expected an image, but it cannot be read{_reason(error)}. "
                f"Delete it and its row in {_shown(self.manifest)}, and run the stage again."
            ) from error

    def read_mask(self, relative: str, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Reads one mask: (H, W) bool.

        Args:
            relative: where it is.
            size: width and height of the image that it belongs to, pixels.

        Raises:
            WorkspaceError: as for `read_image`, or it is not as large as its image.
        """
        import numpy as np

        mask = self.read_image(relative, "L")
        if mask.size != size:
            raise WorkspaceError(
                f"{_shown(self.path / relative)}: expected a mask of {size[0]}x{size[1]} px, as large as its image, "
                f"but got {mask.width}x{mask.height}. Delete the mask and its row in {_shown(self.manifest)}, and run "
                "the stage again."
            )
        marked: NDArray[np.bool_] = np.asarray(mask) > 127
        return marked

    def settings(self, value: Mapping[str, Any]) -> None:
        """Keeps the settings of this folder's run, and refuses to mix two runs in one folder.

        Raises:
            WorkspaceError: the folder was begun with other settings; the message says which differ.
        """
        value = json.loads(json.dumps(value))
        if not self.has("settings.json"):
            self.write_json("settings.json", value)
            return
        before = self.read_json("settings.json")
        different = sorted(key for key in {*before, *value} if before.get(key) != value.get(key))
        if different:
            shown = [f"{key} was {quoted(before.get(key))}, now {quoted(value.get(key))}" for key in different[:3]]
            more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
            raise WorkspaceError(
                f"{_shown(self.path)}: begun with other settings: {'; '.join(shown)}{more}. "
                "Use the same ones, another --workspace, or delete the folder."
            )

    def claim(self, *marks: str) -> None:
        """Makes sure that this folder is dagkit's to write into: empty, or known by its manifest or a dead run's lock.

        Args:
            marks: glob patterns of what else it is known by: what its stage writes first.

        Raises:
            WorkspaceError: it holds something, and dagkit did not make it; nothing was written.
        """
        with _named_errors(self.path, "read"):
            names = sorted(one.name for one in self.path.iterdir()) if self.path.exists() else []
            if names and not any(any(self.path.glob(mark)) for mark in (".lock", "manifest.jsonl", *marks)):
                raise WorkspaceError(
                    f"{_shown(self.path)}: dagkit did not make this folder, and it holds {listed(names)}. "
                    "Nothing was written. Use another --workspace, or move that away."
                )

    def inside(self, relative: str) -> Path:
        """The path of a file in this folder: the one way from a name that was read somewhere to a file.

        Raises:
            WorkspaceError: ``relative`` is no plain relative path, or leads out of the folder, through a link or not.
        """
        try:
            path = self.path / manifests.checked_relative(relative)
            if path.resolve().is_relative_to(self.path.resolve()):
                return path
        except (ValueError, RuntimeError, OSError):  # RuntimeError: links in a circle
            pass
        raise WorkspaceError(f"{_shown(self.path)}: expected a path inside this folder, but got {quoted(relative)}.")


@contextmanager
def open_plain(path: Path, mode: Literal["rb", "a+b"] = "rb") -> Iterator[BinaryIO]:
    """Opens a file that is one: nothing here waits for the other end of a pipe, or reads a device.

    Args:
        path: of the file.
        mode: ``rb``, or ``a+b``, which makes it where there is none.

    Raises:
        FileNotFoundError: there is none, and it was to be read.
        WorkspaceError: it is a folder, a pipe or the like, or may not be opened.
    """
    flags = os.O_RDONLY if mode == "rb" else os.O_RDWR | os.O_APPEND | os.O_CREAT
    with _named_errors(path, "read" if mode == "rb" else "written"):
        file = os.fdopen(_open(path, flags), mode)
    with file:
        yield file


def _open(path: Path, flags: int, *, follows_links: bool = True) -> int:
    """Opens a plain file and returns its descriptor."""
    descriptor = system.open_at_once(path, flags, follows_links=follows_links)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WorkspaceError(
            f"{_shown(path)}: expected a plain file, but it is a folder, a pipe or the like. Move it away."
        )
    return descriptor


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or, after a crash or on a full disk, not at all.

    Raises:
        WorkspaceError: the disk is full, read-only, or the folder cannot be made.
    """
    with _named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_part_prefix(path), suffix=".part", dir=path.parent)
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
def lock(folder: Path, *, writes_below: Path | None = None, patience_s: float = 0.0) -> Iterator[None]:
    """Holds a folder for one writer; the lock ends with the process, however that ends.

    What a killed holder of this very lock left half-written is deleted, and nothing else: its files bear the lock's
    mark. Where nothing was written, nothing is left behind, the lock's own file included.

    Args:
        folder: whose lock; made if it is not there.
        writes_below: where its holder writes, if that is not ``folder``.
        patience_s: how long to wait for another holder.

    Raises:
        WorkspaceError: another process is writing there.
    """
    mark = f".dagkit-{hashlib.sha256(os.fsencode(_real(folder))).hexdigest()[:12]}-"
    below = _real(writes_below or folder)
    with _named_errors(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _locked_file(folder, patience_s):
            for parent, _, names in os.walk(below):
                for name in names:
                    if name.startswith(mark) and name.endswith(".part"):
                        with contextlib.suppress(OSError):
                            Path(parent, name).unlink()
            token = _held.set((*_held.get(), (below, mark)))
            try:
                yield
            finally:
                _held.reset(token)
    finally:
        with contextlib.suppress(OSError):  # the first one with something in it stays, and so do those above it
            for path in made:
                path.rmdir()


@contextmanager
def _locked_file(folder: Path, patience_s: float) -> Iterator[None]:
    """Locks ``.lock`` in a folder. Its holder deletes it in the end, so what is locked may be gone already."""
    path, deadline = folder / ".lock", time.monotonic() + patience_s
    while True:
        with _named_errors(folder):
            descriptor = _open_lock(path)
        is_ours = False
        try:
            with _named_errors(folder):
                is_free = system.is_locked_now(descriptor)
            if not is_free:
                if time.monotonic() >= deadline:
                    raise WorkspaceError(
                        f"{_shown(folder)}: another dagkit process is writing here. Wait for it, or use another "
                        "--workspace."
                    )
                time.sleep(0.1)
            elif _is_at(descriptor, path):
                try:
                    yield
                finally:
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    is_ours = os.read(descriptor, len(_LOCK) + 1) == _LOCK  # else it is another program's
                return
        finally:
            if is_ours:
                system.close_and_delete(descriptor, path)
            else:
                os.close(descriptor)


def checked_root(path: Path) -> Path:
    """A path at which a workspace is, or can be made as far as its name tells.

    Raises:
        WorkspaceError: it is too long, leads through a file or nowhere, or may not be looked into.
    """
    with _named_errors(path, "read"):
        try:
            path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                raise WorkspaceError(
                    f"{_shown(path)}: the symbolic link leads nowhere. Mend it, or use another --workspace."
                ) from None
        else:
            next(path.iterdir(), None)
    return path


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


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _open_lock(path: Path) -> int:
    """Opens a lock's file, made if it is not there, and returns its descriptor."""
    for pause_s in (*[0.001] * 100, None):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, follows_links=False)
            except FileExistsError:
                return _open(path, os.O_RDWR, follows_links=False)
            with contextlib.suppress(OSError):  # on a full disk the file stays behind, and locks as well
                os.write(descriptor, _LOCK)
            return descriptor
        except (FileNotFoundError, FileExistsError):  # another holder may just have deleted file and folder
            if pause_s is None:
                raise
            time.sleep(pause_s)
    raise AssertionError


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _part_prefix(path: Path) -> str:
    """How a file that is being written is called: with the mark of the innermost lock under which that happens."""
    parent = _real(path.parent)
    return next((mark for below, mark in reversed(_held.get()) if parent.is_relative_to(below)), ".dagkit-")


def _real(path: Path) -> Path:
    """A path without links; unlike ``Path.resolve`` it bears with links in a circle, which are named when opened."""
    return Path(os.path.realpath(path))


def _json(value: Any, path: Path, **layout: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **layout).encode()
    except ValueError as error:  # NaN, or half of a surrogate pair
        raise WorkspaceError(
            f"{_shown(path)}: expected finite numbers and whole characters to write, but {quoted(str(error))}. "
            "Leave out what does not have them."
        ) from error


def _reason(error: Exception) -> str:
    """The message of a foreign error in brackets, on one line and not too long; nothing where it has none."""
    text = quoted(" ".join(str(error).split()))[1:-1]
    return f" ({text})" if text else ""


def _shown(path: Path) -> str:
    """A path for a message, on one line; the middle of a very long one is left out."""
    text = str(path) if str(path).isprintable() else repr(str(path))[1:-1]
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


_ADVICE: Final = {
    errno.ENOSPC: "Free some space and run the same command again: finished work is kept.",
    errno.EDQUOT: "Free some of your quota and run the same command again: finished work is kept.",
    errno.EROFS: "The disk is read-only; use another --workspace.",
    errno.EACCES: "You have no right to do that there; use another --workspace.",
    errno.EPERM: "You have no right to do that there; use another --workspace.",
    errno.ENOTDIR: "A file stands where a folder is needed; use another --workspace.",
    errno.EEXIST: "A file stands where a folder is needed; use another --workspace.",
    errno.EISDIR: "A folder stands where a file is needed; move it away.",
    errno.ELOOP: "A symbolic link stands where there must be none; move it away.",
    errno.ENAMETOOLONG: "The path is longer than the file system takes; use another --workspace, with a shorter name.",
}


@contextmanager
def _named_errors(path: Path, verb: Literal["read", "written"] = "written") -> Iterator[None]:
    """Turns an operating-system error into one that says what to do; that there is nothing to read is none."""
    try:
        yield
    except OSError as error:
        if verb == "read" and isinstance(error, FileNotFoundError):
            raise
        advice = _ADVICE.get(error.errno or 0, "Mend that, or use another --workspace.")
        reason = " ".join((error.strerror or str(error)).lower().split())
        raise WorkspaceError(f"{_shown(path)}: cannot be {verb}: {reason}. {advice}") from error
