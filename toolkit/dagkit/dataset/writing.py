"""Datasets to disk and to the Hub: whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.dataset import hub
from dagkit.dataset.card import dataset_card
from dagkit.dataset.replacing import EXPORT, PUSH, replacement
from dagkit.dataset.schema import FEATURES, SPLITS
from dagkit.dataset.summary import SUMMARY
from dagkit.errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CARD: Final = "README.md"
_ROWS_AT_ONCE: Final = 100


def save_dataset(dataset: DatasetDict, path: Path, summary: Mapping[str, Any]) -> None:
    """Writes a dataset with card and summary by ``save_to_disk``, in place of an older one if there is one.

    Splits without rows are left out, because ``load_from_disk`` cannot read them; `load_dataset` puts them back.

    Args:
        dataset: as from `build`.
        path: its folder; there is a whole dataset in it at any time but an instant, and nothing else is touched.
        summary: as from `summarise`.

    Raises:
        DatasetError: the folder cannot be written, or holds what `save_dataset` did not put there.
    """
    from datasets import DatasetDict

    with replacement(path, EXPORT) as folder:
        DatasetDict({split: rows for split, rows in dataset.items() if len(rows)}).save_to_disk(folder)
        _describe(dataset, folder, summary)


def write_parquet(dataset: DatasetDict, path: Path, summary: Mapping[str, Any]) -> None:
    """Writes a dataset with card and summary as the Hub lays it out: ``data/<split>-00000-of-00001.parquet``.

    Splits without rows are left out, as by `save_dataset`.

    Args:
        dataset: as from `build` or `load_dataset`.
        path: its folder, as for `save_dataset`.
        summary: as from `summarise` or `read_summary`.

    Raises:
        DatasetError: the folder cannot be written, or holds what `write_parquet` did not put there.
    """
    with replacement(path, PUSH) as folder:
        (folder / "data").mkdir()
        for split in SPLITS:
            if len(dataset[split]):
                _write_table(dataset[split], folder / "data" / f"{split}-00000-of-00001.parquet")
        _describe(dataset, folder, summary)


def push_dataset(dataset: DatasetDict, to: str, summary: Mapping[str, Any], *, private: bool = True) -> str:
    """Publishes a dataset: ``hf://owner/name`` on the Hub, or any folder in the Hub's layout.

    Args:
        dataset: as from `build` or `load_dataset`.
        to: where; a folder or repository that holds something else is refused.
        summary: as from `summarise` or `read_summary`.
        private: whether a new repository on the Hub is private.

    Returns:
        Where it is now.

    Raises:
        DatasetError: the Hub refused, or something else is there.
    """
    if "://" in to and not hub.is_url(to):
        raise DatasetError(f"{to!r:.200}: expected hf://owner/name, or a folder.")
    if not hub.is_url(to):
        write_parquet(dataset, Path(to), summary)
        return to
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "dataset"
        write_parquet(dataset, files, summary)
        hub.upload(files, to, private=private)
    return to


def _describe(dataset: DatasetDict, folder: Path, summary: Mapping[str, Any]) -> None:
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(dataset_card(dataset, summary), encoding="utf-8")


def _write_table(split: Dataset, path: Path) -> None:
    """Streams one split to parquet, with image files read in."""
    from datasets.table import embed_table_storage
    from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

    rows = split.with_format("arrow")
    with ParquetWriter(path, FEATURES.arrow_schema) as writer:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            writer.write_table(embed_table_storage(rows[start : start + _ROWS_AT_ONCE]))
