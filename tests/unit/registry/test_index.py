"""The index is the one thing that a reader trusts: it has one form, a checksum, and names nothing outside."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagkit import registry
from dagkit.errors import PublishError, TokenError
from dagkit.registry.index import MAX_INDEX_BYTES, Entry, Index, describe, page, parse_index
from dagkit.token import MAX_BYTES
from dagkit.workspace import sha256_json
from small_tokens import save_small_token


def entry(version: str = "1.0.0", **changes: Any) -> Entry:
    files = describe({name: f"{name} of {version}".encode() for name in MAX_BYTES})
    fields = {
        "version": version,
        "published": "2025-01-01",
        "base_model": "acme/sd",
        "architecture": "sd",
        "files": files,
    }
    return Entry(**(fields | changes))


INDEX = Index(concept="weapon", versions=(entry("1.0.0"), entry("1.2.0", figures={"erased": 0.93})))


def sealed(change: Any) -> bytes:
    """An index that somebody changed who also mended its checksum."""
    value = json.loads(INDEX.to_bytes())
    del value["sha256"]
    change(value)
    value["sha256"] = sha256_json(value)
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def test_round_trip():
    assert parse_index(INDEX.to_bytes(), "index.json") == INDEX
    assert [one.version for one in INDEX.with_entry(entry("1.1.0")).versions] == ["1.0.0", "1.1.0", "1.2.0"]
    assert INDEX.entry("1.2.0") == INDEX.versions[1]
    assert INDEX.entry("9.0.0") is None


def test_content_is_in_the_folders_name():
    one, other = entry(), entry(published="2026-06-06", figures={"kept": 1.0})
    changed = entry(files=describe(dict.fromkeys(MAX_BYTES, b"other")))

    assert one.folder == other.folder == f"1.0.0-{one.content[7:23]}"
    assert changed.folder != one.folder


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_is_refused(data: st.DataObject):
    good = INDEX.to_bytes()
    bad = bytearray(good)
    position = data.draw(st.integers(0, len(bad) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            bad[position] ^= data.draw(st.integers(1, 255))
        case "cut":
            del bad[position : position + data.draw(st.integers(1, 400))]
        case "insert":
            bad[position:position] = data.draw(st.sampled_from([b" ", b"\n", b"0", b'"', b"{}"]))
    if bytes(bad) == good:
        return
    with pytest.raises(PublishError, match=r"^index.json"):
        parse_index(bytes(bad), "index.json")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "examples/../x", "a/b", ".hidden", "x" * 200, "", "é"]
)
def test_names_that_lead_elsewhere(name: str):
    def change(value: dict[str, Any]) -> None:
        value["versions"][0]["files"][name] = value["versions"][0]["files"]["token.json"]

    with pytest.raises(PublishError, match=r"index.json does not fit the schema: '?versions.0.files"):
        parse_index(sealed(change), "index.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda value: value.update(schema_version=2),
            "index.json has schema 2, but this dagkit knows 1.*Upgrade dagkit",
        ),
        (lambda value: value.update(concept="../x"), "concept"),
        (lambda value: value.update(extra=1), "extra"),
        (lambda value: value["versions"].reverse(), "versions must be unique and rise"),
        (lambda value: value["versions"].append(value["versions"][0]), "versions must be unique and rise"),
        (lambda value: value["versions"][0]["files"].pop("token.json"), "files lacks token.json"),
        (lambda value: value["versions"][0]["files"]["token.json"].update(size=1 << 40), "less than or equal"),
        (lambda value: value["versions"][0]["files"]["token.json"].update(sha256="md5:0"), "sha256"),
        (lambda value: value["versions"][0].update(version="1.0.0/../.."), "version"),
        (lambda value: value["versions"][0].update(revision="main"), "revision"),
        (lambda value: value["versions"][0]["figures"].update(erased=float("inf")), "Infinity is not a JSON value"),
    ],
)
def test_hostile_indexes(change: Any, message: str):
    with pytest.raises(PublishError, match=message):
        parse_index(sealed(change), "index.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"concept": 1e999}'])
def test_what_is_no_index(data: bytes):
    with pytest.raises(PublishError, match=r"^index.json(:| is not| does not)"):
        parse_index(data, "index.json")


def test_page_cannot_be_broken_by_a_models_name():
    text = page(Index(concept="weapon", versions=(entry(base_model="a|b\n# <script>"),)), "s3://bucket/x")
    assert "| a_b_# _script_ (sd) |".replace("# ", "_ ") in text
    assert "<script>" not in text


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = save_small_token(tmp_path)
    registry.publish(registry.pack(folder), registry.open_location(f"file://{tmp_path}/published"))
    return tmp_path / "published"


@pytest.mark.parametrize("name", ["index.json", "1.0.0-*/token.json", "1.0.0-*"])
def test_links_in_a_location_are_refused(published: Path, name: str):
    target = next(published.glob(name))
    target.symlink_to(target.rename(published.parent / "elsewhere"))

    with pytest.raises(PublishError, match=r"cannot be read|symbolic link"):
        registry.load_token(f"file://{published}@1.0.0")


def test_a_location_may_itself_be_a_link(published: Path):
    (published.parent / "link").symlink_to(published)
    assert registry.load_token(f"file://{published.parent}/link@1.0.0").name == "weapon@1.0.0"


def test_oversized_index(published: Path):
    with (published / "index.json").open("r+b") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(PublishError, match=r"index.json is larger than 4,194,304 bytes"):
        registry.load_token(f"file://{published}@1.0.0")


def test_missing_file(published: Path):
    next(published.glob("1.0.0-*/token.json")).unlink()
    with pytest.raises(PublishError, match=r"token.json: the index names this file, but it is not there"):
        registry.load_token(f"file://{published}@1.0.0")


def test_full_disk(full_disk: Path, tmp_path: Path):
    folder = save_small_token(tmp_path)
    (full_disk / "filler").write_bytes(b"0" * (1 << 20))
    with pytest.raises(PublishError, match=r"cannot be written: no space left on device. Free some space"):
        registry.publish(registry.pack(folder), registry.open_location(f"file://{full_disk}/published"))
    (full_disk / "filler").unlink()
    registry.publish(registry.pack(folder), registry.open_location(f"file://{full_disk}/published"))
    assert registry.load_token(f"file://{full_disk}/published").name == "weapon@1.0.0"


def test_two_writers_of_one_folder(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dagkit.registry.locations import folder
    from dagkit.workspace import lock

    monkeypatch.setattr(folder, "PATIENCE_S", 0.2)

    parcel = registry.pack(save_small_token(tmp_path, "1.1.0"))
    with lock(published), pytest.raises(PublishError, match=r"another dagkit process is writing here"):
        registry.publish(parcel, registry.open_location(f"file://{published}"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["none.png"], "none.png: expected an image, but it cannot be read"),
        (["text.png"], "text.png: expected an image, but it cannot be read"),
        (["text.png"] * 65, "expected at most 64 examples, but got 65"),
    ],
)
def test_examples_must_be_images(tmp_path: Path, files: list[str], message: str):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(PublishError, match=message):
        registry.pack(save_small_token(tmp_path), examples=[tmp_path / name for name in files])


def test_damaged_tokens_are_not_published(tmp_path: Path):
    folder = save_small_token(tmp_path)
    (folder / "README.md").write_text("changed")
    with pytest.raises(TokenError, match=r"README.md was changed after it was written"):
        registry.pack(folder)
