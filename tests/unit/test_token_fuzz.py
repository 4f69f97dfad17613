"""Artifacts from strangers: whatever is done to the files, a token is refused or loads as it was."""

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as tensor_bytes

from dagkit.errors import TokenError
from dagkit.token import MAX_BYTES, RECORD_FILE, SUMS_FILE, TENSORS_FILE, GuidelineToken
from small_tokens import is_equal, save_small_token, seal, small_token

TOKEN = small_token()
with tempfile.TemporaryDirectory() as _root:
    FILES = {path.name: path.read_bytes() for path in TOKEN.save(Path(_root) / "token").iterdir()}

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
FIELDS = [(), *([key] for key in TOKEN.record.model_dump()), *(["base_model", key] for key in ("id", "text_encoder"))]
FIELDS += [["thresholds", key] for key in ("timesteps", "highlight", "min_area")] + [["guidance", "strength"]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def artifact(changed: dict[str, bytes], *, is_sealed: bool = False) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (FILES | changed).items():
            (Path(folder) / name).write_bytes(data)
        if is_sealed:
            seal(Path(folder))
        yield Path(folder)


def load(folder: Path) -> GuidelineToken | None:
    try:
        return GuidelineToken.load(folder)
    except TokenError:
        return None


@st.composite
def damaged_file(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(FILES)))
    data = bytearray(FILES[name])
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                data[position] ^= draw(st.integers(1, 255))
            case "cut":
                del data[position : position + draw(st.integers(1, len(data)))]
            case "insert":
                data[position:position] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                data += data[position:]
        if not data:
            break
    return name, bytes(data)


@given(damaged_file())
@settings(max_examples=60, deadline=None)
def test_damage_is_refused_or_harmless(damage: tuple[str, bytes]):
    name, data = damage
    with artifact({name: data}) as folder:
        token = load(folder)

    assert token is None or is_equal(token, TOKEN)
    assert token is None or name == SUMS_FILE or data == FILES[name]


@given(damaged_file())
@settings(max_examples=40, deadline=None)
def test_damage_behind_new_sums_raises_nothing_but_token_errors(damage: tuple[str, bytes]):
    with artifact(dict([damage]), is_sealed=True) as folder:
        token = load(folder)

    assert token is None or all(bool(torch.isfinite(tensor).all()) for tensor in token.tensors().values())


@given(st.sampled_from(FIELDS), json_values)
@settings(max_examples=50, deadline=None)
def test_any_json_in_the_record(path: list[str], value: Any):
    record = json.loads(FILES[RECORD_FILE])
    *parents, last = path or [None]
    part = record
    for key in parents:
        part = part[key]
    if last is None:
        record = value
    else:
        part[last] = value
    with artifact({RECORD_FILE: json.dumps(record).encode()}, is_sealed=True) as folder:
        token = load(folder)

    assert token is None or json.loads(token.record.model_dump_json()) is not None


@given(
    st.dictionaries(
        st.sampled_from(["guideline", "start_of_text", "background", "head_weights", "other"]),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)),
        min_size=1,
    )
)
@settings(max_examples=50, deadline=None)
def test_any_tensors(described: dict[str, tuple[torch.dtype, list[int]]]):
    tensors = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in described.items()}
    with artifact({TENSORS_FILE: tensor_bytes(tensors)}, is_sealed=True) as folder:
        token = load(folder)

    if token is not None:
        assert token.guideline.dim() == 2
        assert token.guideline.numel() > 0
        assert token.sequence.dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "safetensors"),
        (struct.pack("<Q", 1 << 62) + b"{}", "safetensors"),
        (struct.pack("<Q", 2) + b"{}", "expected .*guideline"),
        (tensor_bytes({"guideline": torch.full((2, 8), torch.nan), "start_of_text": torch.ones(1, 8)}), "finite"),
        (tensor_bytes({"guideline": torch.ones(2, 8), "start_of_text": torch.ones(1, 9)}), "shape"),
        (tensor_bytes({"guideline": torch.ones(2, 0), "start_of_text": torch.ones(1, 0)}), "shape"),
        (tensor_bytes({"guideline": torch.tensor(1.0), "start_of_text": torch.ones(1, 8)}), "shape"),
        (tensor_bytes({"guideline": torch.ones(2, 8).half(), "start_of_text": torch.ones(1, 8)}), "float16"),
    ],
)
def test_hostile_tensor_files(data: bytes, message: str):
    with artifact({TENSORS_FILE: data}, is_sealed=True) as folder, pytest.raises(TokenError, match=message):
        GuidelineToken.load(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 200_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "schema"),
        (FILES[RECORD_FILE].replace(b'"schema_version": 2', b'"schema_version": 3'), "schema 3.*Upgrade dagkit"),
        (FILES[RECORD_FILE].replace(b'"concept": "weapon"', b'"concept": "../../etc"'), "concept"),
        (FILES[RECORD_FILE].replace(b'"version": "1.0.0"', b'"version": "1.0.0/../.."'), "version"),
        (FILES[RECORD_FILE].replace(b'"metrics": {}', b'"metrics": {"iou": NaN}'), "NaN"),
        (FILES[RECORD_FILE].replace(b'"metrics": {}', b'"surprise": 1'), "surprise"),
    ],
)
def test_hostile_records(data: bytes, message: str):
    assert data != FILES[RECORD_FILE]
    with artifact({RECORD_FILE: data}, is_sealed=True) as folder, pytest.raises(TokenError, match=message):
        GuidelineToken.load(folder)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (SUMS_FILE, b"x" * 50_000),
        (RECORD_FILE, b'{"' + b"k" * 50_000 + b'": 1}'),
        (RECORD_FILE, FILES[RECORD_FILE].replace(b"{", b'{"%s": 1,' % (b"k" * 50_000), 1)),
        (RECORD_FILE, FILES[RECORD_FILE].replace(b"{", b"{" + b"".join(b'"k%d": 1,' % n for n in range(9000)), 1)),
        (RECORD_FILE, FILES[RECORD_FILE].replace(b"acme/small-sd", b"x" * 50_000)),
        (RECORD_FILE, FILES[RECORD_FILE].replace(b'"schema_version": 2', b'"schema_version": 2' + b"0" * 4000)),
        (RECORD_FILE, FILES[RECORD_FILE].replace(b"down.0.attn2", b"x" * 50_000)),
        (TENSORS_FILE, tensor_bytes({"x" * 50_000: torch.ones(1)})),
        (TENSORS_FILE, tensor_bytes({f"x{n}": torch.ones(1) for n in range(5000)})),
    ],
)
def test_messages_are_short(name: str, data: bytes):
    assert data != FILES[name]
    with artifact({name: data}, is_sealed=name != SUMS_FILE) as folder, pytest.raises(TokenError) as caught:
        GuidelineToken.load(folder)
    assert len(str(caught.value)) < 1600
    assert "\n" not in str(caught.value)


def test_sums_that_lead_elsewhere():
    outside = FILES[SUMS_FILE].replace(b"token.json", b"../token.json")
    with artifact({SUMS_FILE: outside}) as folder, pytest.raises(TokenError, match="SHA256SUMS, line"):
        GuidelineToken.load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_oversized_files(name: str, tmp_path: Path):
    folder = save_small_token(tmp_path)
    with (folder / name).open("r+b") as file:
        file.truncate(MAX_BYTES[name] + 1)  # sparse

    with pytest.raises(TokenError, match=rf"{name} is larger than {MAX_BYTES[name]}"):
        GuidelineToken.load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing"])
def test_files_that_are_none(name: str, kind: str, tmp_path: Path):
    folder = save_small_token(tmp_path)
    moved = (folder / name).rename(tmp_path / name)
    match kind:
        case "link":
            (folder / name).symlink_to(moved)
        case "pipe":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()

    with pytest.raises(TokenError, match=rf"{name}.*(cannot be read|not a plain file)"):
        GuidelineToken.load(folder)
