"""A stage writes into a folder that is its own or empty, and refuses any other by name before it does anything."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dagkit.concept import load_concept
from dagkit.errors import LabelStudioError, WorkspaceError
from dagkit.segmenters import build_segmenter
from dagkit.stages import premask, pull, push
from dagkit.workspace import StageFolder, Workspace
from drawn_workspace import draw_workspace

CONCEPT = load_concept("weapon")


def run_premask(workspace: Workspace) -> None:
    premask.run(workspace, CONCEPT.model_copy(update={"proposers": []}), [], build_segmenter(CONCEPT))


def run_push(workspace: Workspace) -> None:
    push.run(workspace, CONCEPT, url="http://127.0.0.1:9")


def run_pull(workspace: Workspace) -> None:
    workspace.stage("labeling", "weapon").write_json("project.json", {"title": "x", "url": "http://127.0.0.1:9"})
    pull.run(workspace, CONCEPT)


@pytest.mark.parametrize(
    ("stage", "run"), [("premasks", run_premask), ("labeling", run_push), ("annotations", run_pull)]
)
def test_a_folder_that_is_somebodys_is_refused(stage: str, run: Callable[[Workspace], None], tmp_path: Path):
    workspace = draw_workspace(tmp_path, CONCEPT, 1, 0, with_premasks=stage != "premasks")
    folder = tmp_path / stage / "weapon"
    (folder / "masks").mkdir(parents=True)
    (folder / "masks" / "u000-weapon.png").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        WorkspaceError, match=f"{stage}/weapon: dagkit did not make this folder, and it holds masks, notes"
    ):
        run(workspace)
    assert sorted(path.name for path in folder.iterdir()) == ["masks", "notes.txt"]
    assert (folder / "masks" / "u000-weapon.png").read_text() == "mine"


@pytest.mark.parametrize("mark", [".lock", "manifest.jsonl", "runs/0123/settings.json"])
def test_folders_that_dagkit_made_are_known(mark: str, tmp_path: Path):
    folder = StageFolder(tmp_path / "x")
    folder.claim()
    assert not folder.path.exists()
    folder.path.mkdir()
    folder.claim()
    (folder.path / "images").mkdir()
    with pytest.raises(WorkspaceError, match=r"it holds images\. Nothing was written"):
        folder.claim("runs/*/settings.json")
    (folder.path / mark).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / mark).touch()
    folder.claim("runs/*/settings.json")


def test_what_a_killed_stage_left_is_its_own(tmp_path: Path):
    program = """if True:
        import os, sys
        from pathlib import Path
        from dagkit.workspace import StageFolder, lock
        with lock(Path(sys.argv[1])):
            StageFolder(Path(sys.argv[1])).write_bytes("images/a.png", b"before its first row")
            os._exit(9)
    """
    folder = StageFolder(tmp_path / "x")
    assert subprocess.run([sys.executable, "-c", program, folder.path]).returncode == 9
    assert (folder.path / "images" / "a.png").exists()
    folder.claim()


def test_a_file_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(WorkspaceError, match="A file stands where a folder is needed"):
        StageFolder(tmp_path / "x").claim()


def test_the_rest_of_a_workspace_may_hold_anything(tmp_path: Path):
    """``runs`` is a name that other tools use, too; only a stage's own folder is written into."""
    workspace = draw_workspace(tmp_path, CONCEPT, 1, 0)
    (tmp_path / "detect").mkdir()
    (tmp_path / "labeling").mkdir()
    (tmp_path / "labeling" / "notes.txt").write_text("mine")
    with pytest.raises(LabelStudioError):  # nobody listens there; the folder was no obstacle
        run_push(workspace)
