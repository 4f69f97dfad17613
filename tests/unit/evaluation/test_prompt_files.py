from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dagkit.errors import DatasetError
from dagkit.evaluation import PRESETS, read_prompts

ROWS = [
    {"prompt": "a cat,  in danger", "seed": 7, "keep": "cat", "kind": "hinted"},
    {"prompt": "a bomb", "seed": 8, "keep": "", "kind": "named"},
    {"prompt": "a dog and a cup", "seed": 9, "keep": "dog, cup", "kind": "safe"},
]


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_three_formats_say_the_same(tmp_path: Path, write: object) -> None:
    suffix = write.__name__.removeprefix("write_")  # type: ignore[attr-defined]
    prompts = read_prompts(write(tmp_path / f"prompts.{suffix}", ROWS))  # type: ignore[operator]
    assert [(one.key, one.text, one.seed, one.keep) for one in prompts] == [
        ("named-0000", "a bomb", 8, ()),
        ("hinted-0000", "a cat, in danger", 7, ("cat",)),
        ("safe-0000", "a dog and a cup", 9, ("dog", "cup")),
    ]


def test_presets_map_columns_seeds_and_kinds(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "sd_seed": 5, "categories": "sexual, shocking"},
        {"prompt": "q", "sd_seed": 6, "categories": "hate"},
    ]
    source = write_csv(tmp_path / "i2p.csv", rows)
    prompts = read_prompts(source, preset="i2p", categories=["sexual"])
    assert [(one.text, one.seed, one.kind) for one in prompts] == [("p", 5, "hinted")]
    captions = write_jsonl(tmp_path / "coco.jsonl", [{"captions": ["a dog runs.", "a dog"], "coco_url": "x"}])
    assert [(one.text, one.kind) for one in read_prompts(captions, preset="coco")] == [("a dog runs.", "safe")]
    attack = write_csv(tmp_path / "attack.csv", [{"target_prompt": "t", "adv_prompt": "x1 y2"}])
    assert read_prompts(attack, preset="mma_diffusion")[0].text == "x1 y2"
    own = write_csv(tmp_path / "nudity.csv", [{"case_number": 1, "prompt": "p", "evaluation_seed": 12.0}])
    assert read_prompts(own, preset="unlearndiffatk")[0].seed == 12
    assert set(PRESETS) == {"i2p", "coco", "unlearndiffatk", "ring_a_bell", "mma_diffusion"}


def test_seeds_are_drawn_where_there_are_none_and_kind_can_be_forced(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "p.csv", [{"text": f"prompt {index}"} for index in range(4)])
    prompts = read_prompts(source, kind="named", limit=3)
    assert [one.kind for one in prompts] == ["named"] * 3
    assert len({one.seed for one in prompts}) == 3
    assert min(one.seed for one in prompts) >= 1_000_000_000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"words": "a", "seed": 1}],
            r"expected a column with prompts \(prompt or caption or text\), but the columns are words, seed",
        ),
        ([{"prompt": "a", "seed": "x"}], "row 1: seed must be a whole number, but got 'x'"),
        ([{"prompt": "a", "seed": -4}], r"row 1: seed must be in \[0, 2\*\*63\), but got -4"),
        ([{"prompt": "a", "kind": "unsafe"}], "row 1: kind must be one of named, hinted, safe, but got 'unsafe'"),
        ([{"prompt": "  "}], "no prompt is left of 1 rows"),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_prompts(write_csv(tmp_path / "p.csv", rows))


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("prompt\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source, message in (
        (str(tmp_path / "none.csv"), "no such file of prompts"),
        (str(tmp_path / "empty.csv"), "the table has no rows"),
        (str(tmp_path / "bad.jsonl"), "cannot be read as jsonl: line 2: expected an object, but got list"),
        (str(tmp_path / "bad.parquet"), "cannot be read as parquet"),
        ("prompts.txt", "is no source of prompts. Expected a .csv"),
        ("unlearndiffatk", "not on the Hub. Download their CSV"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_prompts(source)
    with pytest.raises(DatasetError, match=r"'i2q' is not a preset of prompts\. Available: i2p"):
        read_prompts("x.csv", preset="i2q")
