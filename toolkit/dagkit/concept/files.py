"""Concept files: where they are found, how they are read, and how their mistakes are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from dagkit.concept.fields import did_you_mean
from dagkit.concept.schema import MAX_MISTAKES, Concept, Mistakes, ThresholdSettings
from dagkit.errors import ConceptError, PromptRefused, brief, quoted, reason
from dagkit.plain_yaml import Document, read_yaml
from dagkit.resources import exists, is_file, shipped_folder

MAX_FILE_BYTES: Final = 1_000_000


def concept_names() -> list[str]:
    """Names of all concepts that ``load_concept`` finds by name, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml") if is_file(path)})


def concept_path(name: str) -> Path:
    """Where the file of a concept is: a path as given, a name below ``./annotation_configs`` or among those that ship.

    Raises:
        ConceptError: there is none.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if is_file(Path(name)):
            return Path(name)
        what = "not a plain file, as a concept is" if exists(Path(name)) else "no such concept file"
        raise ConceptError(f"{brief(name)}: {what}. Write one with: dagkit concept new NAME")
    for folder in _folders():
        if is_file(folder / f"{name}.yaml"):
            return folder / f"{name}.yaml"
    near = did_you_mean(name, concept_names())
    raise ConceptError(
        f"{quoted(name)} is not a concept.{near} Available: {', '.join(concept_names())}. "
        f"Write a new one with: dagkit concept new {brief(name, 64)}"
    )


def page_path(concept: Concept) -> Path | None:
    """The user's own labelling page: ``<name>.xml`` beside the concept's file, or where named concepts lie.

    Returns:
        A path at which there is something, or None.
    """
    beside = [concept.file.parent] if concept.file is not None else []
    paths = (folder / f"{concept.name}.xml" for folder in [*beside, *_folders()])
    return next(filter(exists, paths), None)


def load_concept(name: str | Path) -> Concept:
    """Reads and checks one concept file.

    Args:
        name: a concept's name or the path of its YAML file.

    Raises:
        ConceptError: no such concept, or mistakes in its file, all of them in one message.
        PromptRefused: a prompt of the file sexualises minors.
    """
    path = concept_path(str(name))
    concept = parse_concept(read_text(path), source=brief(str(path)))
    concept._file = path
    return concept


def read_text(path: Path) -> str:
    """The text of a file that a user wrote.

    Raises:
        ConceptError: it is no plain file, cannot be read, is larger than ``MAX_FILE_BYTES`` or no UTF-8.
    """
    where = brief(str(path))
    try:
        if not is_file(path):
            raise ConceptError(f"{where}: expected a plain file. Put a text file there.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConceptError(f"{where}: expected at most {MAX_FILE_BYTES:,} bytes, but got {path.stat().st_size:,}.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConceptError(
            f"{where}: expected UTF-8 text, but {error.reason} at byte {error.start}. Save the file as UTF-8."
        ) from error
    except OSError as error:
        raise ConceptError(f"{where}: cannot be read: {error.strerror}. Check the file and its permissions.") from error


def parse_concept(text: str, *, source: str) -> Concept:
    """Checks the text of a concept file.

    Args:
        text: YAML, see `dagkit.plain_yaml`.
        source: what to call the text in messages.

    Raises:
        ConceptError: mistakes, each with its line; of many the first ones, and how many there are.
        PromptRefused: a prompt sexualises minors.
    """
    try:
        document = read_yaml(text)
    except ValueError as error:
        raise ConceptError(f"{source}: {reason(error)}") from error
    if document.mistakes:
        raise _as_error(source, document.mistakes, len(document.mistakes))
    if not isinstance(document.value, dict):
        got = "nothing" if document.value is None else type(document.value).__name__
        raise ConceptError(f"{source}: expected 'key: value' lines, but got {got}. See: dagkit concept new NAME")
    try:
        return Concept.model_validate(document.value)
    except PromptRefused as refusal:
        raise PromptRefused(f"{source}: {refusal}") from None
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = list(islice(chain.from_iterable(_explain(one, document) for one in problems), MAX_MISTAKES + 1))
        raise _as_error(source, lines, max(len(problems), len(lines))) from None


def _as_error(source: str, lines: Sequence[str], num: int) -> ConceptError:
    if num == 1:
        return ConceptError(f"{source}: {lines[0]}")
    more = [f"... and {num - MAX_MISTAKES:,} more"] if num > MAX_MISTAKES else []
    shown = [f"  {line}" for line in [*lines[:MAX_MISTAKES], *more]]
    return ConceptError("\n".join([f"{source}: {num:,} mistakes:", *shown]))


def _folders() -> Sequence[Path]:
    return [folder for folder in (Path("annotation_configs"), shipped_folder("annotation_configs")) if folder.is_dir()]


def _explain(problem: Any, document: Document) -> Iterator[str]:
    """One line a mistake: where, what was expected, what came, what to do."""
    path = tuple(part for part in problem["loc"] if part not in ("Plugin", "[key]"))
    kind, given = problem["type"], problem["input"]
    prefix = _prefix(path, document)
    if kind == "value_error":
        error = problem["ctx"]["error"]
        for inner, text in error.found if isinstance(error, Mistakes) else [((), str(error))]:
            yield f"{_prefix((*path, *inner), document)}: {text}"
    elif kind == "missing":
        yield f"{prefix}: missing. Add it; 'dagkit concept new NAME' shows what it is for."
    elif kind == "extra_forbidden":
        yield f"{prefix}: unknown key.{did_you_mean(str(path[-1]), _fields(path[:-1]))} Remove it or mend its name."
    elif kind == "string_pattern_mismatch":
        allowed = "letters and '_'" if path[:2] == ("prompts", "slots") else "letters, digits, '-' and '_'"
        yield f"{prefix}: expected lower-case {allowed}, a letter first, but got {quoted(given, 60)}."
    else:
        hint = ""
        if kind == "less_than_equal" and path[-1] in ThresholdSettings.model_fields:
            hint = f" Write {given / 100:g}." if isinstance(given, (int, float)) and given <= 100 else ""
        elif kind == "string_type" and isinstance(given, (bool, int, float, type(None))):
            hint = " Put it in quotes if it is meant as text."
        yield f"{prefix}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but got {quoted(given, 60)}.{hint}"


def _prefix(path: Sequence[Any], document: Document) -> str:
    """``line 3: prompts.unsafe.0``, as far as the file has it."""
    line = document.line(tuple(path))
    where = brief(".".join(map(str, path)), 100)
    return f"line {line}: {where}" if line else where


def _fields(path: Sequence[Any]) -> list[str]:
    model: Any = Concept
    for part in path:
        model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
    return list(getattr(model, "model_fields", {}))
