"""What a user names as a target stays theirs: only what dagkit itself put into a folder is ever replaced."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from click.testing import CliRunner, Result
from datasets import DatasetDict

from dagkit import dataset
from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.dataset.replacing import EXPORT, MARKER, PUSH, foreign_names, replacement
from dagkit.errors import DatasetError
from dagkit.stages import export
from dagkit.workspace import Workspace
from drawn_workspace import draw_workspace

datasets.disable_progress_bars()
CONCEPT = load_concept("weapon")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = draw_workspace(tmp_path_factory.mktemp("runs"), CONCEPT, 4, 2)
    export.run(workspace, CONCEPT, accept_unreviewed=True)
    return workspace


@pytest.fixture(scope="module")
def built(workspace: Workspace) -> DatasetDict:
    return dataset.build(dataset.collect(workspace, CONCEPT, accept_unreviewed=True), CONCEPT)


def push(target: Path, workspace: Workspace) -> Result:
    return CliRunner().invoke(command, ["dataset", "push", str(target), str(workspace.root / "dataset" / "weapon")])


def all_files(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def a_clone(target: Path) -> None:
    subprocess.run(["git", "init", "--quiet", target], check=True)
    (target / "README.md").write_text("mine")


def a_clone_of_one(target: Path) -> None:
    """In the layout of a dataset, and with the summary of one."""
    (target / "data").mkdir(parents=True)
    (target / "data" / "train-00000-of-00001.parquet").write_bytes(b"mine")
    subprocess.run(["git", "init", "--quiet", target], check=True)
    shipped = dataset.read_summary("weapon-demo")
    (target / "dataset.json").write_text(json.dumps(shipped))


def notes(target: Path) -> None:
    (target / "deep" / "er").mkdir(parents=True)
    (target / "deep" / "er" / "notes.txt").write_text("mine")
    (target / "bell\x07.txt").write_text("mine")


def another_tools(target: Path) -> None:
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(target / "train")
    (target / "dataset_dict.json").write_text('{"splits": ["train"]}')


def a_file(target: Path) -> None:
    target.write_text("mine")


def a_broken_marker(target: Path) -> None:
    target.mkdir()
    (target / MARKER).write_text("[]")
    (target / "notes.txt").write_text("mine")


FOREIGN: dict[Callable[[Path], None], str] = {
    a_clone: "it holds .git, README.md",
    a_clone_of_one: "it holds .git,",
    notes: "it holds 'bell\\x07.txt', deep",
    another_tools: "it holds dataset_dict.json, train",
    a_file: "it is no folder",
    a_broken_marker: f"it holds {MARKER}, notes.txt",
}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_a_folder_that_is_somebodys_is_refused_by_name(
    make: Callable[[Path], None], tmp_path: Path, workspace: Workspace, built: DatasetDict
):
    target = tmp_path / "target"
    make(target)
    before = all_files(tmp_path)
    result = push(target, workspace)
    assert isinstance(result.exception, DatasetError)
    message = str(result.exception)
    assert message.startswith(f"{target}: not replaced: {FOREIGN[make]}")
    assert "\n" not in message
    with pytest.raises(DatasetError, match="not replaced"):
        dataset.save_dataset(built, target, dataset.summarise(built, CONCEPT))
    assert all_files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_export_leaves_a_folder_alone_that_is_not_its_own(tmp_path: Path):
    workspace = draw_workspace(tmp_path, CONCEPT, 3, 2)
    theirs = tmp_path / "dataset" / "weapon" / "sword.jpg"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")
    with pytest.raises(DatasetError, match=r"dataset/weapon: not replaced: it holds sword.jpg, which `dagkit export`"):
        export.run(workspace, CONCEPT, accept_unreviewed=True)
    assert all_files(theirs.parent) == {"sword.jpg": b"mine"}


@pytest.mark.parametrize("writer", [EXPORT, PUSH], ids=lambda writer: writer.command)
def test_what_was_added_or_edited_since_is_not_replaced(writer, tmp_path: Path, built: DatasetDict):
    target, summary = tmp_path / "target", dataset.summarise(built, CONCEPT)
    write = dataset.save_dataset if writer is EXPORT else dataset.write_parquet
    write(built, target, summary)
    write(built, target, summary)
    data = next(path for path in target.rglob("*") if path.suffix in {".arrow", ".parquet"})
    litter = data.with_name("cache-0123.arrow")
    litter.touch()  # as `datasets` leaves it beside what it reads
    assert foreign_names(target, writer) == []

    subprocess.run(["git", "init", "--quiet", target], check=True)
    (data.parent / "notes.txt").write_text("mine")
    (target / "README.md").write_text("my own words")
    beside = (data.parent / "notes.txt").relative_to(target).as_posix()
    before = all_files(tmp_path)
    with pytest.raises(
        DatasetError, match=rf"not replaced: it holds .git, README.md, {beside}, which `{writer.command}`"
    ):
        write(built, target, summary)
    assert all_files(tmp_path) == before

    shutil.rmtree(target / ".git")
    (data.parent / "notes.txt").unlink()
    (target / "README.md").unlink()
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(DatasetError, match="not replaced: it holds"):
        write(built, target, summary)


def test_one_command_never_replaces_what_another_made(tmp_path: Path, workspace: Workspace, built: DatasetDict):
    """`dataset push OWN hf://...` by somebody who means the other way round costs nothing."""
    own = workspace.root / "dataset" / "weapon"
    before = all_files(own)
    result = push(own, workspace)
    assert isinstance(result.exception, DatasetError)
    assert "`dagkit export` made this dataset, and `dagkit dataset push` would put another in its place" in str(
        result.exception
    )
    assert all_files(own) == before
    (tmp_path / "pushed").mkdir()  # an empty folder is free
    assert push(tmp_path / "pushed", workspace).exit_code == 0
    assert push(tmp_path / "pushed", workspace).exit_code == 0
    with pytest.raises(DatasetError, match="`dagkit dataset push` made this dataset"):
        dataset.save_dataset(built, tmp_path / "pushed", dataset.summarise(built, CONCEPT))


def test_datasets_of_a_dagkit_without_marker_are_known(tmp_path: Path, built: DatasetDict):
    for write in (dataset.save_dataset, dataset.write_parquet):
        target, summary = tmp_path / write.__name__, dataset.summarise(built, CONCEPT)
        write(built, target, summary)
        (target / MARKER).unlink()
        write(built, target, {**summary, "note": "newer"})
        assert dataset.read_summary(target)["note"] == "newer"
        (target / MARKER).unlink()
        (target / "notes.txt").write_text("mine")
        with pytest.raises(DatasetError, match=r"not replaced: it holds notes\.txt"):
            write(built, target, summary)


def test_what_lies_beside_the_target_is_left_alone(tmp_path: Path, workspace: Workspace):
    target = tmp_path / "a[b]*"
    theirs = {".a[b]*.x.partial": "mine", ".a[b]*.y.partial": "mine", ".aab.z.partial": "mine"}
    for name, text in theirs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(text)
    dead = tmp_path / ".a[b]*.k.partial"
    dead.mkdir()
    (dead / MARKER).write_text('{"made_by": "dagkit dataset push", "files": {}}')
    (dead / "half").write_bytes(b"x")
    assert push(target, workspace).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, target.name])
    assert all((tmp_path / name / "notes.txt").read_text() == text for name, text in theirs.items())

    old = tmp_path / ".a[b]*.old"
    old.mkdir()
    (old / "notes.txt").write_text("mine")
    result = push(target, workspace)
    assert isinstance(result.exception, DatasetError)
    assert f"{old}: not replaced: it holds notes.txt" in str(result.exception)
    assert (old / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, workspace: Workspace):
    link, place = tmp_path / "link", tmp_path / "place"
    link.symlink_to(place)
    for _ in range(2):
        assert push(link, workspace).exit_code == 0
        assert link.is_symlink()
        assert sum(map(len, dataset.load_dataset(place).values())) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path, workspace: Workspace):
    live, dead = tmp_path / ".target.a.partial", tmp_path / ".target.b.partial"
    for folder in (live, dead):
        folder.mkdir()
        (folder / MARKER).write_text("{}")
    descriptor = os.open(live, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert push(tmp_path / "target", workspace).exit_code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, "target"]
    finally:
        os.close(descriptor)
    assert push(tmp_path / "target", workspace).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_came_while_it_was_written_is_not_replaced(tmp_path: Path):
    target = tmp_path / "target"
    with contextlib.ExitStack() as stack:
        (stack.enter_context(replacement(target, PUSH)) / "README.md").write_text("new")
        notes(target)
        with pytest.raises(DatasetError, match="not replaced: it holds"):
            stack.close()
    assert set(all_files(tmp_path)) == {"target/deep/er/notes.txt", "target/bell\x07.txt"}


@pytest.mark.parametrize("target", [".", "/", "/proc/self", "a/file/target", "x" * 300])
def test_places_that_cannot_be_written_are_named(
    target: str, tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    result = push(Path(target), workspace)
    assert isinstance(result.exception, DatasetError), result.exception
    assert "not replaced" in str(result.exception) or "cannot be written" in str(result.exception)
    assert all_files(tmp_path) == {"a/file": b"mine"}
