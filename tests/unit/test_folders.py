"""Folders appear whole or not at all."""

from pathlib import Path

import pytest

from dagkit.folders import atomic_folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_nothing_is_there_before_all_of_it_is(tmp_path: Path):
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as building:
        (building / "a").write_text("a")
        assert not target.exists()
    assert names(tmp_path) == ["new", "new/folder", "new/folder/a"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_what_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "folder") as building:
        (building / "a").rename(building / "b")
    assert names(tmp_path) == []


def test_an_older_folder_is_in_nobodys_way_unless_it_may_be_displaced(tmp_path: Path):
    target, displaced = tmp_path / "folder", tmp_path / "old"
    target.mkdir()
    (target / "first").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(target) as building:
        (building / "second").touch()
    assert names(tmp_path) == ["folder", "folder/first"]
    with atomic_folder(target, displaced=displaced) as building:
        (building / "second").touch()
    assert names(tmp_path) == ["folder", "folder/second", "old", "old/first"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path):
    target, displaced = tmp_path / "folder", tmp_path / "old"
    target.mkdir()
    (target / "first").touch()
    with pytest.raises(FileNotFoundError), atomic_folder(target, displaced=displaced) as building:
        building.rename(tmp_path / "taken")
    assert names(tmp_path) == ["folder", "folder/first", "taken"]
