"""Published tokens on this disk: fetched once, by content, and verified whenever they are used.

    <cache>/tokens/<content>/        the files of one version, named by their hash
    <cache>/pins/<location>/<version>.json   which content a version had when it was first seen

A version is trusted as it was first seen: if a location later offers other content for it, that is refused.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dagkit.errors import PublishError, TokenError, WorkspaceError
from dagkit.folders import atomic_folder
from dagkit.registry.index import EXAMPLES, INDEX_FILE, MAX_EXAMPLES, Entry, digest
from dagkit.registry.locations import Location, open_location
from dagkit.registry.reference import Reference, choose, refuse_missing
from dagkit.resources import expanded, user_cache_folder
from dagkit.token.record import Name
from dagkit.workspace import atomic_write, open_plain, sha256_bytes

_MAX_PIN_BYTES = (MAX_EXAMPLES + 16) * 512


class Pin(BaseModel):
    """A version of a location as it was first seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    concept: Name
    entry: Entry


def cache_folder() -> Path:
    """Where fetched tokens are kept: ``DAGKIT_CACHE``, or ``dagkit`` in the user's cache."""
    given = os.environ.get("DAGKIT_CACHE")
    return expanded(given, "DAGKIT_CACHE") if given else user_cache_folder()


def fetch(reference: Reference) -> tuple[Path, Pin]:
    """The folder of a published version, all its files verified.

    A folder's files are used where they are. Others come from the cache where it has them; a reference that names one
    version (``@1.2.0``) then needs no network.

    Raises:
        TokenError: no version fits, a file is damaged, or a version is no longer what it was.
        PublishError: the location cannot be read, or its index is damaged.
    """
    url = reference.url or ""
    if reference.is_exact and not url.startswith("file://"):
        pin = _read_pin(url, reference.wanted)
        if pin is not None and _is_whole(folder := _folder(pin.entry), pin.entry):
            return folder, pin
    location = open_location(url)
    index = location.read_index()
    if index is None:
        raise PublishError(f"{url}: no token is published there, or you may not see it: it has no {INDEX_FILE}.")
    version = choose(reference.wanted, [entry.version for entry in index.versions])
    entry = None if version is None else index.entry(version)
    if entry is None:
        refuse_missing(reference, [entry.version for entry in index.versions], url)
    pin = Pin(url=url, concept=index.concept, entry=entry)
    in_place = location.local_folder(entry)
    if in_place is not None:
        for name in entry.files:
            read_verified(location, entry, name)
        return in_place, pin
    seen = _read_pin(url, entry.version)
    if seen is not None and seen.entry.content != entry.content:
        raise TokenError(
            f"{url}@{entry.version} has other content than when it was first fetched, but a published version never "
            f"changes. Ask its publisher. If you trust the new one, delete {_pin_path(url, entry.version)}."
        )
    folder = _folder(entry)
    if not _is_whole(folder, entry):
        _download(location, entry, folder)
    atomic_write(_pin_path(url, entry.version), (pin.model_dump_json() + "\n").encode())
    return folder, pin


def read_verified(location: Location, entry: Entry, name: str) -> bytes:
    """One file of a published version, checked against the index.

    Raises:
        TokenError: it is not what the index says.
        PublishError: it cannot be read.
    """
    data = location.read(entry, name)
    if len(data) != entry.files[name].size or sha256_bytes(data) != entry.files[name].sha256:
        raise TokenError(
            f"{location.url}@{entry.version}: {name} was changed after it was published (other SHA-256 than in the "
            "index). Do not use it; ask its publisher."
        )
    return data


def _needed(entry: Entry) -> list[str]:
    return [name for name in entry.files if not name.startswith(EXAMPLES)]


def _folder(entry: Entry) -> Path:
    return cache_folder() / "tokens" / entry.content.removeprefix("sha256:")


def _is_whole(folder: Path, entry: Entry) -> bool:
    for name in _needed(entry):
        try:
            with open_plain(folder / name) as file:
                data = file.read(entry.files[name].size + 1)
        except (OSError, WorkspaceError):
            return False
        if sha256_bytes(data) != entry.files[name].sha256:
            return False
    return True


def _download(location: Location, entry: Entry, folder: Path) -> None:
    damaged = folder.with_name(f".{folder.name}.damaged")
    try:
        with atomic_folder(folder, displaced=damaged) as building:
            for name in _needed(entry):
                (building / name).write_bytes(read_verified(location, entry, name))
    except OSError as error:
        if not _is_whole(folder, entry):  # else another process was faster
            raise PublishError(
                f"{folder} cannot be written: {error.strerror}. Delete it, or set DAGKIT_CACHE to another folder."
            ) from error
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _pin_path(url: str, version: str) -> Path:
    return cache_folder() / "pins" / digest(url) / f"{version}.json"


def _read_pin(url: str, version: str) -> Pin | None:
    try:
        with open_plain(_pin_path(url, version)) as file:
            pin = Pin.model_validate_json(file.read(_MAX_PIN_BYTES))
    except (OSError, WorkspaceError, ValidationError):
        return None
    return pin if (pin.url, pin.entry.version) == (url, version) else None
