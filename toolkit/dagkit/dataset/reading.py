"""Datasets from disk, from the wheel or from the Hub, checked against their fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dagkit.dataset import hub
from dagkit.dataset.pictures import image_of, mask_of, undecoded
from dagkit.dataset.replacing import old_place
from dagkit.dataset.schema import LABELS
from dagkit.dataset.summary import SUMMARY, counted, fingerprint, read_summary_file
from dagkit.dataset.tables import is_dataset, read_tables
from dagkit.errors import DatasetError
from dagkit.resources import shipped_folder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


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
        if summary["fingerprint"] != fingerprint(dataset) or counted(dataset) != (
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
