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

from dagkit.token.artifact import GuidelineToken
from dagkit.token.files import (
    MAX_BYTES,
    RECORD_FILE,
    SUMS_FILE,
    TENSORS_FILE,
    artifact_files,
    read_file,
    safetensors_bytes,
)
from dagkit.token.record import BaseModelInfo, DatasetInfo, Guidance, Thresholds, TokenRecord, listed
from dagkit.token.stamp import now, software
from dagkit.token.versions import next_version

__all__ = [
    "MAX_BYTES",
    "RECORD_FILE",
    "SUMS_FILE",
    "TENSORS_FILE",
    "BaseModelInfo",
    "DatasetInfo",
    "Guidance",
    "GuidelineToken",
    "Thresholds",
    "TokenRecord",
    "artifact_files",
    "listed",
    "next_version",
    "now",
    "read_file",
    "safetensors_bytes",
    "software",
]
