"""Locations, indexes and references that are anything: the right token or one clear line, and nothing is written."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dagkit import registry
from dagkit.cli import command
from dagkit.errors import DagkitError, PublishError, TokenError
from dagkit.workspace import sha256_json
from interruption import content
from small_tokens import is_equal, save_small_token, small_token


@pytest.fixture
def published(tmp_path: Path) -> Path:
    for number, version in enumerate(["1.0.0", "1.1.0"]):
        folder = save_small_token(tmp_path / "mine", version, seed=number)
        registry.publish(registry.pack(folder), registry.open_location(f"file://{tmp_path}/published"))
    (tmp_path / "mine" / "secret").write_text("nobody's business")
    return tmp_path / "published"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises where something waits for ever, e.g. for the other end of a pipe."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_clear(error: DagkitError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1500
    assert "nobody's business" not in str(error)


JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 10**40, 1e308, "", "x" * 5000, "\0", "\ud800", "../../mine/secret", "/etc/passwd",
    [], {}, [[]], {"a": 1},
)  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy in which one part, anywhere, is something else, gone, or has another name."""
    value = copy.deepcopy(value)
    parent, place, node = None, None, value
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
        parent, place = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[place]
    if isinstance(parent, dict) and rng.random() < 0.3:
        parent[rng.choice(["../../mine/secret", "/etc/passwd", "", "x" * 5000, "\0"])] = parent.pop(place)
    else:
        parent[place] = rng.choice(JUNK)
    return value


def sealed(value: Any) -> bytes:
    """With a checksum that fits, as far as one can be made."""
    if isinstance(value, dict):
        value.pop("sha256", None)
        try:
            value["sha256"] = sha256_json(value)
        except (ValueError, TypeError):
            value["sha256"] = ""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def spoil(published: Path, rng: random.Random) -> None:
    """Puts something else in the place of one file or folder of a location."""
    index = published / "index.json"
    path = rng.choice([index, index, *(path for path in sorted(published.rglob("*")) if path != index)])
    match rng.randrange(8):
        case 0 | 1 | 2:
            index.write_bytes(sealed(mutated(json.loads(index.read_bytes()), rng)))
            return
        case 3:
            index.write_bytes(rng.choice([b"", b"[" * 100_000, b"NaN", b"\xff", b'{"a": ' + b"9" * 5000 + b"}", b"[]"]))
            return
        case 4 if path.is_file():
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
            return
        case 5:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.symlink_to(
                rng.choice(
                    [published.parent / "mine" / "secret", published / "nowhere", path, published.parent / "mine"]
                )
            )
            return
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match rng.randrange(3):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case _:
            pass  # it is gone


def test_fuzzed_locations(published: Path, tmp_path: Path):
    rng = random.Random(0)
    whole, mine = tmp_path / "whole", content(tmp_path / "mine")
    shutil.copytree(published, whole)
    url, failed = f"file://{published}", 0
    for number in range(150):
        shutil.rmtree(published)
        shutil.copytree(whole, published)
        spoil(published, rng)
        before = content(published), sorted(published.rglob("*"))
        with at_most(10):
            for wanted in ("1.0.0", "^1"):
                try:
                    token = registry.load_token(f"{url}@{wanted}")
                    assert is_equal(token, small_token(token.version, seed=int(token.version[2])))
                except (PublishError, TokenError) as error:
                    failed += 1
                    assert_clear(error)
            for arguments in (["registry", url], ["token", "list", url]) if number % 10 == 0 else ():
                raised = CliRunner().invoke(command, arguments).exception
                assert raised is None or isinstance(raised, (DagkitError, SystemExit)), (arguments, raised)
        assert (content(published), sorted(published.rglob("*"))) == before
        try:
            with at_most(10):
                registry.publish(registry.pack(tmp_path / "mine" / "weapon" / "1.1.0"), registry.open_location(url))
        except (PublishError, TokenError) as error:
            assert_clear(error)
        assert content(tmp_path / "mine") == mine
    assert failed > 150


REFERENCES = [
    "~nouser/x", "~", "~/", "", " ", "\0", "a\0b", "./a\0b", "x" * 5000, "./" + "a" * 300, "./" + "a/" * 3000,
    "@", "a@", "a@@1", "weapon@^", "weapon@999999999.0.0", "weapon@1.0.0\n", "../..", ".", "/", "\ud800", "./\ud800",
    "file://", "file:///", "file:///\0", "file:///etc/passwd", "file:///proc/self/mem", "file:///" + "a" * 300,
    "file:///" + "a/" * 900, "file:////etc", "file://~nouser/x", "file:///\ud800", "ftp://x/y", "://",
    "hf://", "hf://a", "hf://a/b/c", "s3://", "s3://A", "s3://..", "s3://" + "a" * 64,
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda text: ascii(text)[:30])
def test_references_to_nothing(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for given in (reference, Path(reference)):
        with at_most(10), pytest.raises((TokenError, PublishError)) as caught:
            registry.load_token(given)
        assert_clear(caught.value)
    with pytest.raises((TokenError, PublishError)) as caught:
        registry.open_location(reference).read_index() or registry.load_token("nothing")
    assert_clear(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "INDEX.md", "1.0.0/token.json"])
def test_places_that_are_somebody_elses_are_left_alone(tmp_path: Path, name: str):
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    parcel = registry.pack(save_small_token(tmp_path))
    with pytest.raises(
        PublishError, match=r"is not empty, and dagkit has published nothing there: it holds "
    ) as caught:
        registry.publish(parcel, registry.open_location(f"file://{tmp_path}/theirs"))
    assert Path(name).parts[0] in str(caught.value)
    assert [file for file in (tmp_path / "theirs").rglob("*") if file.is_file()] == [path]
    assert path.read_text() == "theirs"


def test_unknown_homes_of_the_cache_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGKIT_CACHE", "~nouser/cache")
    with pytest.raises(DagkitError, match=r"DAGKIT_CACHE: expected a path"):
        registry.cache_folder()
