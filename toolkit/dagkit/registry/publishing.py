"""What leaves this machine when a token is published, and the act itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from dagkit.errors import PublishError, TokenError, quoted
from dagkit.png import picture_png
from dagkit.provenance import local_paths
from dagkit.registry.cache import read_verified
from dagkit.registry.index import (
    EXAMPLES,
    FIGURES_FILE,
    INDEX_FILE,
    MAX_EXAMPLES,
    MAX_FILE_BYTES,
    PAGE_FILE,
    SIGNATURE_FILE,
    Entry,
    Index,
    describe,
)
from dagkit.registry.locations import Location
from dagkit.registry.locations.keyed import has
from dagkit.registry.signing import MAX_SIGNATURE_BYTES
from dagkit.token import RECORD_FILE, GuidelineToken, artifact_files, now, read_file
from dagkit.workspace import IMAGE_FORMATS, open_plain


@dataclass(frozen=True)
class Parcel:
    """All that would leave: nothing else does.

    Attributes:
        token: that is published.
        files: bytes by name: the artifact, its signature if it has one, figures if given, examples if named.
        figures: headline figures for the index page.
    """

    token: GuidelineToken
    files: Mapping[str, bytes]
    figures: Mapping[str, float]

    def entry(self) -> Entry:
        """Describes the parcel in an index."""
        model = self.token.record.base_model
        return Entry(
            version=self.token.version,
            published=now(),
            base_model=model.id,
            architecture=model.architecture,
            figures=dict(self.figures),
            files=describe(self.files),
        )


def pack(
    folder: Path,
    *,
    evaluation: bytes | None = None,
    figures: Mapping[str, float] | None = None,
    examples: Sequence[Path] = (),
) -> Parcel:
    """Collects what is published of a token. Files of its folder that do not belong to the artifact stay.

    Args:
        folder: of the token.
        evaluation: ``figures.json`` of its evaluation.
        figures: headline figures for the index page.
        examples: images to add, each named by the user; written anew as PNG, so that no metadata goes with them.

    Raises:
        TokenError: the token is damaged.
        PublishError: its record holds a local path, an example is no image, there are too many, or a file is too large.
    """
    token = GuidelineToken.load(folder)
    if private := local_paths(token.record.model_dump(mode="json")):
        raise PublishError(
            f"{token.name} was not published: its {RECORD_FILE} names a place on somebody's machine "
            f"({quoted(private[0])}), and its checksums forbid to change that. Make it anew: delete its folder, then "
            "run dagkit optimize and dagkit evaluate, which keep only the name."
        )
    files = artifact_files(folder)
    if (folder / SIGNATURE_FILE).is_file():
        files[SIGNATURE_FILE] = read_file(folder / SIGNATURE_FILE, MAX_SIGNATURE_BYTES)
    if evaluation is not None:
        files[FIGURES_FILE] = evaluation
    if len(examples) > MAX_EXAMPLES:
        raise PublishError(f"expected at most {MAX_EXAMPLES} examples, but got {len(examples)}. Choose the best.")
    for number, path in enumerate(examples, 1):
        files[f"{EXAMPLES}{number:02d}.png"] = _image(path)
    for name, data in files.items():
        if not 0 < len(data) <= MAX_FILE_BYTES:
            raise PublishError(f"{name} has {len(data):,} bytes, but at most {MAX_FILE_BYTES:,} are published.")
    return Parcel(token, files, figures or {})


def published(parcel: Parcel, index: Index | None) -> Entry | None:
    """The entry of exactly this version with exactly this content; None where a location does not have it."""
    return index.entry(parcel.token.version) if index and has(index, parcel.token.concept, parcel.entry()) else None


def replaced(version: str, index: Index | None) -> Entry | None:
    """The published version that ``version`` replaces: the newest before it, or None."""
    older = [entry for entry in index.versions if Version(entry.version) < Version(version)] if index else []
    return older[-1] if older else None


def published_figures(location: Location, entry: Entry) -> bytes | None:
    """``figures.json`` of a published version, verified, or None where it was published without.

    Raises:
        TokenError: it was changed after it was published.
        PublishError: it cannot be read.
    """
    return read_verified(location, entry, FIGURES_FILE) if FIGURES_FILE in entry.files else None


def publish(parcel: Parcel, location: Location) -> Entry:
    """Publishes a parcel: files first, the index last. Interrupted anywhere, it is there whole or not at all.

    Where the same content is published already, what is missing or damaged of it is written again.

    Raises:
        PublishError: the version is published already with other content, the location belongs to another concept, or
            it cannot be written.
    """
    index = location.publish(parcel.token.concept, parcel.entry(), parcel.files)
    entry = index.entry(parcel.token.version)
    if entry is None:
        raise PublishError(
            f"{location.url} does not list {parcel.token.name} after it was published. Publish it again."
        )
    return entry


def written_files(parcel: Parcel) -> dict[str, int | None]:
    """Every file that publishing writes, with its size in bytes; None for the index, which depends on the location."""
    return {**{name: len(data) for name, data in parcel.files.items()}, INDEX_FILE: None, PAGE_FILE: None}


def check(location: Location) -> tuple[Index, dict[str, str]]:
    """Verifies all files of all versions of a location.

    Returns:
        The index, and what is wrong by version; empty where all is well.

    Raises:
        PublishError: the location or its index cannot be read, or nothing is published there.
    """
    index = location.read_index()
    if index is None:
        raise PublishError(f"{location.url}: no token is published there, or you may not see it.")
    problems = {}
    for entry in index.versions:
        try:
            for name in entry.files:
                read_verified(location, entry, name)
        except (TokenError, PublishError) as error:
            problems[entry.version] = str(error)
    return index, problems


def _image(path: Path) -> bytes:
    from PIL import Image

    try:
        with open_plain(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            plain = image.convert("RGB")
    except Exception as error:  # a decoder that is fed foreign bytes may raise anything
        raise PublishError(
            f"{path}: expected an image, but it cannot be read ({quoted(str(error))[1:-1]}). Name another example."
        ) from error
    plain.info = {}
    return picture_png(plain, optimize=True)
