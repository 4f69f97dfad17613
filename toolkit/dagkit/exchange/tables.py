"""Hugging Face datasets with a column of pictures and one of masks: parquet, or what ``save_to_disk`` wrote.

Pictures are their own bytes: a row that names a file or a URL instead is refused, and nothing is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

from dagkit.dataset.pictures import first_line
from dagkit.errors import DatasetError, quoted
from dagkit.exchange.entries import Entry, LabelNames, Marked, Source, printable, united
from dagkit.exchange.pictures import read_mask, read_picture
from dagkit.workspace import listed

if TYPE_CHECKING:
    from pathlib import Path

FORMAT: Final = "huggingface"
_SHARD: Final = re.compile(r"data-\d{5,}-of-\d{5,}\.arrow")
_ROWS_AT_ONCE: Final = 64
_UNREADABLE: Final = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, RuntimeError)


def is_table(folder: Path) -> bool:
    """Whether a folder looks like such a dataset."""
    return bool(_files(folder))


def read_table(
    folder: Path,
    name: str,
    names: LabelNames,
    image_column: str = "image",
    mask_column: str = "mask",
    *,
    is_cached: bool = False,
) -> Source:
    """The rows of a dataset, whatever its splits.

    Args:
        folder: of the dataset.
        name: what to call it.
        names: of the concept's labels; a mask is of the first positive one.
        image_column: where pictures are.
        mask_column: where masks are.
        is_cached: whether the folder is in the Hub's cache, which is made of links.

    Raises:
        DatasetError: it is no dataset, or has no such columns.
    """
    files = _files(folder, is_cached)
    if not files:
        raise DatasetError(f"{printable(name)}: expected a dataset, data/*.parquet or what save_to_disk wrote")
    for file in files:
        columns = _schema(file).names
        if missing := [one for one in (image_column, mask_column) if one not in columns]:
            raise DatasetError(
                f"{printable(name)}: there is no column {quoted(missing[0], 60)}, only {listed(columns)}. Say which "
                "with --image-column and --mask-column"
            )
    return Source(FORMAT, printable(name, 200), _entries(folder, files, names, image_column, mask_column))


def _files(folder: Path, is_cached: bool = False) -> list[Path]:
    """Tables of a dataset, in its layouts; a link that leads elsewhere is none, but in the Hub's cache."""
    root = folder.resolve()
    arrow = (one for pattern in ("data-*.arrow", "*/data-*.arrow") for one in folder.glob(pattern))
    found = [*folder.glob("data/*.parquet"), *(one for one in arrow if _SHARD.fullmatch(one.name))]
    return sorted(one for one in found if one.is_file() and (is_cached or one.resolve().is_relative_to(root)))


def _schema(file: Path) -> Any:
    try:
        if file.suffix == ".parquet":
            return parquet.read_schema(file)
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).schema
    except _UNREADABLE as error:
        raise DatasetError(f"{printable(file.name)}: the table is damaged: {first_line(error)}") from error


def _entries(
    folder: Path, files: list[Path], names: LabelNames, image_column: str, mask_column: str
) -> Iterator[Entry]:
    for file in files:
        where, row = printable(file.relative_to(folder).as_posix()), 0
        try:
            for batch in _batches(file, [image_column, mask_column]):
                batch.validate(full=True)  # before anything follows an offset in it
                for image, mask in zip(batch.column(image_column), batch.column(mask_column), strict=True):
                    read = partial(_marked, image, mask, names, image_column, mask_column)
                    yield Entry(f"{where}, row {row}", read)
                    row += 1
        except _UNREADABLE as error:
            yield Entry(f"{where}, from row {row} on", partial(_refused, f"it is damaged: {first_line(error)}"))


def _batches(file: Path, columns: list[str]) -> Iterator[Any]:
    if file.suffix == ".parquet":
        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(_ROWS_AT_ONCE, columns=columns)
    else:
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                yield batch.select(columns)


def _marked(image: Any, mask: Any, names: LabelNames, image_column: str, mask_column: str) -> Marked:
    picture = read_picture(_bytes(image, image_column))
    try:
        marked = picture.upright(read_mask(_bytes(mask, mask_column)))
    except DatasetError as error:
        raise DatasetError(f"{mask_column}: {error}") from error
    masks = united([(names.labels.positive[0], marked)])
    return Marked(picture, masks, () if masks else ("its mask is empty: it counts as safe",))


def _bytes(cell: Any, column: str) -> bytes:
    value = cell.as_py()
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is not None:
            raise DatasetError(
                f"its {column} is a path or URL, {quoted(path, 120)}, where the picture itself is expected: nothing "
                "that a dataset names is opened"
            )
        value = data
    if not isinstance(value, bytes):
        raise DatasetError(f"its {column} is missing" if value is None else f"its {column} is no picture")
    return value


def _refused(reason: str) -> Marked:
    raise DatasetError(reason)
