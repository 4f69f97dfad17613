"""Folders put whole in the place of older ones, and only where dagkit put everything that they replace."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from dagkit.dataset.summary import SUMMARY, read_summary_file
from dagkit.dataset.tables import read_json
from dagkit.errors import DatasetError
from dagkit.folders import atomic_folder, folder_beside
from dagkit.system import held_folder
from dagkit.workspace import listed, sha256_file

MARKER: Final = "made_by_dagkit.json"
"""Says what dagkit put into a folder: ``made_by``, and ``files`` with the SHA-256 of each."""

_LITTER: Final = (".DS_Store", "Thumbs.db", "cache-*.arrow")
"""Left by file managers, and by `datasets` beside what it reads."""


@dataclass(frozen=True)
class Writer:
    """What writes datasets to disk.

    Attributes:
        command: its name.
        layout: of the paths that it writes, by which a folder of a dagkit without `MARKER` is known.
    """

    command: str
    layout: re.Pattern[str]


_ABOUT: Final = r"README\.md|dataset\.json"
EXPORT: Final = Writer(
    "dagkit export",
    re.compile(_ABOUT + r"|dataset_dict\.json|(train|validation|test)/(data-[\d-]+of-\d+\.arrow|\w+\.json)"),
)
PUSH: Final = Writer("dagkit dataset push", re.compile(_ABOUT + r"|data/(train|validation|test)-[\d-]+of-\d+\.parquet"))


@contextmanager
def replacement(path: Path, writer: Writer) -> Iterator[Path]:
    """An empty folder that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Args:
        path: a folder that is not there, is empty, or holds nothing but what the same writer put there before.
        writer: what writes.

    Raises:
        DatasetError: something there is not the writer's to replace, or the folder cannot be written.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_ours(path, writer)
        old = old_place(path)
        _require_ours(old, writer)
        for stale in [one for one in path.parent.iterdir() if _is_dead(one, path)]:
            shutil.rmtree(stale, ignore_errors=True)
        with ExitStack() as held, atomic_folder(path, displaced=old) as folder:
            held.enter_context(_marked(folder, writer))
            yield folder
            _sign(folder, writer)
            _require_ours(path, writer)  # again: writing may have taken an hour
            _discard(old, path, writer)
        _discard(old, path, writer)
    except OSError as error:
        raise DatasetError(
            f"{path}: the dataset cannot be written: {error.strerror or error}. The older one, if any, is still there. "
            "Free some space or choose another place, and run the same command again."
        ) from error


def old_place(path: Path) -> Path:
    """Where the dataset of a folder is while another takes its place."""
    return path.with_name(f".{path.name}.old")


def foreign_names(folder: Path, writer: Writer) -> list[str]:
    """What a folder holds that a writer did not put there, or that was changed since, sorted.

    Raises:
        DatasetError: another command of dagkit made it.
        OSError: it cannot be read.
    """
    own = _own_files(folder, writer)
    if not own:
        return sorted(one.name for one in folder.iterdir())
    shared = {name.partition("/")[0] for name in own}
    found = set()
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for path in (Path(root) / name for name in [*files, *links]):
            name = path.relative_to(folder).as_posix()
            is_litter = any(fnmatch(path.name, litter) for litter in _LITTER)
            if not is_litter and not (name in own and _is_unchanged(path, own[name])):
                top = name.partition("/")[0]
                found.add(name if top in shared else top)
    return sorted(found)


def _own_files(folder: Path, writer: Writer) -> dict[str, str | None]:
    """Relative path -> SHA-256, None where it is not known, of what a writer put into a folder."""
    try:
        about = read_json(folder / MARKER)
        made_by, files = about["made_by"], dict(about["files"])
    except FileNotFoundError:
        with suppress(DatasetError):
            read_summary_file(folder / SUMMARY, str(folder))
            names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            return {name: None for name in names if writer.layout.fullmatch(name)}
        return {}
    except (ValueError, KeyError, TypeError):
        return {}
    if made_by != writer.command:
        raise DatasetError(
            f"{folder}: `{made_by:.80}` made this dataset, and `{writer.command}` would put another in its place. "
            "Choose another place, or delete it first."
        )
    return {**files, MARKER: None}


def _is_unchanged(path: Path, digest: str | None) -> bool:
    return path.is_file() and not path.is_symlink() and digest in (None, sha256_file(path))


def _require_ours(path: Path, writer: Writer) -> None:
    if path.is_dir():
        names = foreign_names(path, writer)
        problem = (
            f"it holds {listed(names)}, which `{writer.command}` did not put there, or not as it is now"
            if names
            else ""
        )
    else:
        problem = "it is no folder" if path.exists() else ""
    if problem:
        raise DatasetError(f"{path}: not replaced: {problem}. Choose another place, or move that away first.")


def _sign(folder: Path, writer: Writer) -> None:
    """Names all files of a folder in its marker."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            files[path.relative_to(folder).as_posix()] = sha256_file(path)
    _mark(folder, writer, files)


def _mark(folder: Path, writer: Writer, files: Mapping[str, str]) -> None:
    text = json.dumps({"made_by": writer.command, "files": files}, indent=2, ensure_ascii=False)
    (folder / MARKER).write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def _marked(folder: Path, writer: Writer) -> Iterator[None]:
    """Marks a folder that is being written and holds it, so that a later run knows what a dead one left."""
    with held_folder(folder):
        _mark(folder, writer, {})
        yield


def _is_dead(folder: Path, path: Path) -> bool:
    """Whether a folder is what a killed run left beside ``path``."""
    is_named = folder.name.startswith(f".{path.name}.") and folder.name.endswith(".partial")
    if not is_named or folder.is_symlink() or not folder.is_dir():
        return False
    with held_folder(folder) as is_free:
        return is_free and ((folder / MARKER).is_file() or not any(folder.iterdir()))


def _discard(old: Path, path: Path, writer: Writer) -> None:
    """Deletes a folder in two steps, so that a killed run leaves nothing half deleted that looks like somebody's."""
    if old.exists():
        with folder_beside(path) as folder, _marked(folder, writer):
            old.rename(folder / "old")
