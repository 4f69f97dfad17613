"""Which token an evaluation measured, and whether its figures can be used for another one's comparison."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dagkit.errors import TokenError, brief, reason
from dagkit.token import safetensors_bytes
from dagkit.workspace import sha256_bytes, sha256_json

if TYPE_CHECKING:
    from pathlib import Path

    from dagkit.token import GuidelineToken


def token_identity(token: GuidelineToken) -> dict[str, str]:
    """Name and SHA-256 of tensors and record, its date aside: what an evaluation says of the token that it measured."""
    return {
        "token": token.name,
        "tensors": sha256_bytes(safetensors_bytes(token.tensors(), {})),
        "record": sha256_json(token.record.model_dump(mode="json", exclude={"created"})),
    }


class _Part(BaseModel):
    """What another dagkit wrote may hold more than is read here."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Said(_Part):
    is_present: bool
    lost: list[str]
    num_fired: Annotated[int, Field(ge=0)]


class _Row(_Part):
    key: str
    kind: str
    columns: dict[str, _Said]


class _Column(_Part):
    name: str
    settings: dict[str, Any]


class _Settings(_Part):
    model: str
    columns: list[_Column]


class _Token(_Part):
    name: str


class _Figures(_Part):
    """As far as ``figures.json`` is read again: to compare versions, and to publish one."""

    schema_version: int = Field(alias="schema")
    column: str
    token: _Token
    settings: _Settings
    prompts: list[_Row]

    @property
    def measured(self) -> dict[str, Any] | None:
        """Settings of the guarded column; None where it or one of its rows is missing."""
        found = {column.name: column.settings for column in self.settings.columns}.get(self.column)
        return found if all(self.column in row.columns for row in self.prompts) else None


def read_figures(path: Path, token: GuidelineToken) -> dict[str, Any]:
    """Reads ``figures.json`` and makes sure that it is an evaluation of exactly this token.

    Raises:
        TokenError: there is no such file, it is no evaluation, or one of another token of this name.
    """
    again, where = f"Run: dagkit evaluate --token {token.name}", brief(str(path))
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise TokenError(f"{where} is not a plain file, as an evaluation is. Remove it. {again}")
        figures: dict[str, Any] = json.loads(path.read_bytes())
        found = _Figures.model_validate(figures)
    except OSError as error:
        raise TokenError(
            f"{token.name} has no evaluation: {where} cannot be read ({error.strerror}). {again}"
        ) from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg'].lower()}"
        raise TokenError(f"{where} is not an evaluation ({brief(what)}). {again}") from error
    except (ValueError, RecursionError) as error:
        raise TokenError(f"{where} is not an evaluation ({reason(error)}). {again}") from error
    if found.measured is None:
        raise TokenError(f"{where} is not an evaluation (rows or columns are missing). {again}")
    if any(found.measured.get(key) != value for key, value in token_identity(token).items()):
        raise TokenError(f"{where} is the evaluation of another {token.name}: it was trained anew since. {again}")
    return figures
