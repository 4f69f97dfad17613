"""The artifact: a concept as rows in a base model's text space, saved and loaded whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dagkit import plugins
from dagkit.errors import TokenError
from dagkit.folders import atomic_folder
from dagkit.token.card import card
from dagkit.token.files import (
    CARD_FILE,
    RECORD_FILE,
    SUMS_FILE,
    TENSORS_FILE,
    artifact_files,
    parse_record,
    parse_sums,
    parse_tensors,
    safetensors_bytes,
)
from dagkit.token.record import SCHEMA_VERSION, TokenRecord

MAX_ROWS, MAX_WIDTH, MAX_HEADS = 1024, 16384, 65536


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

    def guard(self, **options: Any) -> Any:
        """A `dagkit.guard.Guard` for this token, which takes these options."""
        return plugins.load("guards", "dag")(self, **options)

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
            with atomic_folder(target) as building:
                for name, data in files.items():
                    (building / name).write_bytes(data)
        except OSError as error:
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
        files = artifact_files(folder)
        sums = parse_sums(folder / SUMS_FILE, files.pop(SUMS_FILE))
        for name, data in files.items():
            if sums.get(name) != hashlib.sha256(data).hexdigest():
                raise TokenError(
                    f"{folder / name} was changed after it was written (SHA-256 differs from {SUMS_FILE}). Fetch it "
                    "again."
                )
        record = parse_record(folder / RECORD_FILE, files[RECORD_FILE])
        if reason := record.never_acts():
            raise TokenError(f"{folder / RECORD_FILE}: {reason}, so it would guard nothing. Optimise it again.")
        tensors = parse_tensors(folder / TENSORS_FILE, files[TENSORS_FILE])
        return cls(
            guideline=tensors["guideline"],
            start_of_text=tensors["start_of_text"],
            background=tensors.get("background"),
            head_weights=tensors.get("head_weights"),
            record=record,
        )


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
