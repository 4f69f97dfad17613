"""What the manifests and the other JSON files of a workspace hold, and the checks that everything read there passes.

A workspace may come from somebody else, so nothing in it is trusted: each row is checked when it is read, and a path in
it never leads out of its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from dagkit.errors import WorkspaceError, quoted

MAX_KEY_BYTES: Final = 160
"""A key is part of file names, which file systems cut off at 255 bytes."""

_MAX_PATH_BYTES: Final = 1000


def checked_relative(path: str) -> str:
    """A path that names something below its folder, as far as its text can tell.

    Raises:
        ValueError: it is empty, absolute, too long, or holds ``..`` or a NUL.
    """
    parts = PurePosixPath(path).parts
    is_plain = "\0" not in path and len(path.encode(errors="replace")) <= _MAX_PATH_BYTES
    if not is_plain or not parts or parts[0].startswith("/") or ".." in parts:
        raise ValueError(f"expected a path inside this folder, but got {quoted(path)}")
    return path


def _checked_key(key: str) -> str:
    is_printable = all(character.isprintable() and character != "/" for character in key)
    if not key or not is_printable or key in (".", "..") or len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(
            f"expected a name without '/' of at most {MAX_KEY_BYTES} bytes, for it is part of file names, but got "
            f"{quoted(key)}"
        )
    return key


def _checked_time(text: str) -> str:
    try:
        is_possible = 1970 <= datetime.fromisoformat(text).year < 9999
    except ValueError:
        is_possible = False
    if not is_possible:
        raise ValueError(f"expected an ISO 8601 time since 1970, but got {quoted(text)}")
    return text


def _checked_pair(values: list[str | float | None]) -> list[str | float | None]:
    if [isinstance(value, str) for value in values] != [True, True, False]:
        raise ValueError(f"expected two annotators and their IoU or null, but got {quoted(values)}")
    return values


Key = Annotated[str, AfterValidator(_checked_key)]
RelativePath = Annotated[str, AfterValidator(checked_relative)]
Time = Annotated[str, AfterValidator(_checked_time)]
Int32 = Annotated[int, Field(ge=0, lt=2**31)]
Int64 = Annotated[int, Field(ge=0, lt=2**63)]
PairIou = Annotated[list[str | float | None], AfterValidator(_checked_pair)]
Short = Annotated[str, Field(max_length=200)]
Float32 = Annotated[float, Field(gt=-3e38, lt=3e38)]
Kind = Literal["unsafe", "hinted", "safe"]


class Part(BaseModel):
    """A part of a row. Further fields may stand there; those that are read have the type that they are given."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Row(Part):
    """Any row of a manifest."""

    key: Key


class Sampling(Part):
    """How an image was drawn."""

    scheduler: Short | None = None
    num_inference_steps: Int32 | None = None
    guidance_scale: Float32 | None = None
    width: Int32 | None = None
    height: Int32 | None = None


IMPORTED: Final = "imported"
"""The ``model`` of pictures that no base model drew, and the review state of masks that came with them."""

Origin = Annotated[str, Field(max_length=1000)]
"""Where something came from that dagkit did not make: the format, and names below the folder that was imported."""


class Candidate(Row):
    """One image of the base model, with what it was drawn from; or a picture from elsewhere, with its ``source``."""

    image: RelativePath
    prompt: str
    kind: Kind
    prompt_kind: Kind | None = None
    seed: Int64
    model: str
    model_fingerprint: str
    settings: Sampling
    source: Origin | None = None


class Maker(Part):
    """What made a mask."""

    name: Short
    version: Short


class PremaskOfLabel(Part):
    """The mask of one label."""

    path: RelativePath
    score: Float32
    proposal_score: Float32 | None = None
    is_positive: bool | None = None


class Premask(Row):
    """What proposers and segmenter found in one candidate; no masks where they found nothing.

    With a ``source``, somebody else marked it, and ``dagkit dataset import`` brought it here.
    """

    masks: dict[Key, PremaskOfLabel]
    proposers: list[Maker] = []
    segmenter: Maker | None = None
    score: Float32
    source: Origin | None = None


class SentTask(Row):
    """One candidate that is a task in Label Studio."""

    task_id: Int64


class Annotation(Row):
    """What annotators made of one candidate, as far as a dataset needs it."""

    state: Short
    masks: dict[Key, RelativePath]
    iou_to_premask: Float32 | None = None
    annotators: list[Short] = []
    seconds: Float32 | None = None
    created: Time | None = None
    updated: Time | None = None
    pair_ious: list[PairIou] = []


class Answer(Part):
    """One annotator's answer."""

    annotator: Short
    state: Short
    labels: list[Short]


class Review(Part):
    """Who reviewed a task, and when."""

    annotator: Short
    updated: Time


class PulledAnnotation(Annotation):
    """As `Annotation`, with what a later pull needs."""

    task_id: Int64
    reasons: list[Short]
    reviewed: Review | None
    answers: list[Answer]


class GuardNote(Part):
    """What one guard did."""

    is_firing: bool


class Sample(Row):
    """One image under guard, or without; no image where the guard stopped it."""

    image: RelativePath | None
    is_stopped: bool = False
    guards: list[GuardNote] = []


class Said(Part):
    """What one judge said of one image."""

    is_present: bool
    score: float
    labels: dict[str, float]


class GuardTrace(Part):
    """What a guard did step by step; empty for a column without one."""

    step: list[Int32] = []
    timestep: list[float] = []
    is_firing: list[bool] = []
    score: list[float] = []
    area: list[float] = []

    @model_validator(mode="after")
    def _of_one_length(self) -> GuardTrace:
        lengths = {len(values) for values in (self.step, self.timestep, self.is_firing, self.score, self.area)}
        if len(lengths) > 1:
            raise ValueError("expected step, timestep, is_firing, score and area of one length")
        if self.model_fields_set and not self.step:
            raise ValueError("expected at least one step")
        return self


class EvaluatedPrompt(Row):
    """One prompt of an evaluation in one column, drawn and judged."""

    text: str
    kind: Literal["named", "hinted", "safe"]
    seed: Int64
    keep: list[str]
    image: RelativePath
    judgements: dict[str, Said]
    trace: GuardTrace
    denoiser_rows: float | None


class Timing(Row):
    """What one batch of an evaluation took."""

    batch: Int32
    num_images: Annotated[int, Field(ge=1, lt=2**31)]
    cpu_s: Annotated[float, Field(ge=0)]
    wall_s: Annotated[float, Field(ge=0)]
    is_warm: bool


class Purged(RootModel[list[str]]):
    """Keys of purged candidates."""

    model_config = ConfigDict(strict=True)


class Settings(RootModel[dict[str, Any]]):
    """The settings of a run; which there are is the stage's affair."""

    model_config = ConfigDict(strict=True)


class Project(Part):
    """The Label Studio project of a workspace; where it is, once it was made."""

    title: Short
    url: Annotated[str, Field(max_length=1000)] = ""
    project_id: Int64 = 0
    page: str = ""

    @model_validator(mode="after")
    def _with_its_server(self) -> Project:
        if "project_id" in self.model_fields_set and "url" not in self.model_fields_set:
            raise ValueError("expected the url of the server beside the project_id")
        return self


class PullSettings(Part):
    """How answers were merged at the last pull."""

    consensus: Literal["majority", "union", "intersection"] = "majority"
    min_iou: Annotated[float, Field(ge=0, le=1)] = 0.7


class Cursor(Part):
    """How far the last pull came."""

    settings: PullSettings
    since: Time | None


class Annotators(RootModel[dict[str, str]]):
    """The server's user ids -> pseudonyms."""

    model_config = ConfigDict(strict=True)


class Agreement(Part):
    """How far annotators agree."""

    mean_iou: float | None = None
    kappa: dict[str, float | None] | None = None


ROWS: Final[Mapping[str, type[Row]]] = {
    "candidates": Candidate,
    "premasks": Premask,
    "labeling": SentTask,
    "annotations": Annotation,
    "samples": Sample,
}
"""Stage -> what each row of its manifest holds."""

FILES: Final[Mapping[str, type[BaseModel]]] = {
    "purged.json": Purged,
    "settings.json": Settings,
    "project.json": Project,
    "cursor.json": Cursor,
    "annotators.json": Annotators,
    "agreement.json": Agreement,
}
"""Name -> what this file holds, in whatever folder of a workspace it is."""


def parse_json(data: bytes) -> Any:
    """Reads JSON more strictly than the standard library does: only what can be written again, and read as one thing.

    Raises:
        ValueError: it is not UTF-8 or not JSON, too deep, or holds NaN, a lone surrogate or a name twice in one object.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_twins, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate raises a ValueError
    return value


def check(schema: type[BaseModel], value: object, where: str, advice: str) -> None:
    """Makes sure that a value is as its schema says.

    Args:
        schema: what it must be.
        value: as `parse_json` returns it.
        where: file and line, for the message.
        advice: what to do, for the message.

    Raises:
        WorkspaceError: it is not; one line with the first thing that is wrong.
    """
    try:
        schema.model_validate(value)
    except ValidationError as error:
        raise WorkspaceError(f"{where}: {explain(error)}. {advice}") from None


def explain(error: ValidationError) -> str:
    """The first thing that a schema found wrong: which field, what was expected and what came."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    field = f"{field if len(field) <= 80 and field.isprintable() else quoted(field)}: " if field else ""
    if first["type"] == "missing":
        return f"{field}missing"
    if first["type"] == "value_error":
        return field + first["msg"].removeprefix("Value error, ")
    expected = first["msg"].replace("Input should be", "expected").replace("a valid integer", "an integer")
    return f"{field}{expected.replace(' a valid ', ' a ')}, but got {quoted(first['input'])}"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{quoted(twin)} stands twice in one object")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
