"""Which token an evaluation measured, and whether its figures can be used for another one's comparison."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dagkit.errors import TokenError
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


def read_figures(path: Path, token: GuidelineToken) -> dict[str, Any]:
    """Reads ``figures.json`` and makes sure that it is an evaluation of exactly this token.

    Raises:
        TokenError: there is no such file, it is no evaluation, or one of another token of this name.
    """
    again = f"Run: dagkit evaluate --token {token.name}"
    try:
        figures: dict[str, Any] = json.loads(path.read_bytes())
        columns = {column["name"]: column["settings"] for column in figures["settings"]["columns"]}
        measured, rows = columns[figures["column"]], figures["prompts"]
        is_whole = all(figures["column"] in row["columns"] for row in rows) and "schema" in figures
    except OSError as error:
        raise TokenError(
            f"{token.name} has no evaluation: {path} cannot be read ({error.strerror}). {again}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TokenError(f"{path} is not an evaluation ({error!r}). {again}") from error
    if not is_whole:
        raise TokenError(f"{path} is not an evaluation (rows or schema are missing). {again}")
    if any(measured.get(key) != value for key, value in token_identity(token).items()):
        raise TokenError(f"{path} is the evaluation of another {token.name}: it was trained anew since. {again}")
    return figures
