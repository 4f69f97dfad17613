"""Datasets that somebody else wrote, or that came to harm: one clear line, and nothing opened, fetched or written."""

import io
import json
import os
import random
import re
import shutil
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from click.testing import CliRunner
from datasets import DatasetDict
from PIL import Image
from pyarrow import parquet

from dagkit import dataset
from dagkit.cli import command
from dagkit.concept import Concept, load_concept
from dagkit.dataset.schema import FEATURES
from dagkit.errors import DagkitError, DatasetError
from drawn_workspace import draw_workspace

datasets.disable_progress_bars()
Rows = list[dict[str, Any]]
SPLIT = "train"
PARQUET = f"data/{SPLIT}-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("weapon")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, concept: Concept) -> Path:
    """One dataset, exported and pushed: ``arrow`` and ``parquet``."""
    root = tmp_path_factory.mktemp("whole")
    workspace = draw_workspace(root / "runs", concept, 5, 3)
    built = dataset.build(dataset.collect(workspace, concept, accept_unreviewed=True), concept)
    summary = dataset.summarise(built, concept)
    dataset.save_dataset(built, root / "arrow", summary)
    dataset.write_parquet(built, root / "parquet", summary)
    return root


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the dataset without its summary, so that no fingerprint stands before what is tested."""

    def copied(kind: str = "parquet", *, with_summary: bool = False) -> Path:
        folder = tmp_path / "stranger"
        shutil.copytree(whole / kind, folder)
        if not with_summary:
            (folder / "dataset.json").unlink()
        return folder

    return copied


def rows_of(folder: Path) -> Rows:
    return parquet.read_table(folder / PARQUET).to_pylist()


def write(folder: Path, rows: Rows, kind: str = "parquet", schema: pa.Schema | None = None) -> None:
    """Puts rows into the train split, as any tool could: what they say is not looked at."""
    write_table(folder, pa.Table.from_pylist(rows, schema=schema or FEATURES.arrow_schema), kind)


def write_table(folder: Path, table: pa.Table, kind: str) -> None:
    if kind == "parquet":
        parquet.write_table(table, folder / PARQUET)
        return
    [shard] = (folder / SPLIT).glob("*.arrow")
    with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def use(path: Path) -> None:
    """All that is done with a dataset."""
    loaded = dataset.load_dataset(path)
    dataset.check(loaded)
    dataset.summarise(loaded, load_concept("weapon"))
    for split in loaded.values():
        dataset.examples(split)


def refused(path: Path) -> str:
    """The one line with which a dataset is refused, by loading and by the commands; nothing was written."""
    with pytest.raises(DatasetError) as caught:
        use(path)
    message = str(caught.value)
    assert len(message) < 800 + len(str(path))
    assert "\n" not in message
    target = path.parent / "pushed"
    for arguments in (["check", path], ["push", target, path]):
        result = CliRunner().invoke(command, ["dataset", *map(str, arguments)])
        assert result.exit_code == 1
        assert isinstance(result.exception, DatasetError | SystemExit), result.exception
    assert not target.exists()
    assert not list(path.parent.glob(".*"))
    return message


# What leads elsewhere


@pytest.fixture(scope="module")
def opened() -> Iterator[set[str]]:
    """Names of the files that Python opens while this is in use."""
    names: set[str] = set()
    is_on = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on[0] and event == "open":
            names.add(str(arguments[0]))

    sys.addaudithook(watch)  # for good: there is no way to take one off
    yield names
    is_on[0] = False


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A picture on loopback, and who asked for it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(Image.new("RGB", (64, 64), "red")))

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Silent."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/private.png", asked
    running.shutdown()
    running.server_close()
    thread.join()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["image", "mask"])
@pytest.mark.parametrize("has_bytes", [False, True])
def test_a_row_that_names_a_file_or_a_url_is_refused_unread(
    kind: str,
    column: str,
    has_bytes: bool,
    copy: Callable[..., Path],
    whole: Path,
    tmp_path: Path,
    server: tuple[str, list[str]],
    opened: set[str],
    monkeypatch: pytest.MonkeyPatch,
):
    private = tmp_path / "private.png"
    private.write_bytes(png(Image.new("RGB", (64, 64), "red")))
    monkeypatch.chdir(tmp_path)
    url, asked = server
    folder = copy(kind)
    rows = rows_of(whole / "parquet")
    own = rows[1][column]["bytes"] if has_bytes else None
    leading = [str(private), f"file://{private}", url, "../private.png", f"zip://x.png::{url}", "C:\\private.png", ".."]
    for path in leading if has_bytes else [*leading, "private.png"]:  # without bytes, a plain name is a path as well
        opened.clear()
        write(folder, [rows[0], {**rows[1], column: {"bytes": own, "path": path}}], kind)
        message = refused(folder)
        assert f"train: row {rows[1]['key']!r}: its {column} is a path or URL, {path!r}" in message
        assert not {name for name in opened if name.endswith("private.png")}
    assert asked == []


def test_a_column_of_paths_is_refused(copy: Callable[..., Path], server: tuple[str, list[str]]):
    folder, (url, asked) = copy(), server
    rows = [{**row, "image": url} for row in rows_of(folder)]
    schema = FEATURES.arrow_schema.set(1, pa.field("image", pa.string()))
    write(folder, rows, schema=schema)
    assert "column 'image': expected image files, but got something else (a column of string)" in refused(folder)
    folder = folder / PARQUET
    table = parquet.read_table(folder)
    only_paths = pa.array([{"path": url}] * len(rows), pa.struct([("path", pa.string())]))
    parquet.write_table(table.set_column(1, "image", only_paths), folder)
    assert "its image is a path or URL" in refused(folder.parent.parent)
    assert asked == []


def test_plain_file_names_beside_pictures_are_dropped(copy: Callable[..., Path], tmp_path: Path):
    folder = copy()
    rows = rows_of(folder)
    assert {row["image"]["path"] for row in rows} == {f"{row['key']}.png" for row in rows}  # as `datasets` writes them
    table = dataset.load_dataset(folder)[SPLIT].with_format("arrow")[:]
    assert table["image"].combine_chunks().field("path").null_count == len(rows)
    loaded = dataset.load_dataset(folder)
    (tmp_path / f"{rows[0]['key']}.png").write_bytes(b"another file of the same name")
    assert loaded[SPLIT][0]["image"].size == (64, 64)


@pytest.mark.parametrize("name", ["../../secret.arrow", "/tmp/secret.arrow", "data-00000-of-00001.arrow/..", 7, None])
def test_a_dataset_whose_files_lie_elsewhere_is_refused(name: Any, copy: Callable[..., Path]):
    folder = copy("arrow")
    state = json.loads((folder / SPLIT / "state.json").read_text())
    (folder / SPLIT / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    assert "the dataset is damaged" in refused(folder)


def test_a_split_that_lies_elsewhere_is_refused(copy: Callable[..., Path], whole: Path):
    folder = copy("parquet")
    (folder / "data" / "bell\x07\n-0.parquet").write_bytes(b"")
    assert r"but got 'bell\x07\n', test, train, validation" in refused(folder)
    shutil.rmtree(folder)
    folder = copy("arrow")
    outside = str(whole / "arrow" / "train")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", outside]}))
    assert f"expected the splits train, validation, test, but got train, {outside[:40]}" in refused(folder)


# What is not as it should be


def with_value(**values: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [rows[0], {**rows[1], **values}, *rows[2:]]


def with_picture(column: str, data: bytes | None) -> Callable[[Rows], Rows]:
    return with_value(**{column: {"bytes": data, "path": None}})


def claiming(width: int, height: int) -> bytes:
    """A small PNG that says that it is large."""
    data = png(Image.new("L", (8, 8)))
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


WRONG_VALUES = {
    "label 7": (with_value(label=7), r"row 'u\d+': expected a label of 0 \(safe\) or 1 \(unsafe\), but got 7"),
    "label -1": (with_value(label=-1), r"expected a label of 0 \(safe\) or 1 \(unsafe\), but got -1"),
    "no label": (with_value(label=None), r"row 'u\d+': label is missing"),
    "no key": (with_value(key=None), r"train: row 1: key is missing"),
    "no prompt": (with_value(prompt=None), r"prompt is missing"),
    "no seed": (with_value(seed=None), r"seed is missing"),
    "no review state": (with_value(review_state=None), r"review_state is missing"),
    "no annotators": (with_value(annotators=None), r"annotators is missing"),
    "a nameless annotator": (with_value(annotators=["a", None]), r"row 'u\d+': annotators is missing"),
    "no regions": (with_value(regions=None), r"regions is missing"),
    "a region of nothing": (with_value(regions=[None]), r"regions is missing"),
    "a region without label": (
        with_value(regions=[{"label": None, "is_positive": True, "score": 1.0, "proposal_score": 1.0}]),
        r"regions.label is missing",
    ),
    "no sampler": (with_value(sampler=None), r"sampler is missing"),
    "null mask": (with_value(mask=None), r"mask.bytes is missing|mask is missing"),
    "null image": (with_value(image=None), r"image.bytes is missing|image is missing"),
    "image of nothing": (with_picture("image", None), r"image.bytes is missing"),
    "mask of nothing": (with_picture("mask", None), r"mask.bytes is missing"),
    "empty image": (with_picture("image", b""), r"row 'u\d+': its image cannot be decoded"),
    "image is text": (with_picture("image", b"no image"), r"row 'u\d+': its image cannot be decoded"),
    "half an image": (
        with_picture("image", png(Image.effect_noise((64, 64), 90))[:900]),
        r"its image cannot be decoded",
    ),
    "mask is text": (with_picture("mask", b"no mask"), r"its mask cannot be decoded"),
    "postscript": (with_picture("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), r"cannot be decoded"),
    "a bomb": (
        with_picture("image", claiming(10_000, 10_000)),
        r"its image cannot be decoded \(Image size .*decompression bomb",
    ),
    "small mask": (
        with_picture("mask", png(Image.new("L", (32, 64), 255))),
        r"expected a mask of 64x64 px, but got 32",
    ),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_wrong_values_are_named_with_their_row(name: str, kind: str, copy: Callable[..., Path], whole: Path):
    change, expected = WRONG_VALUES[name]
    folder = copy(kind)
    rows = sorted(rows_of(whole / "parquet"), key=lambda row: row["key"], reverse=True)
    write(folder, change(rows), kind)
    assert re.search(expected, refused(folder))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_groups_are_read_under_their_earlier_name(kind: str, copy: Callable[..., Path], whole: Path):
    folder = copy(kind)
    table = parquet.read_table(whole / "parquet" / PARQUET)
    earlier = table.rename_columns(["family" if name == "group" else name for name in table.column_names])
    write_table(folder, earlier, kind)
    assert list(dataset.load_dataset(folder)[SPLIT]["group"]) == table["group"].to_pylist()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_wrong_columns_are_named(kind: str, copy: Callable[..., Path], whole: Path):
    folder = copy(kind)
    table = parquet.read_table(whole / "parquet" / PARQUET)
    text = pa.array(["unsafe"] * len(table))
    at = table.column_names.index
    others = {
        "the columns mask, group are missing": table.drop_columns(["mask", "group"]),
        "the columns key, image": pa.table({"picture": text}),
        "column 'label': expected int64, but got something else": table.set_column(at("label"), "label", text),
        "column 'seed': expected int64": table.set_column(at("seed"), "seed", pa.array([0.5] * len(table))),
        "column 'mask': expected image files": table.set_column(at("mask"), "mask", text),
        "column 'prompt': expected string": table.set_column(at("prompt"), "prompt", pa.array([[1]] * len(table))),
        "column 'prompt': expected str": table.set_column(at("prompt"), "prompt", pa.array([b"\xff\xfe"] * len(table))),
        "column 'sampler': expected struct": table.set_column(at("sampler"), "sampler", text),
        "column 'annotators': expected list": table.set_column(at("annotators"), "annotators", text),
    }
    for expected, other in others.items():
        write_table(folder, other, kind)
        assert expected in refused(folder)
    if kind == "arrow":  # parquet cannot hold it
        write_table(folder, table.append_column("key", text), kind)
        assert "exists 2 times" in refused(folder)


def test_tables_of_other_tools_are_taken_where_they_say_the_same(copy: Callable[..., Path], whole: Path):
    folder = copy()
    before = dataset.load_dataset(folder)
    table = parquet.read_table(folder / PARQUET)
    schema = pa.schema(
        [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    )
    other = table.cast(schema).append_column("my notes", pa.array(["x"] * len(table))).replace_schema_metadata(None)
    parquet.write_table(other, folder / PARQUET)
    after = dataset.load_dataset(folder)
    assert after[SPLIT].features == FEATURES
    assert dataset.fingerprint(after) == dataset.fingerprint(before)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


WRONG_JSON = [
    "",
    "[]",
    "null",
    "7",
    '"x"',
    "{}",
    nested(100_000),
    '{"a":' * 50_000,
    "9" * 6000,
    "\x00",
    '{"format": 1}',
]


@pytest.mark.parametrize("file", ["dataset.json", "dataset_dict.json", f"{SPLIT}/state.json"])
def test_json_that_is_none_of_ours_is_named(file: str, copy: Callable[..., Path]):
    folder = copy("arrow", with_summary=True)
    path = folder / file
    good = path.read_text()
    for text in WRONG_JSON:
        path.write_text(text)
        assert re.search(r"damaged|not a summary|expected (format 1|the splits)", refused(folder))
    path.write_text(good)
    dataset.load_dataset(folder)
    path.unlink()
    os.mkfifo(path)  # would never end
    assert re.search(r"damaged|not a summary|no dataset", refused(folder))
    path.unlink()
    path.mkdir()
    assert re.search(r"damaged|not a summary|no dataset", refused(folder))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("counts", []),
        ("counts", {"train": {"safe": 1, "unsafe": 1}}),
        ("counts", {"train": {}, "validation": {}, "test": {}}),
        ("counts.train.safe", -1),
        ("counts.train.safe", "3"),
        ("review_states", {"accepted": 1.5}),
        ("review_states", None),
        ("models", [["demo"]]),
        ("models", "demo"),
        ("labels", {"positive": "weapon", "negative": []}),
        ("agreement", {"mean_iou": "high", "kappa": {}}),
        ("fingerprint", None),
        ("licence", ["mit"]),
        ("summary", "x" * 100_000),
        ("left_out", {"a": None}),
    ],
)
def test_a_summary_with_wrong_values_names_the_first(place: str, value: Any, copy: Callable[..., Path]):
    folder = copy(with_summary=True)
    summary = inner = json.loads((folder / "dataset.json").read_text())
    *way, last = place.split(".")
    for name in way:
        inner = inner[name]
    inner[last] = value
    (folder / "dataset.json").write_text(json.dumps(summary))
    message = refused(folder)
    assert "dataset.json: not a summary of a dataset (" in message
    assert place.split(".")[0] in message


def test_a_summary_that_flatters_its_rows_is_refused(copy: Callable[..., Path]):
    folder = copy(with_summary=True)
    path = folder / "dataset.json"
    summary = json.loads(path.read_text())
    num = sum(summary["review_states"].values())
    for flattery in (
        {"review_states": {"accepted": num}},
        {"counts": {**summary["counts"], "test": {"safe": 9, "unsafe": 9}}},
    ):
        path.write_text(json.dumps({**summary, **flattery}))
        assert "the rows do not match" in refused(folder)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_that_are_none_are_named(kind: str, copy: Callable[..., Path]):
    folder = copy(kind)
    path = folder / PARQUET if kind == "parquet" else next((folder / SPLIT).glob("*.arrow"))
    data = path.read_bytes()
    for wrong in (
        b"",
        b"PAR1",
        data[:-1] if kind == "parquet" else data[:90],
        data[: len(data) // 2],
        bytes(len(data)),
    ):
        path.write_bytes(wrong)
        assert "the dataset is damaged: " in refused(folder)
    for make in (os.mkfifo, Path.mkdir):
        path.unlink()
        make(path)
        assert "is missing or not a plain file" in refused(folder)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_harmed_files_give_one_line_and_no_traceback(kind: str, copy: Callable[..., Path]):
    """Bits flipped, parts cut off, zeroed or doubled in any file: a dataset that loads can be worked with."""
    draw = random.Random(16)
    folder = copy(kind)
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".parquet", ".arrow"} or path.name in STATES)
    messages: list[str] = []
    for _ in range(25):
        path = draw.choice(files)
        good = path.read_bytes()
        path.write_bytes(harmed(good, draw))
        try:
            use(folder)
        except DagkitError as error:
            messages.append(str(error))
        path.write_bytes(good)
    assert len(messages) >= 8
    assert all(len(message) < 800 and "\n" not in message for message in messages)


STATES = {"dataset_dict.json", "state.json"}


def harmed(data: bytes, draw: random.Random) -> bytes:
    other, start = bytearray(data), draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            return data[:start]
        case 1:
            for _ in range(draw.choice([1, 4, 30])):
                other[draw.randrange(len(data))] = draw.randrange(256)
        case 2:  # where both formats keep what they say about themselves
            for _ in range(5):
                other[-1 - draw.randrange(min(len(data), 3000))] = draw.randrange(256)
        case 3:
            other[start : start + 100] = bytes(len(other[start : start + 100]))
        case 4:
            return data + data
    return bytes(other)


def test_all_rows_in_one_split_load_again(copy: Callable[..., Path], whole: Path, concept: Concept, tmp_path: Path):
    """Test wins over training where groups meet, so a small dataset may have no training row."""
    loaded = dataset.load_dataset(whole / "arrow")
    everything = datasets.concatenate_datasets([split for split in loaded.values() if len(split)])
    only_test = DatasetDict({**{split: everything.select([]) for split in loaded}, "test": everything})
    dataset.save_dataset(only_test, tmp_path / "a", dataset.summarise(only_test, concept))
    assert {split: len(rows) for split, rows in dataset.load_dataset(tmp_path / "a").items()} == {
        "train": 0,
        "validation": 0,
        "test": 8,
    }
