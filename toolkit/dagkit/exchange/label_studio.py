"""Label Studio's JSON export: brushes and other regions of one or several annotators (https://labelstud.io/guide/export)."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
_PICTURE: Final = re.compile(r"\.(png|jpe?g|webp|bmp|gif|tiff?)(\W|$)")
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
    places = {place for _, tasks in exports for task in tasks if (place := _place(task)) is not None}
    called = Counter(_own_name(place) for place in places)
    for file, tasks in exports:
        for index, task in enumerate(tasks):
            number = task.get("id") if isinstance(task, dict) else None
            shown = f"tasks.{index}" if number is None else f"task {quoted(number, 40)}"
            yield Entry(f"{printable(file)}, {shown}", partial(_marked, task, names, pictures, called))


def _marked(task: Any, names: LabelNames, pictures: SourceFolder, called: Mapping[str, int]) -> Marked:
    try:
        checked = ExportedTask.model_validate(task)
    except ValidationError as error:
        raise DatasetError(explain(error)) from error
    picture = read_picture(pictures.read(_file(_place(task), pictures, called)))
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


def _place(task: Any) -> str | None:
    """Where a task says that its picture is: under the name that dagkit's page gives it, else what looks like one."""
    data = task.get("data") if isinstance(task, dict) else None
    if not isinstance(data, dict):
        return None
    own = data.get(IMAGE_OBJECT)
    if isinstance(own, str) and own:
        return own
    return next((one for one in data.values() if isinstance(one, str) and _PICTURE.search(one.lower())), None)


def _own_name(place: str) -> str:
    """What a picture was called before it was uploaded."""
    return _UPLOAD.sub("", posixpath.basename(urlsplit(place).path if _is_uploaded(place) else place))


def _is_uploaded(place: str) -> bool:
    return place.startswith("/data/") and not place.startswith("/data/local-files/")


def _file(place: str | None, pictures: SourceFolder, called: Mapping[str, int]) -> str:
    """The name of a task's picture below the folder of pictures."""
    if place is None:
        raise DatasetError(f"it does not say where its picture is (data.{IMAGE_OBJECT})")
    if place.startswith("/data/local-files/"):
        plain = pictures.inside(parse_qs(urlsplit(place).query).get("d", [""])[0])
    else:
        plain = pictures.inside(posixpath.basename(urlsplit(place).path) if _is_uploaded(place) else place)
    name, own = posixpath.basename(plain), _own_name(place)
    for one in (plain, f"images/{plain}"):
        if pictures.has(one):
            return one
    found = next((one for one in (name, f"images/{name}", own, f"images/{own}") if pictures.has(one)), plain)
    if found != plain and called.get(own, 0) > 1:
        raise DatasetError(
            f"{called[own]} tasks have a picture called {quoted(own, 80)}, and nobody can tell which of them is in the "
            f"folder. Put it there as {quoted(plain, 120)}"
        )
    return found


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
