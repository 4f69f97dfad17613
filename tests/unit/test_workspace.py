"""A workspace never loses finished work, and never holds half a file."""

import json
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dagkit import manifests
from dagkit.errors import WorkspaceError
from dagkit.workspace import (
    StageFolder,
    Workspace,
    atomic_write,
    checked_name,
    checked_root,
    lock,
    sha256_file,
    sha256_json,
)


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


OUTSIDE = [
    "../x",
    "/etc/passwd",
    "images/../../x",
    "images/../x",
    "",
    "a\0b",
    "\ud800/../x",
    "x" * 2000,
    "out/x",
    "circle",
]


@pytest.mark.parametrize("relative", OUTSIDE)
def test_paths_stay_inside(folder: StageFolder, relative: str):
    folder.path.mkdir(parents=True)
    (folder.path / "out").symlink_to(folder.path.parent)
    (folder.path / "circle").symlink_to("circle")
    ways = [folder.inside, folder.has, folder.read_image, folder.read_json, lambda path: folder.write_bytes(path, b"")]
    for way in ways:
        with pytest.raises(WorkspaceError, match="expected a path inside this folder") as caught:
            way(relative)
        assert len(str(caught.value)) < 500


def test_a_path_inside_stays_what_it_is(folder: StageFolder):
    folder.write_bytes("images/a.png", b"x")
    (folder.path / "images" / "b.png").symlink_to("a.png")

    assert folder.inside("images/b.png") == folder.path / "images" / "b.png"
    assert folder.inside(str(folder.path / "images/a.png")[1:]) == folder.path / str(folder.path / "images/a.png")[1:]


def test_nothing_is_written_through_a_manifest_that_is_a_link(folder: StageFolder, tmp_path: Path):
    folder.path.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("torn")
    folder.manifest.symlink_to(victim)

    for act in (folder.rows, lambda: folder.append({"key": "a"})):
        with pytest.raises(WorkspaceError, match=r"expected a path inside this folder, but got 'manifest\.jsonl'"):
            act()
    assert victim.read_text() == "torn"


@pytest.mark.parametrize("name", ["manifest.jsonl", "settings.json", "purged.json", "images/a.png"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_file_that_is_none_is_named_at_once(folder: StageFolder, name: str, kind: str):
    path = folder.path / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    read = {
        "manifest.jsonl": [folder.rows, lambda: folder.append({"key": "a"})],
        "settings.json": [lambda: folder.settings({})],
        "purged.json": [folder.present_rows],
        "images/a.png": [lambda: folder.read_image(name)],
    }
    for act in read[name]:
        with pytest.raises(WorkspaceError, match=rf"{name}: (expected a plain file|cannot be written: is a directory)"):
            act()


def test_a_key_stands_once(folder: StageFolder):
    folder.append({"key": "a"})
    folder.append({"key": "b"})
    folder.manifest.write_bytes(folder.manifest.read_bytes() * 2)

    with pytest.raises(WorkspaceError, match=r"line 3: expected each key once, but 'a' is in line 1, too"):
        folder.rows()


ROW = {
    "key": "a",
    "image": "images/a.png",
    "prompt": "a cat",
    "kind": "safe",
    "seed": 1,
    "model": "demo",
    "model_fingerprint": "sha256:0",
    "settings": {},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "../x"}, r"image: expected a path inside this folder, but got '\.\./x'"),
        ({"image": "a\0b"}, r"image: expected a path inside this folder"),
        ({"image": None}, r"image: expected a string, but got None"),
        ({"seed": "1"}, r"seed: expected a integer, but got '1'"),
        ({"seed": -1}, r"seed: expected greater than or equal to 0|seed: .*-1"),
        ({"seed": True}, r"seed: .*True"),
        ({"kind": "unsave"}, r"kind: expected 'unsafe', 'hinted' or 'safe', but got 'unsave'"),
        ({"settings": {"width": 1e3}}, r"settings\.width: .*1000\.0"),
        ({"settings": []}, r"settings: "),
        ({"key": "a/b"}, r"key: expected a name without '/'"),
        ({"key": "x" * 200}, r"key: expected a name without '/' of at most 160 bytes"),
        ({"key": 3}, r"key: expected a string, but got 3"),
        ({"seed": 10**400}, r"seed: "),
        ({"prompt": ["x" * 100] * 1000}, r"prompt: expected a string, but got \['x"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, changes: dict, message: str):
    folder = Workspace(tmp_path).stage("candidates", "weapon")
    folder.append(ROW | {"key": "first"})
    folder.append(ROW | changes)
    with pytest.raises(WorkspaceError, match=rf"manifest\.jsonl, line 2: {message}") as caught:
        folder.rows()
    assert len(str(caught.value)) < 600

    missing = dict(ROW)
    del missing["image"]
    folder.manifest.write_text(json.dumps(missing) + "\n")
    with pytest.raises(WorkspaceError, match=r"manifest\.jsonl, line 1: image: missing\. Delete that line"):
        folder.keys()


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": "a", "x": NaN}',
        b'{"key": "a", "x": "\\ud800"}',
        b'{"key": "a", "key": "b"}',
        b"[" * 100_000,
        b'"key"',
        b"\xff",
    ],
)
def test_json_that_could_be_read_in_two_ways_is_none(folder: StageFolder, line: bytes):
    folder.path.mkdir(parents=True)
    folder.manifest.write_bytes(line + b"\n")

    with pytest.raises(WorkspaceError, match=r"line 1: expected a JSON object with a 'key'") as caught:
        folder.rows()
    assert len(str(caught.value)) < 600


def test_nothing_is_written_that_could_not_be_read(folder: StageFolder):
    for value in (float("nan"), float("inf"), "\ud800"):
        with pytest.raises(WorkspaceError, match="expected finite numbers and whole characters"):
            folder.append({"key": "a", "score": value})
        with pytest.raises(WorkspaceError, match="expected finite numbers and whole characters"):
            folder.write_json("a.json", {"score": value})
    assert not folder.path.exists()


@pytest.mark.parametrize(("name", "value"), [("purged.json", {}), ("settings.json", []), ("annotators.json", {"1": 2}),
                                             ("cursor.json", {"settings": {"consensus": "all"}, "since": None}),
                                             ("project.json", {"title": "x", "project_id": 1}),
                                             ("agreement.json", {"kappa": {"x": "y"}})])  # fmt: skip
def test_other_files_have_schemas_too(folder: StageFolder, name: str, value: object):
    folder.write_json(name, value)

    with pytest.raises(WorkspaceError, match=rf"{name}: .*Delete the file and run its stage again"):
        folder.read_json(name)


def test_settings_of_any_length_are_told_in_short(folder: StageFolder):
    folder.settings({"prompts": ["x" * 1000] * 50, "a": 1, "b": 1, "c": 1, "d": 1})

    with pytest.raises(WorkspaceError, match=r"a was 1, now None; b was 1.*; and 2 more\. Use the same") as caught:
        folder.settings({})
    assert len(str(caught.value)) < 500


def test_images_that_are_bombs_or_lie_are_named(folder: StageFolder):
    image = Image.new("L", (8, 8))
    folder.write_image("a.png", image)
    data = bytearray((folder.path / "a.png").read_bytes())

    def with_size(width: int, height: int) -> bytes:
        header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes(data[24:29])
        return bytes(data[:12]) + header + zlib.crc32(header).to_bytes(4, "big") + bytes(data[33:])

    sizes = [with_size(*size) for size in [(0, 8), (10_000, 10_000), (100_000, 100_000), (2**31 - 1, 2)]]
    spoilt = [*sizes, bytes(data[:40]), bytes(data[:12]) + b"IDAT" + bytes(data[16:]), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    for wrong in spoilt:
        folder.write_bytes("a.png", wrong)
        with pytest.raises(WorkspaceError, match=r"a\.png: expected an image, but it cannot be read"):
            folder.read_image("a.png")


def test_a_mask_is_as_large_as_its_image(folder: StageFolder):
    folder.write_image("a.png", Image.new("L", (8, 4), 255))
    assert folder.read_mask("a.png", (8, 4)).all()
    with pytest.raises(WorkspaceError, match=r"a\.png: expected a mask of 4x8 px, as large as its image, but got 8x4"):
        folder.read_mask("a.png", (4, 8))


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


WRITER = """
import os, sys
from pathlib import Path
from dagkit.workspace import atomic_write, lock
os.fsync = lambda _: (print("half", flush=True), sys.stdin.read())  # stops before the file is renamed
with lock(Path(sys.argv[1]), writes_below=Path(sys.argv[2])):
    atomic_write(Path(sys.argv[2]) / "images" / "a.png", b"half")
"""


def half_written(folder: Path, below: Path) -> subprocess.Popen[str]:
    """A process that holds a lock and is in the middle of writing a file."""
    line = [sys.executable, "-c", WRITER, folder, below]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_lock_sweeps_what_its_killed_holder_left_and_nothing_else(tmp_path: Path):
    mine, other = tmp_path / "shard-1-of-2", tmp_path / "shard-2-of-2"
    users = [tmp_path / ".film.part", tmp_path / "images" / ".a.png.x1.part", tmp_path / "images" / "b.part"]
    killed, living = half_written(mine, tmp_path), half_written(other, tmp_path)
    for path in users:
        path.write_bytes(b"mine")
    parts = set(tmp_path.rglob("*.part")) - set(users)
    assert len(parts) == 2
    killed.kill()
    killed.communicate()

    with lock(tmp_path):  # of the folder above: nothing there is its own
        assert parts <= set(tmp_path.rglob("*.part"))
    with lock(mine, writes_below=tmp_path):
        assert len(parts & set(tmp_path.rglob("*.part"))) == 1
    living.communicate()
    assert living.returncode == 0
    assert (tmp_path / "images" / "a.png").read_bytes() == b"half"
    assert [path.read_bytes() for path in users] == [b"mine"] * 3
    assert set(tmp_path.rglob("*.part")) == set(users)


def test_a_lock_leaves_nothing_behind_but_what_was_there(tmp_path: Path):
    with pytest.raises(WorkspaceError), lock(tmp_path / "runs" / "dataset"):
        raise WorkspaceError("nothing was written")
    assert list(tmp_path.iterdir()) == []

    users = tmp_path / ".lock"
    users.write_text("of another program")
    with lock(tmp_path):
        pass
    assert users.read_text() == "of another program"

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").symlink_to(users)
    with (
        pytest.raises(WorkspaceError, match="A symbolic link stands where there must be none"),
        lock(tmp_path / "other"),
    ):
        pass
    assert users.read_text() == "of another program"


def test_a_patient_writer_waits(tmp_path: Path):
    held, done = threading.Event(), []

    def hold() -> None:
        with lock(tmp_path):
            held.set()
            time.sleep(0.3)
            done.append("first")

    first = threading.Thread(target=hold)
    first.start()
    held.wait()
    with lock(tmp_path, patience_s=60):
        done.append("second")
    first.join()
    assert done == ["first", "second"]


def test_many_writers_take_turns(tmp_path: Path):
    """Each deletes the lock's file and, where it is empty, the folder: nobody is let in twice, and nobody stumbles."""
    inside, most, done = [0], [0], []

    def write() -> None:
        for _ in range(20):
            with lock(tmp_path / "a" / "b", patience_s=60):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1
        done.append(True)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (most, len(done)) == ([1], 4)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a" * 300, "file name too long. The path is longer than the file system takes"),
        ("/".join(["b" * 200] * 25), "file name too long"),
        ("file/runs", "not a directory. A file stands where a folder is needed"),
        ("file", "not a directory. A file stands where a folder is needed"),
        ("dangling", "the symbolic link leads nowhere"),
        ("circle", "A symbolic link stands where there must be none"),
    ],
)
def test_a_workspace_that_can_never_be_made(tmp_path: Path, path: str, message: str):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.iterdir())

    with pytest.raises(WorkspaceError, match=message) as caught:
        checked_root(tmp_path / path)
    assert len(str(caught.value)) < 700
    folder = Workspace(tmp_path / path).stage("notes", "weapon")
    with pytest.raises(WorkspaceError), lock(folder.path):
        folder.append({"key": "a"})
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may do nothing here")
def test_what_may_not_be_read_or_written_is_named(folder: StageFolder, tmp_path: Path):
    folder.append({"key": "a"})
    folder.path.chmod(0o700)
    os.seteuid(65534)
    try:
        acts = [folder.rows, folder.present_rows, lambda: folder.append({"key": "b"}), lambda: folder.has("x"),
                lambda: folder.write_bytes("x", b""), lambda: folder.read_image("a.png"),
                lambda: lock(folder.path).__enter__(), lambda: checked_root(folder.path)]  # fmt: skip
        for act in acts:
            with pytest.raises(WorkspaceError, match=r"permission denied\. You have no right to do that there"):
                act()
    finally:
        os.seteuid(0)


def test_every_stage_with_a_manifest_has_a_schema():
    assert set(manifests.ROWS) == {"candidates", "premasks", "labeling", "annotations", "samples"}


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
