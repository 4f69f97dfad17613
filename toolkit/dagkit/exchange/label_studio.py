"""Label Studio's JSON export: brushes and other regions of one or several annotators (https://labelstud.io/guide/export)."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from dagkit.errors import DatasetError, quoted
from dagkit.exchange.entries import Entry, LabelNames, Marked, Source, SourceFolder, printable
from dagkit.exchange.pictures import read_picture
from dagkit.labelstudio.answers import decide, read_answers
from dagkit.labelstudio.config import IMAGE_OBJECT
from dagkit.labelstudio.replies import ExportedTask
from dagkit.manifests import explain

FORMAT: Final = "label-studio"
_UPLOAD: Final = re.compile(r"^[0-9a-f]{8}-")
"""What the server puts before the name of a file that was uploaded."""


def is_label_studio(value: object) -> bool:
    """Whether a JSON value looks like an export of tasks."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "data" in value[0]


def read_label_studio(folder: SourceFolder, files: Sequence[str], names: LabelNames, pictures: SourceFolder) -> Source:
    """The tasks of one or several exports.

    Args:
        folder: where the exports are.
        files: their names in it.
        names: what the labels mean.
        pictures: below which the pictures are: as the task says, or by their names alone, there or in ``images/``.

    Raises:
        DatasetError: an export is none.
    """
    exports = []
    for name in files:
        tasks = folder.read_json(name)
        if not isinstance(tasks, list):
            raise DatasetError(f"{printable(name)}: expected a list of tasks, Label Studio's JSON export")
        exports.append((name, tasks))
    return Source(FORMAT, printable(", ".join(files), 200), _entries(exports, names, pictures))


def _entries(exports: Sequence[tuple[str, list[Any]]], names: LabelNames, pictures: SourceFolder) -> Iterator[Entry]:
    for file, tasks in exports:
        for index, task in enumerate(tasks):
            number = task.get("id") if isinstance(task, dict) else None
            shown = f"tasks.{index}" if number is None else f"task {quoted(number, 40)}"
            yield Entry(f"{printable(file)}, {shown}", partial(_marked, task, names, pictures))


def _marked(task: Any, names: LabelNames, pictures: SourceFolder) -> Marked:
    try:
        checked = ExportedTask.model_validate(task)
    except ValidationError as error:
        raise DatasetError(explain(error)) from error
    place = checked.data.get(IMAGE_OBJECT) or next(
        (one for one in checked.data.values() if isinstance(one, str) and _looks_like_picture(one)), None
    )
    picture = read_picture(pictures.read(_file(place, pictures)))
    annotations = [_renamed(one, names) for one in checked.annotations]
    plain = {"id": checked.id, "data": checked.data, "annotations": annotations}
    answers = read_answers(plain, names.labels, picture.size, lambda user: f"annotator-{user}")
    if not answers:
        raise DatasetError("nobody annotated it")
    verdict = decide(answers, names.labels, picture.size)
    if verdict.state in ("skipped", "cannot_tell"):
        what = "its annotators skipped it" if verdict.state == "skipped" else "its annotators cannot tell"
        raise DatasetError(what)
    notes = [f"its {len(answers)} annotators disagree ({', '.join(verdict.reasons)}): the majority of pixels was taken"]
    return Marked(picture, verdict.masks, tuple(notes) if verdict.reasons else ())


def _looks_like_picture(place: str) -> bool:
    return bool(re.search(r"\.(png|jpe?g|webp|bmp|gif|tiff?)(\W|$)", place.lower()))


def _file(place: Any, pictures: SourceFolder) -> str:
    """The name of a task's picture below the folder of pictures."""
    if not isinstance(place, str):
        raise DatasetError(f"it does not say where its picture is (data.{IMAGE_OBJECT})")
    if place.startswith("/data/local-files/"):
        places = parse_qs(urlsplit(place).query).get("d", [""])
        plain = pictures.inside(places[0])
    elif place.startswith("/data/"):
        plain = pictures.inside(posixpath.basename(urlsplit(place).path))
    else:
        plain = pictures.inside(place)
    name = posixpath.basename(plain)
    own = _UPLOAD.sub("", name)
    for one in (plain, name, f"images/{name}", own, f"images/{own}"):
        if pictures.has(one):
            return one
    return plain


def _renamed(annotation: dict[str, Any], names: LabelNames) -> dict[str, Any]:
    """An annotation with the concept's labels for theirs, and without regions that mean nothing here.

    A region and its label may be two results of one id; both go.
    """
    result = annotation.get("result")
    if not isinstance(result, list):
        return annotation
    renamed = [_in_our_words(region, names) for region in result]
    ids = [one.get("id") if isinstance(one, dict) and isinstance(one.get("id"), str) else None for one in result]
    gone = {one for one, ours in zip(ids, renamed, strict=True) if ours is None} - {None}
    kept = [ours for one, ours in zip(ids, renamed, strict=True) if ours is not None and one not in gone]
    return {**annotation, "result": kept}


def _in_our_words(region: Any, names: LabelNames) -> Any:
    """A result with the concept's labels; None where its labels mean nothing here."""
    value = region.get("value") if isinstance(region, dict) else None
    if not isinstance(value, dict):
        return region
    labels = {key: theirs for key, theirs in value.items() if key.endswith("labels") and isinstance(theirs, list)}
    ours = {key: [label for one in theirs if (label := names.ours(one))] for key, theirs in labels.items()}
    if any(labels[key] and not ours[key] for key in labels):
        return None
    return {**region, "value": {**value, **ours}}
