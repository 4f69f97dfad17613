"""What all formats come to: entries with a picture and masks of the concept's labels. And how their files are read."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import DatasetError, WorkspaceError, brief, quoted
from dagkit.manifests import parse_json
from dagkit.workspace import MAX_JSON_BYTES, StageFolder, open_plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dagkit.concept import Labels
    from dagkit.exchange.pictures import Picture

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What files of pictures are called."""

EVERYTHING: Final = "*"
"""As a label to leave out: all that are not the concept's."""

_MAX_PICTURE_BYTES: Final = 512 * 2**20
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:|[A-Za-z]:[\\/]")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, eq=False)
class Marked:
    """One picture of a source and what is marked in it.

    Attributes:
        picture: upright.
        masks: label of the concept -> (H, W) bool, as large as the picture; only labels that mark a pixel.
        notes: what somebody should know who takes it.
    """

    picture: Picture
    masks: dict[str, NDArray[np.bool_]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of a source, not read yet.

    Attributes:
        name: what messages and provenance call it: names below the source's folder, no path of this machine.
        read: reads it; raises a DagkitError that says why it cannot be taken.
    """

    name: str
    read: Callable[[], Marked]


@dataclass(frozen=True, slots=True)
class Source:
    """Something that holds pictures and masks.

    Attributes:
        format: one of `dagkit.exchange.FORMATS`.
        version: what exactly the masks were read from, for the record: a file's name, or the format's.
        entries: of the source, in order.
    """

    format: str
    version: str
    entries: Iterable[Entry]


class LabelNames:
    """What a source's labels mean among the concept's.

    Args:
        labels: of the concept.
        meant: their name -> ours.
        ignored: their names that mean nothing here; `EVERYTHING` for all that are not ours.

    Raises:
        ConceptError: a name is given a meaning that is no label of the concept.
    """

    def __init__(self, labels: Labels, meant: Mapping[str, str] | None = None, ignored: Iterable[str] = ()) -> None:
        self.labels, self._meant, self._ignored = labels, dict(meant or {}), set(ignored)
        self._met: set[str] = set()
        for ours in self._meant.values():
            labels.is_positive(ours)

    def ours(self, theirs: object) -> str | None:
        """The label that a name means; None where it means nothing here.

        Raises:
            DatasetError: nobody said what it means.
        """
        if isinstance(theirs, str):
            self._met.add(theirs)
            known = {name.casefold(): name for name in (*self.labels.positive, *self.labels.negative)}
            if theirs in self._meant:
                return self._meant[theirs]
            if theirs in self._ignored:
                return None
            if theirs.strip().casefold() in known:
                return known[theirs.strip().casefold()]
            if EVERYTHING in self._ignored:
                return None
        shown, first = quoted(theirs, 60), self.labels.positive[0]
        name = theirs if isinstance(theirs, str) else "NAME"
        raise DatasetError(
            f"its label {shown} is none of the concept's "
            f"({brief(', '.join([*self.labels.positive, *self.labels.negative]))}). Say what it means: "
            f"--label {quoted(f'{name}={first}', 80)}, or --ignore {quoted(name, 60)}"
        )

    @property
    def unmet(self) -> list[str]:
        """Names that were given a meaning and never met, sorted."""
        return sorted((self._meant.keys() | self._ignored - {EVERYTHING}) - self._met)


def united(masks: Iterable[tuple[str | None, NDArray[np.bool_]]]) -> dict[str, NDArray[np.bool_]]:
    """Label -> union of its masks; labels None and those that mark no pixel are left out."""
    found: dict[str, NDArray[np.bool_]] = {}
    for label, mask in masks:
        if label is not None and mask.any():
            found[label] = found[label] | mask if label in found else mask
    return found


class SourceFolder:
    """The folder of a source. Names that lead out of it, and URLs, are refused.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = StageFolder(path)

    def inside(self, name: object, *, seen_from: str = "") -> str:
        """A file's name below this folder, plain.

        Args:
            name: as a file of the source says it.
            seen_from: the folder of that file, below this one.

        Raises:
            DatasetError: it is no text, a URL, absolute, or leads out of the folder, through a link or not.
        """
        if not isinstance(name, str) or not name.strip():
            raise DatasetError(f"expected the name of its picture, but got {quoted(name, 120)}")
        if _SCHEME.match(name):
            raise DatasetError(
                f"its picture is a URL or has a drive, {quoted(name, 120)}: nothing is fetched. Put it into the "
                "folder, and name it there"
            )
        plain = posixpath.normpath(posixpath.join(seen_from, name.replace("\\", "/")))
        try:
            self._folder.inside(plain)
        except WorkspaceError as error:
            raise DatasetError(f"its picture {quoted(name, 120)} leads out of {_shown(self.path)}: refused") from error
        return plain

    def has(self, name: str) -> bool:
        """Whether there is a plain file of this name, as from `inside`."""
        try:
            return self._folder.inside(name).is_file()
        except WorkspaceError:
            return False

    def read(self, name: str, limit: int = _MAX_PICTURE_BYTES) -> bytes:
        """What a file holds.

        Raises:
            DatasetError: there is none, or it cannot be read, or is larger than ``limit`` bytes.
        """
        try:
            with open_plain(self._folder.inside(name)) as file:
                data = file.read(limit + 1)
        except FileNotFoundError as error:
            raise DatasetError(f"there is no {quoted(name, 120)} in {_shown(self.path)}") from error
        except WorkspaceError as error:
            raise DatasetError(f"{quoted(name, 120)} cannot be read: it is no plain file in its folder") from error
        if len(data) > limit:
            raise DatasetError(f"{quoted(name, 120)}: larger than {limit:,} bytes")
        return data

    def read_json(self, name: str) -> Any:
        """What a JSON file says.

        Raises:
            DatasetError: as for `read`, or it is no JSON.
        """
        try:
            return parse_json(self.read(name, MAX_JSON_BYTES))
        except ValueError as error:
            raise DatasetError(f"{printable(name)}: expected JSON, but {brief(str(error))}") from error

    def files(self, suffixes: tuple[str, ...], below: str = "") -> list[str]:
        """Names of all files with one of some endings, sorted; hidden ones and links to folders are passed over."""
        root = self.path / below
        found = (path.relative_to(self.path) for path in root.rglob("*") if path.suffix.lower() in suffixes)
        return sorted(one.as_posix() for one in found if not any(part.startswith(".") for part in one.parts))


def printable(name: str, limit: int = 300) -> str:
    """A file's name for a record or a message: one line, without half characters, not endless."""
    whole = _SURROGATES.sub("?", name)
    return brief("".join(one if one.isprintable() else "?" for one in whole), limit)


def _shown(path: Path) -> str:
    return f"the folder {quoted(path.name or str(path), 80)}"
