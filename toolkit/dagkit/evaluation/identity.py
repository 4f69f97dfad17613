"""Which token an evaluation measured, and whether its figures can be used for another one's comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from dagkit.errors import TokenError, WorkspaceError, quoted
from dagkit.manifests import Part, explain, parse_json
from dagkit.token import safetensors_bytes
from dagkit.workspace import MAX_JSON_BYTES, open_plain, sha256_bytes, sha256_json

if TYPE_CHECKING:
    from pathlib import Path

    from dagkit.token import GuidelineToken


class ColumnSettings(Part):
    """One column of an evaluation."""

    name: str
    settings: dict[str, Any]


class EvaluationSettings(Part):
    """What was compared, and with which model."""

    model: str
    columns: list[ColumnSettings]


class Outcome(Part):
    """How one column did on one prompt."""

    is_present: bool
    lost: list[str]
    num_fired: int


class PromptOutcome(Part):
    """How the columns did on one prompt."""

    key: str
    kind: str
    member: str | None = None
    columns: dict[str, Outcome]


class CheckOutcome(Part):
    """One gate."""

    name: str
    text: str
    is_passed: bool


class MeasuredToken(Part):
    """Which token was measured."""

    name: str


class Figure(Part):
    """One figure; None where nothing could be counted."""

    value: float | None = None


class Figures(Part):
    """What ``figures.json`` holds, as far as a later command reads it."""

    schema_version: int = Field(alias="schema")
    column: str
    token: MeasuredToken
    settings: EvaluationSettings
    prompts: list[PromptOutcome]
    results: dict[str, dict[str, dict[str, Any]]]
    checks: list[CheckOutcome] = Field(default=[])

    @model_validator(mode="after")
    def _whole(self) -> Figures:
        names = {column.name for column in self.settings.columns}
        if self.column not in names or any(self.column not in row.columns for row in self.prompts):
            raise ValueError(f"expected figures of the column {quoted(self.column)}, but some are missing")
        for results in self.results.values():
            for name in ("erase_rate", "preservation", "fired"):
                Figure.model_validate(results.get(self.column, {}).get(name) or {})
        return self


def parse_figures(data: bytes) -> dict[str, Any]:
    """Reads the content of a ``figures.json``.

    Raises:
        ValueError: it is no evaluation; the message says what is wrong.
    """
    figures = parse_json(data)
    try:
        Figures.model_validate(figures)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    return dict(figures)


def token_identity(token: GuidelineToken) -> dict[str, str]:
    """Name and SHA-256 of tensors and record, its date aside: what an evaluation says of the token that it measured."""
    return {
        "token": token.name,
        "tensors": sha256_bytes(safetensors_bytes(token.tensors(), {})),
        "record": sha256_json({key: value for key, value in token.record.as_written().items() if key != "created"}),
    }


def read_figures(path: Path, token: GuidelineToken) -> dict[str, Any]:
    """Reads ``figures.json`` and makes sure that it is an evaluation of exactly this token.

    Raises:
        TokenError: there is no such file, it is no evaluation, or one of another token of this name.
    """
    again = f"Run: dagkit evaluate --token {token.name}"
    try:
        with open_plain(path) as file:
            figures = parse_figures(file.read(MAX_JSON_BYTES))
    except (OSError, WorkspaceError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenError(f"{token.name} has no evaluation: {path} cannot be read ({reason}). {again}") from error
    except ValueError as error:
        raise TokenError(f"{path} is not an evaluation ({quoted(str(error))[1:-1]}). {again}") from error
    measured = next(one["settings"] for one in figures["settings"]["columns"] if one["name"] == figures["column"])
    if any(measured.get(key) != value for key, value in token_identity(token).items()):
        raise TokenError(f"{path} is the evaluation of another {token.name}: it was trained anew since. {again}")
    return figures
