"""What ``dataset.json`` says about a dataset: how it is made, and how it is read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from dagkit._version import __version__
from dagkit.dataset.pictures import file_bytes, first_line, mask_of, undecoded
from dagkit.dataset.schema import LABELS, REVIEW_STATES, SPLITS
from dagkit.dataset.tables import read_json
from dagkit.errors import DatasetError
from dagkit.manifests import IMPORTED
from dagkit.workspace import sha256_json

if TYPE_CHECKING:
    from datasets import DatasetDict

    from dagkit.concept import Concept

SUMMARY: Final = "dataset.json"
FORMAT: Final = 1

_Text = Annotated[str, Field(max_length=10_000)]
_Counts = dict[_Text, NonNegativeInt]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Labels(_Model):
    positive: list[_Text]
    negative: list[_Text]


class _Agreement(_Model):
    mean_iou: float | None
    kappa: dict[_Text, float | None]


class Summary(_Model):
    """The schema of ``dataset.json``; see `dagkit.dataset.summarise`."""

    format: int
    concept: _Text
    summary: _Text
    labels: _Labels
    fingerprint: _Text
    counts: dict[_Text, _Counts]
    review_states: _Counts
    is_reviewed: bool
    num_imported: NonNegativeInt = 0
    left_out: _Counts
    agreement: _Agreement
    models: list[Annotated[list[_Text], Field(min_length=2, max_length=2)]]
    licence: _Text
    note: _Text
    dagkit_version: _Text


def fingerprint(dataset: DatasetDict) -> str:
    """``sha256:`` over what a token learns from: split, key, image file, mask pixels, prompt, label and review state.

    The order of rows does not matter, nor how they are stored.

    Raises:
        DatasetError: a mask cannot be decoded.
    """
    rows = []
    for split in sorted(dataset):
        for row in undecoded(dataset[split], "key", "image", "mask", "prompt", "label", "review_state"):
            mask = mask_of(row)
            rows.append(
                [
                    split,
                    row["key"],
                    hashlib.sha256(file_bytes(row["image"])).hexdigest(),
                    hashlib.sha256(f"{mask.shape}".encode() + np.packbits(mask).tobytes()).hexdigest(),
                    row["prompt"],
                    LABELS[row["label"]],
                    row["review_state"],
                ]
            )
    return sha256_json(sorted(rows))


def summarise(
    dataset: DatasetDict,
    concept: Concept,
    *,
    left_out: Mapping[str, int] | None = None,
    agreement: Mapping[str, Any] | None = None,
    licence: str = "other",
    note: str = "",
) -> dict[str, Any]:
    """What ``dataset.json`` says: fingerprint, counts, review states and where everything came from.

    Args:
        dataset: as from `build`.
        concept: what it is about.
        left_out: reason -> number of candidates that are not in it.
        agreement: ``mean_iou`` and ``kappa`` (label -> value) of the annotators; by default the mean of the rows' own.
        licence: SPDX identifier, or ``other``.
        note: what the card shall say about the review beside its figures, e.g. who reviewed and how.
    """
    names = ["model", "model_fingerprint", "agreement", "source"]
    rows = [row for split in SPLITS for row in dataset[split].select_columns(names)]
    counts, states = counted(dataset)
    agreements = [row["agreement"] for row in rows if row["agreement"] is not None]
    return {
        "format": FORMAT,
        "concept": concept.name,
        "summary": concept.summary,
        "labels": concept.labels.model_dump(),
        "fingerprint": fingerprint(dataset),
        "counts": counts,
        "review_states": states,
        "is_reviewed": not (states.get("unreviewed") or states.get(IMPORTED)),
        "num_imported": sum(row["source"] is not None for row in rows),
        "left_out": dict(left_out or {}),
        "agreement": {
            "mean_iou": (agreement or {}).get("mean_iou", float(np.mean(agreements)) if agreements else None),
            "kappa": (agreement or {}).get("kappa") or {},
        },
        "models": sorted({(row["model"], row["model_fingerprint"]) for row in rows if row["source"] is None}),
        "licence": licence,
        "note": note,
        "dagkit_version": __version__,
    }


def counted(dataset: DatasetDict) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Rows of each split by label, and rows by review state."""
    columns = {split: dataset[split].select_columns(["label", "review_state"])[:] for split in SPLITS}
    counts = {
        split: {label: rows["label"].count(index) for index, label in enumerate(LABELS)}
        for split, rows in columns.items()
    }
    states = Counter(state for rows in columns.values() for state in rows["review_state"])
    return counts, {state: states[state] for state in REVIEW_STATES if states[state]}


def read_summary_file(file: Path, where: str) -> dict[str, Any]:
    """Reads ``dataset.json``.

    Args:
        file: to read.
        where: how messages call its dataset.

    Raises:
        DatasetError: it is missing or no such file.
    """
    name = f"{where}/{SUMMARY}"
    try:
        found = read_json(file)
        if found["format"] != FORMAT:
            raise DatasetError(
                f"{name}: expected format {FORMAT}, but got {found['format']!r:.80}. "
                "Install a newer dagkit, or export again."
            )
        Summary.model_validate(found)
        counts = found["counts"]
        if sorted(counts) != sorted(SPLITS) or any(sorted(one) != sorted(LABELS) for one in counts.values()):
            raise ValueError(f"counts: expected {', '.join(LABELS)} of {', '.join(SPLITS)}")
    except FileNotFoundError as error:
        raise DatasetError(f"{name}: no such file. Export the dataset again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DatasetError(
            f"{name}: not a summary of a dataset ({place:.80}: {first['msg']:.120}). Export it again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{name}: not a summary of a dataset ({first_line(error)}). Export it again.") from error
    return dict(found)
