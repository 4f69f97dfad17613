"""Folders that are there whole or not at all: built beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """An empty folder ``.<name>.<something>.partial`` beside ``target``, deleted in the end if it is still there.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path, *, displaced: Path | None = None) -> Iterator[Path]:
    """An empty folder that takes the place of ``target`` when the block ends well, and vanishes when it does not.

    Args:
        target: its place; what is inside lies safely on disk before it is there.
        displaced: where an older folder at ``target`` goes in that moment; None: there must be none with anything in
            it.

    Raises:
        OSError: it cannot be written; the older one, if any, is back in its place.
    """
    with folder_beside(target) as folder:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        folder.chmod(0o755)
        if displaced is not None and target.exists():
            target.rename(displaced)
        try:
            folder.rename(target)
        except OSError:
            if displaced is not None and displaced.exists():
                displaced.rename(target)
            raise
        with suppress(PermissionError):  # Windows opens no folder
            _flush_names(target.parent)


def _flush_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
