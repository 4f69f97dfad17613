"""Datasets on disk: written whole or not at all, and checked against their fingerprint when they are read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dagkit._version import __version__
from dagkit.dataset import hub
from dagkit.dataset.card import dataset_card
from dagkit.dataset.pictures import file_bytes, image_of, mask_of, undecoded
from dagkit.dataset.replacing import EXPORT, PUSH, old_place, replacement
from dagkit.dataset.schema import FEATURES, LABELS, REVIEW_STATES, SPLITS
from dagkit.dataset.summary import FORMAT, SUMMARY, read_summary_file
from dagkit.dataset.tables import is_dataset, read_tables
from dagkit.errors import DatasetError
from dagkit.resources import shipped_folder
from dagkit.workspace import sha256_json

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from dagkit.concept import Concept

CARD: Final = "README.md"
_ROWS_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True, eq=False)
class AnnotatedImage:
    """One image with its mask, as the optimisation takes it.

    Attributes:
        key: the candidate's key.
        image: RGB.
        mask: (H, W) bool, True where the concept is; all False on a safe image.
        prompt: what the image was drawn from.
        is_unsafe: whether the mask has a pixel.
    """

    key: str
    image: Image.Image
    mask: NDArray[np.bool_]
    prompt: str
    is_unsafe: bool


def examples(split: Dataset) -> list[AnnotatedImage]:
    """All rows of one split, decoded.

    Raises:
        DatasetError: an image or a mask cannot be decoded, or the mask is not as large as its image.
    """
    rows = []
    for row in undecoded(split, "key", "image", "mask", "prompt", "label"):
        image, mask = image_of(row), mask_of(row)
        if mask.shape != (image.height, image.width):
            raise DatasetError(
                f"row {row['key']}: expected a mask of {image.width}x{image.height} px, but got "
                f"{mask.shape[1]}x{mask.shape[0]}. See: dagkit dataset check"
            )
        rows.append(AnnotatedImage(row["key"], image, mask, row["prompt"], row["label"] == LABELS.index("unsafe")))
    return rows


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
    names = ["model", "model_fingerprint", "agreement"]
    rows = [row for split in SPLITS for row in dataset[split].select_columns(names)]
    counts, states = _counts(dataset)
    agreements = [row["agreement"] for row in rows if row["agreement"] is not None]
    return {
        "format": FORMAT,
        "concept": concept.name,
        "summary": concept.summary,
        "labels": concept.labels.model_dump(),
        "fingerprint": fingerprint(dataset),
        "counts": counts,
        "review_states": states,
        "is_reviewed": not states.get("unreviewed"),
        "left_out": dict(left_out or {}),
        "agreement": {
            "mean_iou": (agreement or {}).get("mean_iou", float(np.mean(agreements)) if agreements else None),
            "kappa": (agreement or {}).get("kappa") or {},
        },
        "models": sorted({(row["model"], row["model_fingerprint"]) for row in rows}),
        "licence": licence,
        "note": note,
        "dagkit_version": __version__,
    }


def _counts(dataset: DatasetDict) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Rows of each split by label, and rows by review state."""
    columns = {split: dataset[split].select_columns(["label", "review_state"])[:] for split in SPLITS}
    counts = {
        split: {label: rows["label"].count(index) for index, label in enumerate(LABELS)}
        for split, rows in columns.items()
    }
    states = Counter(state for rows in columns.values() for state in rows["review_state"])
    return counts, {state: states[state] for state in REVIEW_STATES if states[state]}


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


def find_dataset(path: str | Path) -> Path:
    """Where a dataset lies: the folder as given, or else one that ships with dagkit, or a copy of one on the Hub.

    Args:
        path: a folder; the name of a shipped dataset with or without ``datasets/`` before it: ``weapon-demo``; or
            ``hf://owner/name``, which is fetched.

    Raises:
        DatasetError: the Hub has none of that name, or cannot be reached.
    """
    if hub.is_url(path):
        return hub.download(str(path))
    folder = Path(path)
    is_name = folder.parent in (Path(), Path("datasets")) and folder.name
    if is_name and not folder.exists() and folder.name in shipped_datasets():
        return shipped_folder("datasets") / folder.name
    return folder


def shipped_datasets() -> list[str]:
    """Names of the datasets that ship with dagkit, sorted."""
    return sorted(path.parent.name for path in shipped_folder("datasets").glob(f"*/{SUMMARY}"))


def load_dataset(path: str | Path) -> DatasetDict:
    """Reads a dataset and checks that it is whole.

    Nothing outside it is opened: a row whose picture is a path or a URL is refused. File names beside pictures are
    dropped.

    Args:
        path: a folder that `save_dataset`, `write_parquet` or ``save_to_disk`` wrote, the name of one that ships
            (`find_dataset`), or ``hf://owner/name``.

    Returns:
        ``train``, ``validation`` and ``test``, all possibly without rows.

    Raises:
        DatasetError: there is none, it is damaged, lacks columns, has values that the schema does not allow, or was
            changed after it was exported.
    """
    return _load(_current(find_dataset(path)), str(path))


def load_with_summary(path: str | Path) -> tuple[DatasetDict, dict[str, Any]]:
    """Reads a dataset as `load_dataset` does, and what its ``dataset.json`` says.

    Raises:
        DatasetError: as for `load_dataset`, or there is no ``dataset.json``.
    """
    folder, where = _current(find_dataset(path)), str(path)
    dataset = _load(folder, where)
    return dataset, read_summary_file(folder / SUMMARY, where)


def _load(folder: Path, where: str) -> DatasetDict:
    if not is_dataset(folder):
        raise DatasetError(
            f"{where}: no dataset. Expected a folder with dataset_dict.json or data/*.parquet. "
            f"Write one with: dagkit export. These ship with dagkit: {', '.join(shipped_datasets()) or 'none'}."
        )
    dataset = read_tables(folder, where)
    if (folder / SUMMARY).exists():
        summary = read_summary_file(folder / SUMMARY, where)
        if summary["fingerprint"] != fingerprint(dataset) or _counts(dataset) != (
            summary["counts"],
            summary["review_states"],
        ):
            raise DatasetError(
                f"{where}: the rows do not match the fingerprint in {SUMMARY}: they were changed after the export. "
                f"Export again; if the change was meant, delete {SUMMARY}."
            )
    return dataset


def read_summary(path: str | Path) -> dict[str, Any]:
    """What the ``dataset.json`` of a dataset says.

    Args:
        path: as for `load_dataset`.

    Raises:
        DatasetError: it is missing or no such file.
    """
    return read_summary_file(_current(find_dataset(path)) / SUMMARY, str(path))


def read_splits(path: Path) -> dict[str, str]:
    """Key -> split of a dataset on disk; empty where there is none.

    Raises:
        DatasetError: it is damaged, so nobody knows which rows are for tests only.
    """
    if not is_dataset(_current(path)):
        return {}
    try:
        dataset = load_dataset(path)
    except DatasetError as error:
        raise DatasetError(
            f"{error} If it cannot be restored, delete {path} first: its rows get new splits."
        ) from error
    return {key: split for split, rows in dataset.items() for key in rows["key"]}


def _current(path: Path) -> Path:
    """Where the dataset of ``path`` is: beside it, if a crash interrupted its replacement."""
    return old_place(path) if path.name and not path.exists() and old_place(path).is_dir() else path


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
