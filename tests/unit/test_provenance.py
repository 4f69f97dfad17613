"""Records, cards, figures and reports hold names and hashes, never paths of somebody's machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dagkit.evaluation import comparable
from dagkit.provenance import is_repository, local_paths, public, public_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "demo"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("/home/alice/models/sd15", "sd15"),
        ("/data/alice/sd15/", "sd15"),
        ("~/models/sd15", "sd15"),
        ("~alice/models/sd15", "sd15"),
        ("./sd15", "sd15"),
        ("../../sd15", "sd15"),
        ("C:\\Users\\alice\\sd15", "sd15"),
        ("file:///home/alice/sd15", "sd15"),
        ("/home/alice", "home"),
        ("~", "home"),
        ("~alice", "home"),
        ("/", "folder"),
    ],
)
def test_a_folder_is_called_by_its_own_name(source: str, name: str) -> None:
    assert public_name(source) == name
    assert local_paths(public_name(source)) == []


def test_folders_that_look_like_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/sd15") == "alice/sd15"
    Path("alice/sd15").mkdir(parents=True)
    assert public_name("alice/sd15") == "sd15"
    assert public_name(".") == tmp_path.name


def test_values_keep_names_and_hashes(tmp_path: Path) -> None:
    for folder, data in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / folder / "clip").mkdir(parents=True)
        (tmp_path / folder / "clip" / "model.safetensors").write_bytes(data)
    weights = tmp_path / "a" / "clip" / "model.safetensors"
    one, other, same = (public(str(tmp_path / folder / "clip")) for folder in "abc")

    assert one.startswith("clip (sha256:")
    assert one == same != other
    value = {"judges": [{"checkpoint": str(weights)}], "number": 1, "note": f"as in {Path.home()}/notes/a.txt, and"}
    hidden = public(value)
    assert hidden["judges"][0]["checkpoint"].startswith("model.safetensors (sha256:")
    assert hidden["note"] == "as in a.txt, and"
    assert public(value, is_hashed=False)["judges"] == [{"checkpoint": "model.safetensors"}]
    assert local_paths(hidden) == []
    assert len(local_paths(value)) == 2
    assert public(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "a cat/dog",
        "and/or",
        "sha256:00ff",
        "https://example.org/home/x",
        "a" * 5000 + "/b",
        "\0/x",
        "~20",
        "…/s",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert public(text) == text
    assert local_paths(text) == []


def test_evaluations_with_one_checkpoint_in_two_forms_are_comparable(tmp_path: Path) -> None:
    (tmp_path / "clip.pt").write_bytes(b"weights")
    judge = {"name": "clip", "options": {"checkpoint": str(tmp_path / "clip.pt")}}
    older = {"schema": 1, "settings": {"judge": judge}}
    newer = {"schema": 1, "settings": json.loads(json.dumps(public({"judge": judge})))}
    assert comparable(newer, older) == []
    (tmp_path / "clip.pt").write_bytes(b"other weights")
    assert comparable(newer, older) == ["judge"]


def test_names_of_repositories_have_an_owner() -> None:
    assert is_repository("stable-diffusion-v1-5/stable-diffusion-v1-5")
    for name in ("gpt2", "a/b/c", "a//b", "/b", "a/b\n", "a/b?", "../b", ""):
        assert not is_repository(name), name
