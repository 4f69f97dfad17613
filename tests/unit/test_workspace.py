"""A workspace never loses finished work, and never holds half a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dagkit.errors import WorkspaceError
from dagkit.workspace import StageFolder, Workspace, atomic_write, checked_name, lock, sha256_file, sha256_json


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return Workspace(tmp_path).stage("notes", "weapon")


def test_rows_come_back_in_order(folder: StageFolder):
    folder.append({"key": "b", "prompt": "a cat"})
    folder.append({"prompt": "ein Hündchen", "key": "a"})

    assert folder.rows() == [{"key": "b", "prompt": "a cat"}, {"key": "a", "prompt": "ein Hündchen"}]
    assert folder.keys() == {"a", "b"}


def test_nothing_is_created_before_the_first_write(folder: StageFolder):
    assert folder.rows() == []
    assert not folder.path.exists()


def test_torn_last_line_is_ignored_and_mended(folder: StageFolder):
    folder.append({"key": "a"})
    with folder.manifest.open("a") as file:
        file.write('{"key": "b", "pro')

    assert folder.keys() == {"a"}
    folder.append({"key": "c"})
    assert [row["key"] for row in folder.rows()] == ["a", "c"]
    assert folder.manifest.read_bytes().count(b"\n") == 2


def test_wrong_whole_line_is_named(folder: StageFolder):
    folder.append({"key": "a"})
    with folder.manifest.open("a") as file:
        file.write("[1]\n")

    with pytest.raises(WorkspaceError, match=r"manifest\.jsonl, line 2: expected a JSON object with a 'key'"):
        folder.rows()


def test_image_round_trip(folder: StageFolder):
    image = Image.effect_noise((16, 12), 50).convert("RGB")
    folder.write_image("images/a.png", image)

    assert folder.read_image("images/a.png").tobytes() == image.tobytes()


def test_unreadable_image_is_named(folder: StageFolder):
    folder.write_bytes("images/a.png", b"\x89PNG but no more")

    with pytest.raises(WorkspaceError, match=r"images/a\.png: expected an image, but it cannot be read"):
        folder.read_image("images/a.png")
    with pytest.raises(WorkspaceError, match=r"images/b\.png: no such image"):
        folder.read_image("images/b.png")


def test_other_settings_are_refused_by_name(folder: StageFolder):
    folder.settings({"seed": 0, "model": "demo"})
    folder.settings({"model": "demo", "seed": 0})

    with pytest.raises(WorkspaceError, match=r"begun with other settings: seed was 0, now 1\."):
        folder.settings({"seed": 1, "model": "demo"})


@pytest.mark.parametrize("relative", ["../x", "/etc/passwd", "images/../../x"])
def test_paths_stay_inside(folder: StageFolder, relative: str):
    with pytest.raises(WorkspaceError, match="expected a path inside this folder"):
        folder.write_bytes(relative, b"")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a\0b"])
def test_folder_names_are_plain(name: str):
    with pytest.raises(WorkspaceError, match="expected a plain folder name"):
        checked_name(name)


def test_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    atomic_write(path, b"old")
    path.parent.chmod(0o755)
    with pytest.raises(TypeError):
        atomic_write(path, "not bytes")  # type: ignore[arg-type]

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_where_a_folder_is_needed(tmp_path: Path):
    (tmp_path / "runs").write_text("")

    with pytest.raises(WorkspaceError, match="A file stands where a folder is needed"):
        Workspace(tmp_path / "runs").stage("notes", "weapon").append({"key": "a"})


def test_one_writer_at_a_time(tmp_path: Path):
    with lock(tmp_path), pytest.raises(WorkspaceError, match="another dagkit process is writing here"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_killed_writer_loses_at_most_the_last_row(tmp_path: Path):
    script = f"""
import os, itertools
from dagkit.workspace import Workspace
folder = Workspace({str(tmp_path)!r}).stage("notes", "weapon")
for index in itertools.count():
    folder.write_bytes(f"files/{{index}}", b"x" * 1000)
    folder.append({{"key": str(index)}})
    print(index, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(20)]
    process.kill()
    process.communicate()

    folder = Workspace(tmp_path).stage("notes", "weapon")
    keys = [row["key"] for row in folder.rows()]
    assert keys[: len(seen)] == [line.strip() for line in seen]
    assert all((folder.path / "files" / key).stat().st_size == 1000 for key in keys)


def test_full_disk_is_named_and_loses_nothing(full_disk: Path):
    folder = Workspace(full_disk).stage("notes", "weapon")
    folder.write_bytes("a", b"kept")
    folder.append({"key": "a"})

    with pytest.raises(
        WorkspaceError, match=r"no space left on device\. Free some space and run the same command again"
    ):
        folder.write_bytes("b", os.urandom(2_000_000))
    assert not (folder.path / "b").exists()
    assert not list(full_disk.rglob("*.part"))
    assert folder.keys() == {"a"}


def test_full_disk_tears_no_row(full_disk: Path):
    folder = Workspace(full_disk).stage("notes", "weapon")
    folder.append({"key": "a"})

    with pytest.raises(WorkspaceError, match="no space left"):
        folder.append({"key": "b", "filler": "x" * 2_000_000})
    assert json.loads(folder.manifest.read_text()) == {"key": "a"}


def test_hashes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")

    assert sha256_file(tmp_path / "a") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": "1"})
