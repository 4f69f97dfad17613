"""The guideline token as an artifact: a folder that can be checked, versioned and published.

    tokens/<concept>/<version>/
      guideline.safetensors   guideline (n, d), start_of_text (1, d); where used background (m, d), head_weights (k,)
      token.json              what it is, what it was made from and how: the schema is ``TokenRecord``
      README.md               model card
      SHA256SUMS              of the other three files

Rows live in the space of ``encoder_hidden_states`` (text-encoder OUTPUT). Textual-inversion embeddings live in the text
encoder's INPUT space, so the file never holds one tensor alone: loaders of such embeddings then refuse it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from dagkit._version import __version__
from dagkit.errors import TokenError, brief, quoted, reason
from dagkit.resources import source_date
from dagkit.token.card import card
from dagkit.token.record import SCHEMA_VERSION, BaseModelInfo, DatasetInfo, Guidance, Thresholds, TokenRecord

if TYPE_CHECKING:
    from dagkit.guard import Guard

__all__ = [
    "BaseModelInfo",
    "DatasetInfo",
    "Guidance",
    "GuidelineToken",
    "Thresholds",
    "TokenRecord",
    "next_version",
]

TENSORS_FILE: Final = "guideline.safetensors"
RECORD_FILE: Final = "token.json"
CARD_FILE: Final = "README.md"
SUMS_FILE: Final = "SHA256SUMS"
MAX_BYTES: Final = {TENSORS_FILE: 16 << 20, RECORD_FILE: 4 << 20, CARD_FILE: 4 << 20, SUMS_FILE: 64 << 10}
MAX_ROWS, MAX_WIDTH, MAX_HEADS = 1024, 16384, 65536
MAX_PROBLEMS: Final = 5
"""Problems of a record that a message names."""


@dataclass(frozen=True, eq=False)
class GuidelineToken:
    """A concept as rows in a base model's text space, with all that a guard must know.

    Attributes:
        guideline: (n, d) float32, the rows ``c*``.
        start_of_text: (1, d) float32, the base model's first row: the background sink.
        background: (m, d) float32, learned competitors in the softmax; None in the paper's recipe.
        head_weights: (heads over all layers,) float32 >= 0 with sum 1; None for the plain mean.
        record: everything else.
    """

    guideline: Tensor
    start_of_text: Tensor
    background: Tensor | None
    head_weights: Tensor | None
    record: TokenRecord

    def __post_init__(self) -> None:
        width = self.guideline.shape[-1] if self.guideline.dim() else 0
        for name, tensor in self.tensors().items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise TokenError(
                    f"{self.name}: {name} must be finite float32, but is {tensor.dtype} or holds inf or nan. "
                    "Optimise it again."
                )
            rows, columns = (
                (1, len(tensor)) if tensor.dim() == 1 else tuple(tensor.shape) if tensor.dim() == 2 else (0, 0)
            )
            fits = (
                1 <= columns <= MAX_HEADS and tensor.dim() == 1
                if name == "head_weights"
                else 1 <= columns == width <= MAX_WIDTH and tensor.dim() == 2
            )
            if not fits or not 1 <= rows <= MAX_ROWS or (name == "start_of_text" and rows != 1):
                raise TokenError(
                    f"{self.name}: {name} has shape {tuple(tensor.shape)}, which does not fit guideline (n, {width})."
                )
        if self.head_weights is not None and (
            bool((self.head_weights < 0).any()) or abs(float(self.head_weights.sum()) - 1) > 1e-3
        ):
            raise TokenError(
                f"{self.name}: head_weights must be >= 0 and sum to 1, but sum to {float(self.head_weights.sum()):.4f}."
            )

    @property
    def name(self) -> str:
        """``concept@version``."""
        return f"{self.record.concept}@{self.record.version}"

    @property
    def concept(self) -> str:
        """The concept's name."""
        return self.record.concept

    @property
    def version(self) -> str:
        """Semantic version."""
        return self.record.version

    @property
    def num_tokens(self) -> int:
        """Guideline rows n."""
        return len(self.guideline)

    @property
    def sequence(self) -> Tensor:
        """(1 + m + n, d): ``[SOT, background.., guideline..]``."""
        rows = [self.start_of_text, self.background, self.guideline]
        return torch.cat([row for row in rows if row is not None])

    def tensors(self) -> dict[str, Tensor]:
        """What the safetensors file holds."""
        named = {
            "background": self.background,
            "guideline": self.guideline,
            "head_weights": self.head_weights,
            "start_of_text": self.start_of_text,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def guard(self, **options: Any) -> Guard:
        """A guard for this token; options as of ``dagkit.guard.Guard``."""
        guard: Guard = import_module("dagkit.guard").Guard(self, **options)  # by name: the guard is a layer above
        return guard

    def save(self, folder: str | Path) -> Path:
        """Writes the artifact: whole or not at all, byte for byte the same for the same token.

        Raises:
            TokenError: the folder exists already, or cannot be written.
        """
        target = Path(folder)
        if target.exists():
            raise TokenError(
                f"{target} exists; a version is never overwritten. Use the next one (dagkit.token.next_version)."
            )
        files = {
            TENSORS_FILE: safetensors_bytes(self.tensors(), _header(self)),
            RECORD_FILE: (json.dumps(self.record.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode(),
            CARD_FILE: card(self.record, self.tensors()).encode(),
        }
        files[SUMS_FILE] = "".join(
            f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())
        ).encode()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:
            raise TokenError(
                f"{target} cannot be written: {error}. Free some space or choose another folder."
            ) from error
        try:
            for name, data in files.items():
                with (building / name).open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
            building.chmod(0o755)
            building.rename(target)
            _sync_folder(target.parent)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise TokenError(
                f"{target} cannot be written: {error}. Free some space or choose another folder."
            ) from error
        return target

    @classmethod
    def load(cls, folder: str | Path) -> GuidelineToken:
        """Reads and verifies an artifact.

        Raises:
            TokenError: a file is missing, too large, changed since it was written, or not of a schema that this
                dagkit knows.
        """
        folder = Path(folder)
        files = {name: _read(folder / name, limit) for name, limit in MAX_BYTES.items()}
        sums = _parse_sums(folder / SUMS_FILE, files.pop(SUMS_FILE))
        for name, data in files.items():
            if sums.get(name) != hashlib.sha256(data).hexdigest():
                raise TokenError(
                    f"{folder / name} was changed after it was written (SHA-256 differs from {SUMS_FILE}). Fetch it "
                    "again."
                )
        record = _parse_record(folder / RECORD_FILE, files[RECORD_FILE])
        if reason := record.never_acts():
            raise TokenError(f"{folder / RECORD_FILE}: {reason}, so it would guard nothing. Optimise it again.")
        tensors = _parse_tensors(folder / TENSORS_FILE, files[TENSORS_FILE])
        return cls(
            guideline=tensors["guideline"],
            start_of_text=tensors["start_of_text"],
            background=tensors.get("background"),
            head_weights=tensors.get("head_weights"),
            record=record,
        )


def next_version(existing: Iterable[str], change: Literal["patch", "minor", "major"] = "patch") -> str:
    """Proposes a version after all existing ones: ``1.0.0`` where there is none.

    Args:
        existing: semantic versions; other names are left out.
        change: patch = same data, new seed or settings; minor = more data; major = other base model or concept
            definition.
    """
    known = sorted(
        tuple(int(part) for part in name.split("."))
        for name in existing
        if re.fullmatch(r"\d{1,6}\.\d{1,6}\.\d{1,6}", name)
    )
    if not known:
        return "1.0.0"
    major, minor, patch = known[-1]
    following = {"patch": (major, minor, patch + 1), "minor": (major, minor + 1, 0), "major": (major + 1, 0, 0)}
    return ".".join(map(str, following[change]))


def software() -> dict[str, str]:
    """Versions that a token was made with."""
    return {"dagkit": __version__, **{name: installed_version(name) for name in ("torch", "diffusers", "transformers")}}


def now() -> str:
    """The present time for ``created``: ISO 8601 in UTC; ``SOURCE_DATE_EPOCH`` where it is set.

    Raises:
        DagkitError: ``SOURCE_DATE_EPOCH`` is no time.
    """
    return (source_date() or datetime.now(UTC)).isoformat(timespec="seconds")


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


def _header(token: GuidelineToken) -> dict[str, str]:
    record = token.record
    digest = hashlib.sha256(
        b"".join(t.contiguous().numpy().tobytes() for _, t in sorted(token.tensors().items()))
    ).hexdigest()
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{record.base_model.architecture}/guideline-token",
        "modelspec.implementation": "dagkit",
        "modelspec.title": token.name,
        "modelspec.description": f"Guideline token for {record.concept}; text-encoder output space; not a textual "
        "inversion.",
        "modelspec.usage_hint": "dagkit.load_token(folder).guard().attach(pipe)",
        "modelspec.date": record.created,
        "modelspec.hash_sha256": f"0x{digest}",
        "dagkit.schema_version": str(SCHEMA_VERSION),
        "dagkit.concept": record.concept,
        "dagkit.version": record.version,
        "dagkit.base_model": record.base_model.id,
        "dagkit.space": "encoder_hidden_states",
    }


def _read(path: Path, limit: int) -> bytes:
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
            f"{path} is larger than {limit} bytes, which no guideline token is. Fetch it again from a source that "
            "you trust."
        )
    return data


def _parse_sums(path: Path, data: bytes) -> dict[str, str]:
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


def _parse_record(path: Path, data: bytes) -> TokenRecord:
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


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
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


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
