from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from dagkit.errors import DatasetError
from dagkit.evaluation import PRESETS, read_prompts
from dagkit.seeds import FIRST_EVALUATION_SEED

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


def test_seeds_are_exact_and_none_is_lost(tmp_path: Path) -> None:
    seeds = ["9007199254740993", "12.0", "9223372036854775807", ""]
    prompts = read_prompts(write_csv(tmp_path / "p.csv", [{"prompt": "a", "seed": seed} for seed in seeds]))
    assert [one.seed for one in prompts] == [2**53 + 1, 12, 2**63 - 1, FIRST_EVALUATION_SEED + 3]


DAMAGED = {
    "more cells than columns": (".csv", b"prompt,seed\na,1,2\n", "line 2: more cells than the table has columns"),
    "seed without end": (".csv", b"prompt,seed\na,inf\n", "row 1: seed must be a whole number, but got 'inf'"),
    "half a seed": (".csv", b"prompt,seed\na,1.5\n", "row 1: seed must be a whole number, but got '1.5'"),
    "long seed": (".csv", b"prompt,seed\na," + b"9" * 6000, "row 1: seed must be a whole number"),
    "open quote": (".csv", b'prompt\n"a\n', "cannot be read as csv: unexpected end of data"),
    "long prompt": (".csv", b"prompt\n" + b"x" * 20_000, "row 1: a prompt must have at most 10,000 characters"),
    "longer prompt": (".csv", b"prompt\n" + b"x" * 200_000, "cannot be read as csv: field larger"),
    "NUL": (".csv", b"prompt\na\0b\n", r"row 1: the character '\x00' cannot stand in a prompt"),
    "no UTF-8": (".csv", b"prompt\n\xff\n", "cannot be read as csv: 'utf-8' codec can't decode"),
    "many columns": (".csv", b",".join(b"c%d" % n for n in range(30_000)) + b"\n1\n", "expected a column with prompts"),
    "long kind": (".csv", b"prompt,kind\na," + b"k" * 50_000, "kind must be one of named, hinted, safe, but got 'kkk"),
    "a number": (".jsonl", b'{"prompt": 5}', "row 1: a prompt must be a text, but got 5"),
    "an object": (".jsonl", b'{"prompt": {"a": 1}}', "row 1: a prompt must be a text, but got {'a': 1}"),
    "nothing in a list": (".jsonl", b'{"prompt": []}', "row 1: a prompt must be a text, but got []"),
    "surrogate": (".jsonl", rb'{"prompt": "\ud800"}', r"row 1: the character '\ud800' cannot stand in a prompt"),
    "surrogate to keep": (".jsonl", rb'{"prompt": "a", "keep": ["\ud800"]}', "row 1: keep must be words"),
    "object to keep": (".jsonl", b'{"prompt": "a", "keep": {"a": 1}}', "row 1: keep must be words"),
    "nan": (".jsonl", b'{"prompt": "a", "seed": NaN}', "row 1: seed must be a whole number, but got nan"),
    "list for a seed": (".jsonl", b'{"prompt": "a", "seed": [1]}', "row 1: seed must be a whole number, but got [1]"),
    "list for a kind": (".jsonl", b'{"prompt": "a", "kind": ["x"]}', "row 1: kind must be one of"),
    "deep": (".jsonl", b'{"prompt":' + b"[" * 100_000, "cannot be read as jsonl: maximum recursion depth"),
    "long number": (".jsonl", b'{"prompt": "a", "seed":' + b"9" * 6000 + b"}", "cannot be read as jsonl: line 1: "),
    "no table": (".parquet", b"PAR1" + b"x" * 50 + b"PAR1", "cannot be read as parquet: "),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tables_are_named(tmp_path: Path, name: str) -> None:
    suffix, data, expected = DAMAGED[name]
    (tmp_path / f"p{suffix}").write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        read_prompts(str(tmp_path / f"p{suffix}"))
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_rows_of_other_columns_are_no_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"text": "b"}, {"prompt": None}]
    assert [one.text for one in read_prompts(write_jsonl(tmp_path / "p.jsonl", rows))] == ["a"]


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("prompt\n")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source, message in (
        (str(tmp_path / "none.csv"), "no such file of prompts"),
        (str(tmp_path / "empty.csv"), "the table has no rows"),
        (str(tmp_path / "bad.jsonl"), "cannot be read as jsonl: line 2: expected an object, but got list"),
        (str(tmp_path / "bad.parquet"), "cannot be read as parquet"),
        ("prompts.txt", "is no source of prompts. Expected a .csv"),
        ("unlearndiffatk", "not on the Hub. Download their CSV"),
        (str(tmp_path / "pipe.csv"), "not a plain file of prompts"),
        (f"{'x' * 5000}.csv", "no such file of prompts"),
        ("x" * 5000, "is no source of prompts"),
        (f"org/{'n' * 5000}", "is no source of prompts"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_prompts(source)
    with pytest.raises(DatasetError, match=r"'i2q' is not a preset of prompts\. Available: i2p"):
        read_prompts("x.csv", preset="i2q")
