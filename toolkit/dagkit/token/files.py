"""The files of a guideline token, each read whole and checked by itself."""

from __future__ import annotations

import json
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from dagkit._version import __version__
from dagkit.errors import TokenError, brief, quoted, reason
from dagkit.token.record import SCHEMA_VERSION, TokenRecord

TENSORS_FILE: Final = "guideline.safetensors"
RECORD_FILE: Final = "token.json"
CARD_FILE: Final = "README.md"
SUMS_FILE: Final = "SHA256SUMS"
MAX_BYTES: Final = {TENSORS_FILE: 16 << 20, RECORD_FILE: 4 << 20, CARD_FILE: 4 << 20, SUMS_FILE: 64 << 10}
MAX_PROBLEMS: Final = 5
"""Problems of a record that a message names."""


def artifact_files(folder: Path) -> dict[str, bytes]:
    """The artifact's four files by name, each read once.

    Raises:
        TokenError: one is missing, no plain file, or too large.
    """
    return {name: read_file(folder / name, limit) for name, limit in MAX_BYTES.items()}


def read_file(path: Path, limit: int) -> bytes:
    """A plain file of at most ``limit`` bytes.

    Raises:
        TokenError: it cannot be read, is a link or a device, or is larger.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link or a pipe could be anything, or never end
            raise TokenError(f"{path} is not a plain file, as all files of a guideline token are. Fetch it again.")
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise TokenError(
            f"{path} cannot be read: {error.strerror}. Expected the folder of a guideline token, with "
            f"{', '.join(MAX_BYTES)}."
        ) from error
    if len(data) > limit:
        raise TokenError(
            f"{path} is larger than {limit} bytes, which no file of a guideline token is. Fetch it again from a "
            "source that you trust."
        )
    return data


def parse_sums(path: Path, data: bytes) -> dict[str, str]:
    """File name -> SHA-256, as ``SHA256SUMS`` says.

    Raises:
        TokenError: a line is something else.
    """
    sums = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)", line)
        if match is None or match[2] in sums:
            raise TokenError(
                f"{path}, line {number}: expected a SHA-256, two spaces and a file name, but got {quoted(line, 80)}. "
                "Fetch it again."
            )
        sums[match[2]] = match[1]
    return sums


def parse_record(path: Path, data: bytes) -> TokenRecord:
    """What ``token.json`` says.

    Raises:
        TokenError: it is damaged, or of a schema that this dagkit does not know.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TokenError(f"{path} is not JSON: {reason(error)}. Fetch it again.") from error
    schema = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        raise TokenError(
            f"{path} has schema {quoted(schema, 20)}, but dagkit {__version__} knows schemas up to {SCHEMA_VERSION}. "
            "Upgrade dagkit."
        )
    try:
        return TokenRecord.model_validate(value)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors(include_url=False)]
        shown = "; ".join(brief(problem) for problem in problems[:MAX_PROBLEMS])
        more = f"; and {len(problems) - MAX_PROBLEMS:,} more" if len(problems) > MAX_PROBLEMS else ""
        raise TokenError(f"{path} does not fit the schema: {shown}{more}. Fetch or optimise it again.") from error


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of ``guideline.safetensors`` by name.

    Raises:
        TokenError: it is no such file, or holds other tensors.
    """
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise TokenError(f"{path} is not a safetensors file: {reason(error)}. Fetch it again.") from error
    required, allowed = {"guideline", "start_of_text"}, {"guideline", "start_of_text", "background", "head_weights"}
    if not required <= set(tensors) <= allowed:
        raise TokenError(
            f"{path} holds {quoted(sorted(tensors))}; expected {sorted(required)} and at most "
            f"{sorted(allowed - required)}."
        )
    return tensors


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with keys in sorted order: equal content makes equal bytes (the library's order varies)."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    body = b""
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
