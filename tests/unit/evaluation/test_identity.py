"""The figures of an evaluation, read again: by publish, and by evaluate --against."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagkit.errors import TokenError
from dagkit.evaluation import read_figures, token_identity
from small_tokens import small_token

TOKEN = small_token()


def figures() -> dict[str, Any]:
    said = {"is_present": False, "score": 0.1, "lost": [], "num_fired": 2}
    settings = [{"name": "dagkit", "label": "dagkit", "settings": token_identity(TOKEN)}]
    return {
        "schema": 1,
        "column": "dagkit",
        "token": {"name": TOKEN.name},
        "settings": {"model": "demo", "columns": settings},
        "prompts": [{"key": "named-0000", "kind": "named", "text": "a bomb", "columns": {"dagkit": said}}],
        "results": {"named": {"dagkit": {"erase_rate": {"value": 1.0}, "preservation": {"value": None}}}},
        "checks": [{"name": "erase_rate/named", "text": "erased", "is_passed": True}],
    }


def test_figures_are_read_as_they_were_written(tmp_path: Path):
    (tmp_path / "figures.json").write_text(json.dumps(figures()))
    assert read_figures(tmp_path / "figures.json", TOKEN) == figures()


SPOILT: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda one: one.pop("results"), "results: missing"),
    (lambda one: one.update(results=[]), r"results: .*\[\]"),
    (lambda one: one["results"]["named"].update(dagkit=3), r"results\.named\.dagkit: .*3"),
    (lambda one: one["results"]["named"]["dagkit"].update(erase_rate={"value": "high"}), "value: .*'high'"),
    (lambda one: one["prompts"][0]["columns"].clear(), "expected figures of the column 'dagkit'"),
    (lambda one: one["prompts"][0]["columns"]["dagkit"].update(lost=3), r"prompts\.0\.columns\.dagkit\.lost: .*3"),
    (lambda one: one["prompts"][0].update(key=None), r"prompts\.0\.key: .*None"),
    (lambda one: one["checks"][0].pop("text"), r"checks\.0\.text: missing"),
    (lambda one: one["settings"].update(columns={}), r"settings\.columns: "),
    (lambda one: one["settings"].update(model=["x" * 5000] * 50), r"settings\.model: "),
    (lambda one: one["token"].clear(), r"token\.name: missing"),
    (lambda one: one.update(column="sega"), "expected figures of the column 'sega'"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_what_is_wrong_is_named(spoil: Callable[[dict[str, Any]], object], message: str, tmp_path: Path):
    value = figures()
    spoil(value)
    (tmp_path / "figures.json").write_text(json.dumps(value))
    with pytest.raises(TokenError, match=rf"figures\.json is not an evaluation \(.*{message}") as caught:
        read_figures(tmp_path / "figures.json", TOKEN)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"3", b"null", b"[" * 100_000, b"\xff", b'{"schema": NaN}', b'{"a":1,"a":1}']
)
def test_what_is_no_object_is_named(data: bytes, tmp_path: Path):
    (tmp_path / "figures.json").write_bytes(data)
    with pytest.raises(TokenError, match=r"figures\.json is not an evaluation"):
        read_figures(tmp_path / "figures.json", TOKEN)


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "circle"])
def test_what_is_no_file_is_named_at_once(kind: str, tmp_path: Path):
    path = tmp_path / "figures.json"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "missing": str, "circle": lambda path: path.symlink_to(path)}
    make[kind](path)
    with pytest.raises(TokenError, match=r"weapon@1\.0\.0 has no evaluation: .*figures\.json cannot be read"):
        read_figures(path, TOKEN)
