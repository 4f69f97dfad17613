"""What ``dataset.json`` says about a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from dagkit.dataset.pictures import first_line
from dagkit.dataset.schema import LABELS, SPLITS
from dagkit.dataset.tables import read_json
from dagkit.errors import DatasetError

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
    left_out: _Counts
    agreement: _Agreement
    models: list[Annotated[list[_Text], Field(min_length=2, max_length=2)]]
    licence: _Text
    note: _Text
    dagkit_version: _Text


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
