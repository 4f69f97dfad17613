"""Tables of a dataset as they lie on disk, which a stranger may have written.

Only files below the dataset's folder are read, every row must hold what the schema says, and a picture is its own
bytes: a row that names a file or a URL instead is refused, for whoever opened it might publish what is private.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from pyarrow import parquet

from dagkit.dataset.pictures import first_line
from dagkit.dataset.schema import EARLIER_NAMES, FEATURES, LABELS, LATER, NULLABLE, PICTURES, SPLITS, empty_split
from dagkit.errors import DatasetError, WorkspaceError
from dagkit.manifests import parse_json
from dagkit.workspace import listed, open_plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset, DatasetDict

_SHARD: Final = re.compile(r"data-\d{5,}-of-\d{5,}\.arrow")
_LEADING: Final = r"[/\\:\x00]|^\.{1,2}$"
"""What makes a name lead somewhere: a separator, a drive or scheme, the folder above."""

_MAX_JSON_BYTES: Final = 16 << 20
_MAX_ROWS: Final = 10_000_000
_UNREADABLE: Final = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, RuntimeError)


def is_dataset(folder: Path) -> bool:
    """Whether a folder looks like a dataset, whole or not."""
    return (folder / "dataset_dict.json").is_file() or any((folder / "data").glob("*.parquet"))


def read_tables(folder: Path, where: str) -> DatasetDict:
    """Reads the splits of a folder that `save_dataset`, `write_parquet` or ``save_to_disk`` wrote.

    Args:
        folder: of the dataset.
        where: how messages call it.

    Returns:
        All splits of `SPLITS`, those that are not there without rows. No row leads to another file.

    Raises:
        DatasetError: a file is damaged, a column or a value is not as in the schema, or a picture is a path or a URL.
    """
    from datasets import DatasetDict

    files = sorted((folder / "data").glob("*.parquet"))
    parts = _parquet_parts(files) if files else _arrow_parts(folder, where)
    unknown = [split for split in parts if split not in SPLITS]
    if unknown or not parts:
        got = listed([*parts]) or "none"
        raise DatasetError(f"{where}: expected the splits {', '.join(SPLITS)}, but got {got}.")
    read = _read_parquet if files else _read_arrow
    return DatasetDict(
        {split: _split(split, parts[split], read, where) if split in parts else empty_split() for split in SPLITS}
    )


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no plain file, not JSON, or larger than any file of a dataset that holds JSON.
    """
    try:
        with open_plain(path) as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except WorkspaceError as error:
        raise ValueError("not a plain file") from error
    if len(data) > _MAX_JSON_BYTES:
        raise ValueError(f"larger than {_MAX_JSON_BYTES:,} bytes")
    return parse_json(data)


def _parquet_parts(files: list[Path]) -> dict[str, list[Path]]:
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(file)
    return parts


def _arrow_parts(folder: Path, where: str) -> dict[str, list[Path]]:
    """Files of each split as ``save_to_disk`` names them; a name that leads elsewhere is refused."""
    parts: dict[str, list[Path]] = {}
    try:
        for name in read_json(folder / "dataset_dict.json")["splits"]:
            parts[str(name)] = []
            if name in SPLITS:
                shards = [shard["filename"] for shard in read_json(folder / name / "state.json")["_data_files"]]
                if not all(_SHARD.fullmatch(shard) for shard in shards):
                    raise ValueError(f"{name}/state.json names {shards!r:.80} as its files")
                parts[name] = [folder / name / shard for shard in shards]
    except _UNREADABLE as error:
        raise _damaged(where, error) from error
    return parts


def _read_parquet(path: Path) -> pa.Table:
    with parquet.ParquetFile(path) as file:
        if file.metadata.num_rows > _MAX_ROWS:
            raise ValueError(f"{file.metadata.num_rows:,} rows; at most {_MAX_ROWS:,} are read")
        return file.read(columns=[*FEATURES, *EARLIER_NAMES])


def _read_arrow(path: Path) -> pa.Table:
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return table.select([name for name in (*FEATURES, *EARLIER_NAMES) if name in table.column_names])


def _split(name: str, files: list[Path], read: Callable[[Path], pa.Table], where: str) -> Dataset:
    from datasets import Dataset, DatasetInfo

    tables = []
    for path in files:
        try:
            if not path.is_file():
                raise ValueError(f"{name}: {path.name} is missing or not a plain file")
            table = read(path)
            table = table.rename_columns([EARLIER_NAMES.get(name, name) for name in table.column_names])
            table.validate(full=True)  # before anything follows an offset in it
        except _UNREADABLE as error:
            raise _damaged(where, error) from error
        for column in (name for name in LATER if name not in table.column_names):
            table = table.append_column(column, pa.nulls(len(table), pa.string()))
        if missing := [column for column in FEATURES if column not in table.column_names]:
            raise DatasetError(f"{where}: the columns {', '.join(missing)} are missing. Was it made by dagkit export?")
        tables.append(_checked(table, f"{where}: {name}"))
    whole = pa.concat_tables(tables) if tables else FEATURES.arrow_schema.empty_table()
    return Dataset(whole, info=DatasetInfo(features=FEATURES), fingerprint=secrets.token_hex(8))


def _damaged(where: str, error: Exception) -> DatasetError:
    return DatasetError(f"{where}: the dataset is damaged: {first_line(error)}. Export it again.")


def _checked(table: pa.Table, where: str) -> pa.Table:
    """A table with exactly the columns of the schema, and nothing in them that the schema does not allow."""
    columns: dict[str, pa.ChunkedArray] = {}
    paths: dict[str, pa.ChunkedArray] = {}
    for field in FEATURES.arrow_schema:
        try:
            column = table.column(field.name)
            if field.name in PICTURES:
                column, paths[field.name] = _picture_files(column, field.type)
            columns[field.name] = column.cast(field.type)
        except _UNREADABLE as error:
            expected = "image files" if field.name in PICTURES else str(field.type)
            raise DatasetError(
                f"{where}: column {field.name!r}: expected {expected:.80}, but got something else "
                f"({first_line(error)}). Export it again."
            ) from error

    def refuse(row: int, problem: str) -> DatasetError:
        key = columns["key"][row].as_py()
        return DatasetError(f"{where}: row {row if key is None else key!r:.80}: {problem}. Export it again.")

    for name, names in paths.items():
        is_leading = pc.match_substring_regex(names, _LEADING)
        is_alone = pc.and_(pc.is_valid(names), pc.is_null(pc.struct_field(columns[name], "bytes")))
        if (row := _first(pc.or_kleene(is_leading, is_alone))) is not None:
            shown = repr(names[row].as_py())
            raise refuse(
                row,
                f"its {name} is a path or URL, {shown:.120}, where the picture itself is expected; dagkit opens "
                "nothing that a dataset names",
            )
    for name, column in columns.items():
        if (found := _first_null(name, column)) is not None:
            path, row = found
            raise refuse(row, f"{path} is missing")
    label = columns["label"]
    if (row := _first(pc.or_(pc.less(label, 0), pc.greater_equal(label, len(LABELS))))) is not None:
        expected = " or ".join(f"{number} ({name})" for number, name in enumerate(LABELS))
        raise refuse(row, f"expected a label of {expected}, but got {label[row]}")
    return pa.table(columns, schema=FEATURES.arrow_schema)


def _picture_files(column: pa.ChunkedArray, kind: pa.DataType) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Of a column of pictures: the same without paths, and the paths."""
    if not pa.types.is_struct(column.type):
        raise TypeError(f"a column of {column.type}")
    names = [column.type.field(index).name for index in range(column.type.num_fields)]
    pictures, paths = [], []
    for chunk in column.chunks:
        parts = dict(zip(names, chunk.flatten(), strict=True))
        nothing = pa.nulls(len(chunk), pa.string())
        files = parts["bytes"].cast(pa.binary()) if "bytes" in parts else pa.nulls(len(chunk), pa.binary())
        pictures.append(pa.StructArray.from_arrays([files, nothing], fields=list(kind)))
        paths.append(parts["path"].cast(pa.string()) if "path" in parts else nothing)
    return pa.chunked_array(pictures, kind), pa.chunked_array(paths, pa.string())


def _first(condition: pa.ChunkedArray) -> int | None:
    """The first row for which a condition holds."""
    row: int = pc.index(condition, True).as_py()
    return None if row < 0 else row


def _first_null(path: str, values: pa.ChunkedArray | pa.Array) -> tuple[str, int] | None:
    """Where something is missing that may not be: its path, a dot leading into a column, and its position."""
    if path not in NULLABLE and (row := _first(pc.is_null(values))) is not None:
        return path, row
    if pa.types.is_struct(values.type):
        for field in values.type:
            if (found := _first_null(f"{path}.{field.name}", pc.struct_field(values, field.name))) is not None:
                return found
    if pa.types.is_list(values.type):
        lists = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if (found := _first_null(path, pc.list_flatten(lists))) is not None:
            return found[0], pc.list_parent_indices(lists)[found[1]].as_py()
    return None
