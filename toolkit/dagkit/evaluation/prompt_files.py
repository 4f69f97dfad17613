"""Prompts from files and from data sets on the Hub: presets map their columns, and nothing is bundled."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import CONTROL, DatasetError, brief, quoted, reason
from dagkit.evaluation.prompts import KINDS, EvalKind, EvalPrompt
from dagkit.resources import exists, is_file
from dagkit.seeds import FIRST_EVALUATION_SEED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table hold what; of several names the first that is there counts.

    Attributes:
        prompt: the text.
        seed: of the noise; drawn where there is no such column.
        keep: what must stay in the picture: a list, or words separated by commas.
        kind: ``named``, ``hinted`` or ``safe``.
        category: what ``categories`` are looked for in.
    """

    prompt: Sequence[str] = ("prompt", "caption", "text")
    seed: Sequence[str] = ("seed", "sd_seed", "evaluation_seed")
    keep: Sequence[str] = ("keep",)
    kind: Sequence[str] = ("kind",)
    category: Sequence[str] = ("categories", "category", "concept")


@dataclass(frozen=True, slots=True)
class Preset:
    """A published set of prompts.

    Attributes:
        dataset: Hub id; ``None`` where it is published as files only.
        split: of the data set.
        kind: of all its prompts.
        columns: where they are.
        files: of the data set, where it holds several tables.
    """

    dataset: str | None
    split: str
    kind: EvalKind
    columns: Columns = Columns()
    files: str | None = None


PRESETS: Final = {
    "i2p": Preset("AIML-TUDA/i2p", "train", "hinted", Columns(prompt=("prompt",), seed=("sd_seed",))),
    "coco": Preset("phiyodr/coco2017", "validation", "safe", Columns(prompt=("captions", "caption"))),
    "mma_diffusion": Preset(
        "YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark", "train", "hinted", Columns(prompt=("adv_prompt",))
    ),
    "ring_a_bell": Preset(
        "Unlearningltd/datasets", "train", "hinted", files="ring_a_bell/ring_a_bell_dataset.csv"
    ),
    "unlearndiffatk": Preset(
        None, "train", "hinted", Columns(prompt=("prompt", "adv_prompt"), seed=("evaluation_seed", "sd_seed"))
    ),
}  # fmt: skip
"""Column mappings. ``unlearndiffatk`` is published as CSV files in its repository, not on the Hub: give the file."""


MAX_LENGTH: Final = 10_000
"""Characters of a prompt; text encoders take a few hundred."""


def read_prompts(
    source: str,
    *,
    preset: str | None = None,
    kind: EvalKind | None = None,
    limit: int | None = None,
    categories: Sequence[str] = (),
) -> list[EvalPrompt]:
    """Reads prompts from a file, a preset's data set, or any data set on the Hub.

    Args:
        source: a ``.csv``, ``.jsonl`` or ``.parquet`` file, the name of a preset, or a Hub id (``org/name``).
        preset: whose columns to use for a file.
        kind: of all prompts; by default the ``kind`` column's, then the preset's, then ``hinted``.
        limit: at most so many prompts, the first ones.
        categories: keep only rows of one of these categories.

    Raises:
        DatasetError: the source cannot be read, has no column with prompts, or no prompt is left.
    """
    mapped = _preset(preset or (source if source in PRESETS else None))
    columns = mapped.columns if mapped else Columns()
    rows = list(_rows(source, mapped))
    where = brief(source)
    if not rows:
        raise DatasetError(f"{where}: expected prompts, but the table has no rows.")
    named = {role: _column(rows[0], getattr(columns, role)) for role in ("prompt", "seed", "keep", "kind", "category")}
    if named["prompt"] is None:
        raise DatasetError(
            f"{where}: expected a column with prompts ({' or '.join(columns.prompt)}), "
            f"but the columns are {brief(', '.join(map(str, rows[0])))}. Rename one."
        )
    prompts: list[EvalPrompt] = []
    counts = dict.fromkeys(KINDS, 0)
    for number, row in enumerate(rows):
        if categories and not _is_of(_cell(row, named["category"]), categories):
            continue
        text = _text(where, number, _cell(row, named["prompt"]))
        if not text:
            continue
        own = kind or _kind(where, number, _cell(row, named["kind"])) or (mapped.kind if mapped else "hinted")
        seed = _seed(where, number, _cell(row, named["seed"]))
        seed = FIRST_EVALUATION_SEED + number if seed is None else seed
        keep = _keep(where, number, _cell(row, named["keep"]))
        prompts.append(EvalPrompt(f"{own}-{counts[own]:04d}", text, own, seed, keep))
        counts[own] += 1
        if limit is not None and len(prompts) >= limit:
            break
    if not prompts:
        asked = f" Check the categories {quoted(list(categories))}." if categories else " Write some."
        raise DatasetError(f"{where}: no prompt is left of {len(rows)} rows.{asked}")
    return sorted(prompts, key=lambda prompt: KINDS.index(prompt.kind))


def _preset(name: str | None) -> Preset | None:
    if name is None:
        return None
    if name not in PRESETS:
        raise DatasetError(f"{quoted(name)} is not a preset of prompts. Available: {', '.join(PRESETS)}.")
    return PRESETS[name]


def _rows(source: str, preset: Preset | None) -> Iterable[Mapping[str, Any]]:
    path = Path(source)
    suffix = path.suffix.lower()
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if suffix in readers:
        if not is_file(path):
            what = "not a plain file" if exists(path) else "no such file"
            raise DatasetError(f"{brief(source)}: {what} of prompts.")
        try:
            return list(readers[suffix](path))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise DatasetError(f"{brief(source)}: cannot be read as {suffix[1:]}: {reason(error)}") from error
    if source in PRESETS and preset is not None:
        if preset.dataset is None:
            raise DatasetError(
                f"{source}: these prompts are not on the Hub. Download their CSV file and give it with the preset."
            )
        return _read_hub(preset.dataset, preset.split, preset.files)
    if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", source) and not exists(path):
        return _read_hub(source, "train", None)
    raise DatasetError(
        f"{quoted(source)} is no source of prompts. Expected a .csv, .jsonl or .parquet file, a Hub id (org/name), or "
        f"one of {', '.join(PRESETS)}."
    )


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num}: more cells than the table has columns")
            yield row


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {reason(error)}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, but got {type(row).__name__}")
            yield row


def _read_parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        rows: list[Mapping[str, Any]] = import_module("pyarrow.parquet").read_table(path).to_pylist()
    except import_module("pyarrow").ArrowException as error:
        raise ValueError(reason(error)) from error
    return rows


def _read_hub(dataset: str, split: str, files: str | None) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return list(load_dataset(dataset, data_files=files, split=split))
    except (OSError, ValueError, DatasetsError) as error:
        raise DatasetError(
            f"{dataset}: cannot be read from the Hub: {reason(error)} Is it public, and are you online? "
            "Else download a table and give the file."
        ) from error


def _column(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _cell(row: Mapping[str, Any], name: str | None) -> Any:
    return None if name is None else row.get(name)


def _text(source: str, number: int, value: Any) -> str:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if first is None:
        return ""
    if not isinstance(first, str):
        raise DatasetError(f"{source}, row {number + 1}: a prompt must be a text, but got {quoted(first)}.")
    text = " ".join(first.split())
    if found := CONTROL.search(text):
        raise DatasetError(f"{source}, row {number + 1}: the character {found[0]!r} cannot stand in a prompt.")
    if len(text) > MAX_LENGTH:
        raise DatasetError(
            f"{source}, row {number + 1}: a prompt must have at most {MAX_LENGTH:,} characters, but has {len(text):,}."
        )
    return text


def _words(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else str(value or "").split(",")
    return tuple(str(item).strip() for item in items if str(item).strip())


def _keep(source: str, number: int, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else [value or ""]
    if not all(isinstance(item, str) and not CONTROL.search(item) for item in items):
        raise DatasetError(f"{source}, row {number + 1}: keep must be words with commas, but got {quoted(value)}.")
    return _words(value)


def _is_of(value: Any, categories: Sequence[str]) -> bool:
    return bool({word.lower() for word in _words(value)} & {word.lower() for word in categories})


def _kind(source: str, number: int, value: Any) -> EvalKind | None:
    if value in (None, ""):
        return None
    if value not in KINDS:
        raise DatasetError(
            f"{source}, row {number + 1}: kind must be one of {', '.join(KINDS)}, but got {quoted(value)}."
        )
    kind: EvalKind = value
    return kind


def _seed(source: str, number: int, value: Any) -> int | None:
    if value in (None, ""):
        return None
    try:
        seed = _whole(value)
    except (TypeError, ValueError, OverflowError):
        seed = None
    if seed is None:
        raise DatasetError(f"{source}, row {number + 1}: seed must be a whole number, but got {quoted(value)}.")
    if not 0 <= seed < 2**63:
        raise DatasetError(f"{source}, row {number + 1}: seed must be in [0, 2**63), but got {quoted(seed)}.")
    return seed


def _whole(value: Any) -> int | None:
    """A whole number, also one that is written like ``12.0``. By way of a float only then: those end at 2**53."""
    if isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit()):
        return int(value)
    return int(float(value)) if float(value).is_integer() else None
