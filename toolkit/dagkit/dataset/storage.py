"""Datasets on disk: written whole or not at all, and checked against their fingerprint when they are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dagkit._version import __version__
from dagkit.dataset.card import dataset_card
from dagkit.dataset.schema import FEATURES, LABELS, REVIEW_STATES, SPLITS, empty_split
from dagkit.errors import DatasetError
from dagkit.resources import shipped_folder
from dagkit.workspace import sha256_json

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from dagkit.concept import Concept

SUMMARY: Final = "dataset.json"
CARD: Final = "README.md"
_FORMAT: Final = 1
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
        DatasetError: a mask is not as large as its image.
    """
    rows = []
    for row in split.select_columns(["key", "image", "mask", "prompt", "label"]):
        image, mask = row["image"].convert("RGB"), np.asarray(row["mask"].convert("L")) > 127
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
    """
    from datasets import Image as ImageFeature

    rows = []
    for split in sorted(dataset):
        columns = dataset[split].select_columns(["key", "image", "mask", "prompt", "label", "review_state"])
        columns = columns.cast_column("image", ImageFeature(decode=False))
        for row in columns:
            mask = np.asarray(row["mask"].convert("L")) > 127
            rows.append(
                [
                    split,
                    row["key"],
                    hashlib.sha256(_image_bytes(row["image"])).hexdigest(),
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
    columns = {
        split: dataset[split].select_columns(["label", "review_state", "model", "model_fingerprint", "agreement"])
        for split in SPLITS
    }
    counts = {
        split: {label: rows["label"].count(index) for index, label in enumerate(LABELS)}
        for split, rows in ((split, table[:]) for split, table in columns.items())
    }
    rows = [row for table in columns.values() for row in table]
    states = Counter(row["review_state"] for row in rows)
    agreements = [row["agreement"] for row in rows if row["agreement"] is not None]
    return {
        "format": _FORMAT,
        "concept": concept.name,
        "summary": concept.summary,
        "labels": concept.labels.model_dump(),
        "fingerprint": fingerprint(dataset),
        "counts": counts,
        "review_states": {state: states[state] for state in REVIEW_STATES if states[state]},
        "is_reviewed": states["unreviewed"] == 0,
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


def save_dataset(dataset: DatasetDict, path: Path, summary: Mapping[str, Any]) -> None:
    """Writes a dataset with card and summary by ``save_to_disk``, in place of an older one if there is one.

    Splits without rows are left out, because ``load_from_disk`` cannot read them; `load_dataset` puts them back.

    Args:
        dataset: as from `build`.
        path: its folder; there is a whole dataset in it at any time but an instant, and nothing else is touched.
        summary: as from `summarise`.
    """
    from datasets import DatasetDict

    with _replacement(path) as folder:
        DatasetDict({split: rows for split, rows in dataset.items() if len(rows)}).save_to_disk(folder)
        _describe(dataset, folder, summary)


def write_parquet(dataset: DatasetDict, path: Path, summary: Mapping[str, Any]) -> None:
    """Writes a dataset with card and summary as the Hub lays it out: ``data/<split>-00000-of-00001.parquet``.

    Splits without rows are left out, as by `save_dataset`.
    """
    with _replacement(path) as folder:
        (folder / "data").mkdir()
        for split in SPLITS:
            if len(dataset[split]):
                _write_table(dataset[split], folder / "data" / f"{split}-00000-of-00001.parquet")
        _describe(dataset, folder, summary)


def push_dataset(dataset: DatasetDict, to: str, summary: Mapping[str, Any], *, private: bool = True) -> str:
    """Publishes a dataset: ``hf://owner/name`` on the Hub, or any folder in the Hub's layout.

    Args:
        dataset: as from `build` or `load_dataset`.
        to: where.
        summary: as from `summarise` or `read_summary`.
        private: whether a new repository on the Hub is private.

    Returns:
        Where it is now.

    Raises:
        DatasetError: the Hub refused.
    """
    if not to.startswith("hf://"):
        write_parquet(dataset, Path(to), summary)
        return to
    from datasets import DatasetDict
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repository = to.removeprefix("hf://")
    try:
        whole = DatasetDict({split: rows for split, rows in dataset.items() if len(rows)})
        whole.push_to_hub(repository, private=private)
        with tempfile.TemporaryDirectory() as folder:
            _describe(dataset, Path(folder), summary)
            HfApi().upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder)
    except HfHubHTTPError as error:
        raise DatasetError(
            f"{to}: the Hub refused ({error.response.status_code}). Is the name right, and are you logged in? "
            "See: hf auth login"
        ) from error
    return to


def find_dataset(path: str | Path) -> Path:
    """Where a dataset lies: the folder as given, or else one that ships with dagkit.

    Args:
        path: a folder, or the name of a shipped dataset with or without ``datasets/`` before it: ``weapon-demo``.
    """
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

    Args:
        path: a folder that `save_dataset`, `write_parquet` or ``save_to_disk`` wrote, the name of one that ships
            (`find_dataset`), or ``hf://owner/name``.

    Returns:
        ``train``, ``validation`` and ``test``, the latter two possibly without rows.

    Raises:
        DatasetError: there is none, it is damaged, lacks columns, or was changed after it was exported.
    """
    from datasets import DatasetDict, load_from_disk
    from datasets import load_dataset as load_from_hub

    text = str(path)
    if text.startswith("hf://"):
        try:
            found = dict(load_from_hub(text.removeprefix("hf://")))
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{text}: cannot be fetched from the Hub: {_first_line(error)}. Check the name."
            ) from error
        return _checked(DatasetDict(found), text)

    folder = _current(find_dataset(path))
    parquet = sorted((folder / "data").glob("*.parquet"))
    if not (folder / "dataset_dict.json").is_file() and not parquet:
        raise DatasetError(
            f"{folder}: no dataset. Expected a folder with dataset_dict.json or data/*.parquet. "
            f"Write one with: dagkit export. These ship with dagkit: {', '.join(shipped_datasets()) or 'none'}."
        )
    try:
        if parquet:
            files: dict[str, list[Path]] = {}
            for file in parquet:
                files.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(file)
            found = {split: _read_table(parts) for split, parts in files.items()}
        else:
            found = dict(load_from_disk(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DatasetError(f"{folder}: the dataset is damaged: {_first_line(error)}. Export it again.") from error
    dataset = _checked(DatasetDict(found), str(folder))
    if (folder / SUMMARY).is_file():
        expected = read_summary(folder)["fingerprint"]
        if expected != fingerprint(dataset):
            raise DatasetError(
                f"{folder}: the rows do not match the fingerprint in {SUMMARY}: they were changed after the export. "
                f"Export again; if the change was meant, delete {SUMMARY}."
            )
    return dataset


def read_summary(path: str | Path) -> dict[str, Any]:
    """What the ``dataset.json`` of a folder, or of a dataset that ships, says.

    Raises:
        DatasetError: it is missing or no such file.
    """
    file = find_dataset(path) / SUMMARY
    try:
        summary = json.loads(file.read_bytes())
        if summary["format"] != _FORMAT:
            raise DatasetError(
                f"{file}: expected format {_FORMAT}, but got {summary['format']!r}. "
                "Install a newer dagkit, or export again."
            )
        _ = summary["fingerprint"]
    except FileNotFoundError as error:
        raise DatasetError(f"{file}: no such file. Export the dataset again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file}: not a summary of a dataset ({_first_line(error)}). Export it again.") from error
    return dict(summary)


def read_splits(path: Path) -> dict[str, str]:
    """Key -> split of a dataset on disk; empty where there is none."""
    folder = _current(path)
    if not (folder / "dataset_dict.json").is_file() and not (folder / "data").is_dir():
        return {}
    return {key: split for split, rows in load_dataset(path).items() for key in rows["key"]}


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _current(path: Path) -> Path:
    """Where the dataset of ``path`` is: beside it, if a crash interrupted its replacement."""
    return _old(path) if not path.exists() and _old(path).is_dir() else path


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        _flush(folder)
        if path.exists():
            shutil.rmtree(_old(path), ignore_errors=True)
            path.rename(_old(path))
        folder.rename(path)
        shutil.rmtree(_old(path), ignore_errors=True)
    except OSError as error:
        raise DatasetError(
            f"{path}: the dataset cannot be written: {error.strerror or error}. The older one, if any, is still there. "
            "Free some space or choose another --workspace, and run the same command again."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Waits until every file below a folder lies on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _describe(dataset: DatasetDict, folder: Path, summary: Mapping[str, Any]) -> None:
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(dataset_card(dataset, summary), encoding="utf-8")


def _checked(dataset: DatasetDict, where: str) -> DatasetDict:
    from datasets import DatasetDict

    unknown = [split for split in dataset if split not in SPLITS]
    if "train" not in dataset or unknown:
        raise DatasetError(f"{where}: expected the splits {', '.join(SPLITS)}, but got {', '.join(dataset) or 'none'}.")
    missing = [name for name in FEATURES if name not in dataset["train"].column_names]
    if missing:
        raise DatasetError(f"{where}: the columns {', '.join(missing)} are missing. Was it made by dagkit export?")
    return DatasetDict({split: dataset.get(split, empty_split()) for split in SPLITS})


def _write_table(split: Dataset, path: Path) -> None:
    """Streams one split to parquet, with image files read in."""
    from datasets.table import embed_table_storage
    from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

    rows = split.with_format("arrow")
    with ParquetWriter(path, FEATURES.arrow_schema) as writer:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            writer.write_table(embed_table_storage(rows[start : start + _ROWS_AT_ONCE]))


def _read_table(files: list[Path]) -> Dataset:
    from datasets import Dataset
    from pyarrow import concat_tables, parquet  # type: ignore[import-untyped]

    return Dataset(concat_tables([parquet.read_table(file) for file in files]))


def _image_bytes(image: Mapping[str, Any]) -> bytes:
    data: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return data


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
