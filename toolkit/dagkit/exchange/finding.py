"""Which format a source is in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dagkit.dataset import hub
from dagkit.errors import DatasetError, brief, quoted
from dagkit.exchange import coco, folders, label_studio, labelme, tables
from dagkit.exchange.entries import LabelNames, Source, SourceFolder
from dagkit.provenance import is_repository, public_name
from dagkit.resources import exists

FORMATS: Final = (folders.FORMAT, coco.FORMAT, label_studio.FORMAT, labelme.FORMAT, tables.FORMAT)

_JSON: Final[dict[str, Callable[[object], bool]]] = {
    coco.FORMAT: coco.is_coco,
    label_studio.FORMAT: label_studio.is_label_studio,
    labelme.FORMAT: labelme.is_labelme,
}
"""Formats whose files are JSON, and how one is known."""


def find_source(
    place: str,
    names: LabelNames,
    *,
    format: str | None = None,
    images: Path | None = None,
    image_column: str = "image",
    mask_column: str = "mask",
) -> Source:
    """A source of pictures with masks.

    Args:
        place: a folder, a JSON file, or ``hf://owner/name``.
        names: what its labels mean.
        format: one of `FORMATS`; found out where None.
        images: where the pictures are that JSON files name; where the files are if None.
        image_column: of a Hugging Face dataset.
        mask_column: of a Hugging Face dataset.

    Raises:
        DatasetError: there is no such source, or it is in none of the formats.
    """
    columns = (image_column, mask_column)
    if hub.is_url(place):
        return tables.read_table(hub.download(place), place, names, *columns, is_cached=True)
    path = Path(place)
    if not exists(path):
        near = f" Did you mean hf://{place}, on the Hub?" if is_repository(place) else ""
        raise DatasetError(f"{brief(place)}: no such folder or file.{near}")
    if not path.is_dir():
        folder, files = SourceFolder(path.parent), [path.name]
    else:
        if format == tables.FORMAT or (format is None and tables.is_table(path)):
            return tables.read_table(path, public_name(str(path.resolve())), names, *columns)
        folder = SourceFolder(path)
        files = [] if format == folders.FORMAT else folder.files((".json",))
    if format not in _JSON and format is not None and files:
        raise DatasetError(f"{brief(place)}: expected a folder for the format {format}, but got a file.")
    found = {name: _format_of(folder.read_json(name)) for name in files} if format is None else {}
    kinds = {kind for kind in found.values() if kind}
    if len(kinds) > 1:
        raise DatasetError(
            f"{brief(place)}: it holds files of several formats ({', '.join(sorted(kinds))}). Say which with --format."
        )
    if format is None and path.is_file() and not kinds:
        raise DatasetError(
            f"{brief(place)}: expected a JSON file of {', '.join(_JSON)}, but it looks like none of them."
        )
    kind = format or next(iter(kinds), folders.FORMAT)
    if kind == folders.FORMAT:
        return folders.read_folder(path, names)
    files = [name for name, its in found.items() if its == kind] or files
    if not files:
        raise DatasetError(f"{brief(place)}: there is no JSON file in it, but {kind} has its masks in one.")
    if images is not None and not images.is_dir():
        raise DatasetError(f"{brief(str(images))}: expected the folder of the pictures that {quoted(files[0])} names.")
    elsewhere = SourceFolder(images) if images is not None else None
    if kind == labelme.FORMAT:
        return labelme.read_labelme(folder, files, names, elsewhere)
    read: Any = coco.read_coco if kind == coco.FORMAT else label_studio.read_label_studio
    source: Source = read(folder, files, names, elsewhere or folder)
    return source


def _format_of(value: object) -> str | None:
    return next((name for name, is_it in _JSON.items() if is_it(value)), None)
