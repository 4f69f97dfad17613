"""dataset check, dataset push and purge, on the command line."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from click.testing import CliRunner, Result

from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.dataset import load_dataset, read_summary
from dagkit.errors import DagkitError, DatasetError, WorkspaceError
from dagkit.segmenters import build_segmenter
from dagkit.stages import export, premask, push
from dagkit.workspace import StageFolder, Workspace, lock
from drawn_workspace import annotate, draw_workspace, premask_of
from interruption import content, finish, kill_when
from loopback_hub import ACCESS_TOKEN, running_hub

datasets.disable_progress_bars()
CONCEPT = load_concept("weapon")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return draw_workspace(tmp_path / "runs", CONCEPT, 8, 4)


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, DagkitError | SystemExit):
        raise result.exception
    return result


def test_export_prefers_annotations_and_grows_in_place(workspace: Workspace):
    for index in range(5):
        key = f"u{index:03d}"
        annotate(workspace, CONCEPT, key, "accepted", masks={"weapon": premask_of(workspace, CONCEPT, key)})
    first = export.run(workspace, CONCEPT)
    assert (first.done, first.skipped, first.data["left_out"]) == (5, 7, {"not reviewed yet": 7})
    before = {key: split for split, rows in load_dataset(first.data["path"]).items() for key in rows["key"]}

    second = export.run(workspace, CONCEPT, accept_unreviewed=True)
    assert second.data["review_states"] == {"accepted": 5, "unreviewed": 7}
    assert "7 of them UNREVIEWED" in second.message
    after = {key: split for split, rows in load_dataset(second.data["path"]).items() for key in rows["key"]}
    assert {key: after[key] for key in before} == before


def test_a_broken_image_leaves_the_older_dataset_alone(workspace: Workspace):
    first = export.run(workspace, CONCEPT, accept_unreviewed=True)
    workspace.stage("candidates", "weapon").inside("images/u003.png").write_bytes(b"")
    with pytest.raises(WorkspaceError, match=r"u003\.png: expected an image"):
        export.run(workspace, CONCEPT, accept_unreviewed=True)
    assert sum(map(len, load_dataset(first.data["path"]).values())) == 12


def test_a_damaged_older_dataset_is_not_replaced_unasked(workspace: Workspace):
    """Nobody would know any more which rows were kept for tests."""
    folder = export.run(workspace, CONCEPT, accept_unreviewed=True).data["path"]
    (folder / "train" / "state.json").write_text("[]")
    error = invoke("export", "--concept", "weapon", "--unreviewed", "--workspace", workspace.root).exception
    assert isinstance(error, DatasetError)
    assert str(error).endswith(f"If it cannot be restored, delete {folder} first: its rows get new splits.")
    shutil.rmtree(folder)
    assert export.run(workspace, CONCEPT, accept_unreviewed=True).done == 12


@pytest.mark.slow
def test_export_killed_half_way(workspace: Workspace, tmp_path: Path):
    where = ["export", "--concept", "weapon", "--unreviewed", "--json", "--workspace"]
    shutil.copytree(workspace.root, tmp_path / "undisturbed")
    finish(*where, tmp_path / "undisturbed")
    folder = workspace.root / "dataset"
    kill_when(lambda: any(folder.glob(".weapon.*.partial/train")), *where, workspace.root)
    assert not (folder / "weapon").exists()

    finish(*where, workspace.root)
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == ["weapon"]
    roots = (workspace.root, tmp_path / "undisturbed")
    summaries = [json.loads((root / "dataset/weapon/dataset.json").read_text()) for root in roots]
    assert summaries[0] == summaries[1]
    assert load_dataset(folder / "weapon")


def test_a_full_disk_is_named_and_the_next_run_goes_on(full_disk: Path):
    workspace = draw_workspace(full_disk / "runs", CONCEPT, 4, 2)
    with contextlib.suppress(OSError), (full_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(DagkitError, match=r"(?i)cannot be written: .*no space left on device"):
        export.run(workspace, CONCEPT, accept_unreviewed=True)
    (full_disk / "filler").unlink()
    assert not list(full_disk.rglob("*.partial"))
    assert export.run(workspace, CONCEPT, accept_unreviewed=True).done == 6


def test_check_tells_each_problem_with_its_key(workspace: Workspace):
    folder = export.run(workspace, CONCEPT, accept_unreviewed=True).data["path"]
    options = ("dataset", "check", "--concept", "weapon", "--workspace", workspace.root)
    good = invoke(*options)
    assert (good.exit_code, good.output) == (0, "dataset check: 12 rows: 0 errors, 0 warnings\n")

    data = load_dataset(folder)
    key = data["train"]["key"][0]
    data["train"] = data["train"].map(lambda row: {"label": 1 - row["label"]} if row["key"] == key else row)
    data["test"] = datasets.concatenate_datasets([data["test"], data["train"].select([1])])
    bad = workspace.root / "bad"
    data.save_to_disk(bad)
    result = invoke("dataset", "check", bad)
    assert result.exit_code == 1
    assert f"error: train: {key}: " in result.output
    assert f"error: test: {data['train']['key'][1]}: duplicate: its key is in train, too" in result.output
    found = json.loads(invoke("dataset", "check", bad, "--json").stdout)["findings"]
    assert {"empty mask", "mask on safe"} & {finding["problem"] for finding in found if finding["key"] == key}

    missing = invoke("dataset", "check", workspace.root / "nowhere")
    assert isinstance(missing.exception, DatasetError)
    assert "Give a folder, hf://owner/name, or --concept." in invoke("dataset", "check").output


def test_push_to_a_folder(workspace: Workspace, tmp_path: Path):
    folder = export.run(workspace, CONCEPT, accept_unreviewed=True).data["path"]
    result = invoke("dataset", "push", tmp_path / "published", folder, "--json")
    assert json.loads(result.stdout)["done"] == 12
    pushed = load_dataset(tmp_path / "published")
    assert sum(map(len, pushed.values())) == 12
    names = sorted(
        str(f.relative_to(tmp_path / "published")) for f in (tmp_path / "published").rglob("*") if f.is_file()
    )
    assert names[:2] == ["README.md", "data/test-00000-of-00001.parquet"]


def on_hub(url: str, cache: Path, *arguments: object) -> str:
    """Runs dagkit in a process of its own, for which the Hub is at ``url``; returns what it printed."""
    names = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ACCESS_TOKEN, "HF_HOME": str(cache)}
    names["HF_HUB_DISABLE_XET"] = "1"
    line = [sys.executable, "-m", "dagkit.cli", *map(str, arguments)]
    done = subprocess.run(line, env={**os.environ, **names}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_push_to_the_hub_and_back(workspace: Workspace, tmp_path: Path):
    folder = export.run(workspace, CONCEPT, accept_unreviewed=True).data["path"]
    with running_hub() as hub:
        published = on_hub(hub.url, tmp_path / "a", "dataset", "push", "hf://acme/weapon", folder, "--json")
        assert json.loads(published)["done"] == 12
        repository = hub.repositories["acme/weapon"]
        assert repository.is_private
        files = repository.commits[repository.refs["main"]]
        assert files["README.md"] == (folder / "README.md").read_bytes()
        assert json.loads(files["dataset.json"])["fingerprint"] == read_summary(folder)["fingerprint"]
        checked = on_hub(hub.url, tmp_path / "b", "dataset", "check", "hf://acme/weapon")
    assert checked == "dataset check: 12 rows: 0 errors, 0 warnings\n"


def test_purge_deletes_what_no_dataset_uses_and_only_if_told(workspace: Workspace):
    options = ("purge", "--concept", "weapon", "--workspace", workspace.root)
    assert isinstance(invoke(*options).exception, DatasetError)  # without a dataset everything would go

    for index in range(3):
        key = f"u{index:03d}"
        annotate(workspace, CONCEPT, key, "accepted", masks={"weapon": premask_of(workspace, CONCEPT, key)})
    annotate(workspace, CONCEPT, "u003", "skipped", masks={"weapon": np.ones((64, 64), bool)})
    export.run(workspace, CONCEPT)
    pictures = set(workspace.root.glob("*/weapon/*/*.png"))

    dry = json.loads(invoke(*options, "--json").stdout)
    assert (dry["done"], dry["is_dry_run"], len(dry["files"])) == (0, True, 9 + 5 + 1)
    assert "would be deleted. Add --yes" in dry["message"]
    assert all(path.exists() for path in pictures)

    done = json.loads(invoke(*options, "--yes", "--json").stdout)
    assert done["done"] == 15
    assert {path for path in pictures if not path.exists()} == {Path(file) for file in dry["files"]}
    assert len(workspace.stage("candidates", "weapon").rows()) == 12
    assert sum(map(len, load_dataset(workspace.stage("dataset", "weapon").path).values())) == 3
    assert json.loads(invoke(*options, "--yes", "--json").stdout)["done"] == 0


@pytest.fixture
def purgeable(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A dataset of one image, and files beside the workspace that belong to somebody."""
    annotate(workspace, CONCEPT, "u000", "accepted", masks={"weapon": premask_of(workspace, CONCEPT, "u000")})
    export.run(workspace, CONCEPT)
    (tmp_path / "victim.png").write_bytes(b"mine")
    (tmp_path / "victims").mkdir()
    (tmp_path / "victims" / "u001.png").write_bytes(b"mine")
    return workspace


def rename(folder: StageFolder, key: str, image: str) -> None:
    rows = [row | {"image": image} if row["key"] == key else row for row in folder.rows()]
    folder.manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("images/../../../../victim.png", "image: expected a path inside this folder"),
        ("../../../victim.png", "image: expected a path inside this folder"),
        ("{outside}/victim.png", "image: expected a path inside this folder"),
        ("images/a\0.png", "image: expected a path inside this folder"),
        ("images/link.png", "expected a path inside this folder, but got 'images/link.png'"),
        ("out/u001.png", "expected a path inside this folder, but got 'out/u001.png'"),
        ("purged.png", "names 'purged.png', which is no picture in images/"),
        ("here/manifest.jsonl", "names 'here/manifest.jsonl', which is no picture in images/"),
        ("images/folder.png", "names 'images/folder.png', which is no picture in images/"),
        ("images/notes.txt", "names 'images/notes.txt', which is no picture in images/"),
    ],
)
def test_purge_deletes_nothing_where_a_row_leads_elsewhere(
    image: str, message: str, purgeable: Workspace, tmp_path: Path
):
    folder = purgeable.stage("candidates", "weapon")
    (folder.path / "images" / "link.png").symlink_to(tmp_path / "victim.png")
    (folder.path / "images" / "folder.png").mkdir()
    (folder.path / "images" / "notes.txt").write_text("mine")
    (folder.path / "purged.png").write_text("mine")
    (folder.path / "out").symlink_to(tmp_path / "victims")
    (folder.path / "here").symlink_to(".")
    rename(folder, "u001", image.replace("{outside}", str(tmp_path)))
    before = content(tmp_path)

    for more in ([], ["--yes"]):
        result = invoke("purge", "--concept", "weapon", "--workspace", purgeable.root, *more)
        assert isinstance(result.exception, WorkspaceError)
        assert message in str(result.exception)
    assert content(tmp_path) == before


def test_purge_keeps_a_picture_that_another_row_names_too(purgeable: Workspace):
    folder = purgeable.stage("candidates", "weapon")
    (folder.path / "images" / "again.png").symlink_to("u000.png")
    rename(folder, "u001", "images/u000.png")
    rename(folder, "u002", "images/again.png")
    kept = (folder.path / "images" / "u000.png").read_bytes()

    assert invoke("purge", "--concept", "weapon", "--workspace", purgeable.root, "--yes").exit_code == 0
    assert (folder.path / "images" / "u000.png").read_bytes() == kept
    assert not (folder.path / "images" / "u003.png").exists()


def test_purge_waits_for_nobody_and_deletes_nothing_meanwhile(purgeable: Workspace):
    for stage in ("candidates", "annotations"):
        with lock(purgeable.stage(stage, "weapon").path):
            before = content(purgeable.root)
            result = invoke("purge", "--concept", "weapon", "--workspace", purgeable.root, "--yes")
            assert "another dagkit process is writing here" in str(result.exception)
            assert content(purgeable.root) == before


def test_a_doubled_manifest_exports_nothing(workspace: Workspace):
    manifest = workspace.stage("candidates", "weapon").manifest
    manifest.write_bytes(manifest.read_bytes() * 2)
    before = content(workspace.root)

    result = invoke("export", "--concept", "weapon", "--workspace", workspace.root, "--unreviewed")
    assert "line 13: expected each key once, but 'u000' is in line 1, too" in str(result.exception)
    assert content(workspace.root) == before
    assert not (workspace.root / "dataset").exists()


def test_purge_keeps_what_is_on_its_way_and_later_stages_pass_over_the_rest(workspace: Workspace):
    options = ("--concept", "weapon", "--workspace", workspace.root)

    def accept(key: str) -> None:
        annotate(workspace, CONCEPT, key, "accepted", masks={"weapon": np.ones((64, 64), bool)})

    accept("u000")
    annotate(workspace, CONCEPT, "u001", "cannot_tell")
    export.run(workspace, CONCEPT)
    accept("u002")
    for key in ("u000", "u001", "u002", "u003"):
        workspace.stage("labeling", "weapon").append({"key": key, "task_id": int(key[1:])})
    done = json.loads(invoke("purge", *options, "--yes", "--json").stdout)
    assert (done["num_waiting"], done["num_not_exported"]) == (1, 1)
    assert done["message"].endswith(
        "1 wait for annotators and are kept. 1 have answers that no export has taken up and are kept."
    )
    candidates = workspace.stage("candidates", "weapon")
    kept = ["u000", "u002", "u003"]
    assert [row["key"] for row in candidates.present_rows()] == kept
    assert sorted(path.stem for path in candidates.path.glob("images/*.png")) == kept

    boxes = CONCEPT.model_copy(update={"proposers": []})
    shutil.rmtree(workspace.stage("premasks", "weapon").path)
    assert premask.run(workspace, boxes, [], build_segmenter(CONCEPT)).done == 3
    assert push.choose(workspace, CONCEPT, "all", None) == kept
    assert export.run(workspace, CONCEPT).data["left_out"] == {
        "annotators cannot tell": 1,
        "not reviewed yet": 1,
        "purged": 8,
    }
    accept("u003")
    again = json.loads(invoke("purge", *options, "--yes", "--json").stdout)
    assert (again["done"], again["num_waiting"], again["num_not_exported"]) == (0, 0, 1)


def test_no_row_is_exported_twice(workspace: Workspace):
    candidates = workspace.stage("candidates", "weapon")
    once = candidates.manifest.read_bytes()
    others = once.replace(b'"key":"u', b'"key":"v').replace(b'"key":"s', b'"key":"t')  # the same images by other names
    for index in range(4):
        annotate(workspace, CONCEPT, f"t{index:03d}", "empty")
    options = ("export", "--concept", "weapon", "--unreviewed", "--workspace", workspace.root)
    for more, words in (
        (once, "expected each key once"),
        (others, r"expected each image once, but rows repeat one \(s000, "),
    ):
        candidates.manifest.write_bytes(once + more)
        error = invoke(*options).exception
        assert isinstance(error, DagkitError)
        assert re.search(words, str(error))
        assert not (workspace.root / "dataset" / "weapon").exists()
    candidates.manifest.write_bytes(once)
    assert "export: 12 images" in invoke(*options).output
