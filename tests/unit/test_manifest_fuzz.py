"""Workspaces from strangers: whatever is done to a file, every stage that reads it goes on, or names it in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagkit import dataset, evaluation
from dagkit.concept import load_concept
from dagkit.errors import DagkitError
from dagkit.evaluation import EvaluationRun
from dagkit.judges.demo import DemoJudge
from dagkit.labelstudio.agreement import agreement
from dagkit.labelstudio.reading import AnswerReader
from dagkit.labelstudio.storage import Upload
from dagkit.segmenters import build_segmenter
from dagkit.stages import export, premask, pull, purge, push
from dagkit.workspace import StageFolder, Workspace
from drawn_workspace import annotate, draw_workspace, premask_of
from interruption import content
from scene_columns import JUDGE, scene_columns, scene_figures

CONCEPT = load_concept("weapon").model_copy(update={"proposers": []})
SEGMENTER = build_segmenter(load_concept("weapon"))
NUM_SPOILT = 12
PROMPTS = evaluation.concept_prompts(CONCEPT, 1)
ANSWER = {"annotator": "annotator-1", "state": "changed", "labels": ["weapon"], "iou_to_premask": 0.9, "seconds": 2.5}
PULLED = {
    "iou_to_premask": 0.9,
    "annotators": ["annotator-1"],
    "seconds": 2.5,
    "created": "2026-11-24T10:00:00.123456Z",
    "updated": "2026-11-24T10:05:00Z",
    "reasons": [],
    "reviewed": {"annotator": "annotator-1", "updated": "2026-11-24T10:05:00Z"},
    "consensus": "majority",
    "pair_ious": [["annotator-1", "annotator-2", 0.8], ["annotator-1", "annotator-3", None]],
    "answers": [ANSWER],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with everything in it that a stage reads."""
    workspace = draw_workspace(tmp_path_factory.mktemp("whole") / "runs", CONCEPT, 3, 2)
    labeling, annotations = (workspace.stage(name, "weapon") for name in ("labeling", "annotations"))
    for index, state in enumerate(["changed", "skipped"]):
        key = f"u{index:03d}"
        annotate(workspace, CONCEPT, key, state, masks={"weapon": premask_of(workspace, CONCEPT, key)},
                 task_id=index, **PULLED)  # fmt: skip
    for index in range(3):
        labeling.append({"key": f"u{index:03d}", "task_id": index})
    project = {"title": "dagkit weapon 1", "url": "http://127.0.0.1:9", "project_id": 1, "page": "sha256:0"}
    labeling.write_json("project.json", project)
    merged = {"project": "dagkit weapon 1", "consensus": "majority", "min_iou": 0.7, "labels": {}}
    annotations.write_json("cursor.json", {"settings": merged, "since": "2026-11-24T10:05:00Z"})
    annotations.write_json("annotators.json", {"1": "annotator-1"})
    annotations.write_json("agreement.json", {"mean_iou": 0.8, "kappa": {"weapon": None}})
    workspace.stage("candidates", "weapon").write_json("purged.json", [])
    samples = workspace.stage("samples", "weapon")
    samples.append({"key": "s", "image": "images/s.png", "is_stopped": False, "guards": [{"is_firing": True}]})
    export.run(workspace, CONCEPT, accept_unreviewed=True)
    run = EvaluationRun(StageFolder(workspace.root / "reports"), PROMPTS, 4)
    run.folder.settings({"seed": 0})
    for _ in evaluation.draw_columns(run, scene_columns(), {JUDGE: DemoJudge.from_concept()}):
        pass
    return workspace.root


def read_generate(workspace: Workspace) -> None:
    workspace.stage("candidates", "weapon").keys()
    workspace.stage("samples", "weapon").rows()


def read_premask(workspace: Workspace) -> None:
    premask.run(workspace, CONCEPT, [], SEGMENTER)


def read_push(workspace: Workspace) -> None:
    push.choose(workspace, CONCEPT, "uncertain", None)
    candidates, premasks = (workspace.stage(name, "weapon") for name in ("candidates", "premasks"))
    images = {row["key"]: row["image"] for row in candidates.present_rows()}
    for row in premasks.rows():
        if row["key"] in images:
            push._task(row["key"], images[row["key"]], row, candidates, premasks, Upload())
    workspace.stage("labeling", "weapon").keys()
    workspace.stage("labeling", "weapon").read_json("project.json")


def read_pull(workspace: Workspace) -> None:
    reader = AnswerReader(workspace, CONCEPT, "majority", 0.7)
    for key in reader.rows:
        if key in reader.images:
            reader._premask(key)
    reader.newly_reviewed()
    agreement(reader.rows.values(), reader.labels)
    pull._with_margin(reader.folder.read_json("cursor.json")["since"])


def read_export(workspace: Workspace) -> None:
    found = dataset.collect(workspace, CONCEPT, accept_unreviewed=True)
    built = dataset.build(found, CONCEPT)
    dataset.summarise(built, CONCEPT, left_out=found.left_out, agreement=found.agreement)


def read_purge(workspace: Workspace) -> None:
    purge.run(workspace, CONCEPT, is_dry_run=False)


def read_evaluate(workspace: Workspace) -> None:
    run = EvaluationRun(StageFolder(workspace.root / "reports"), PROMPTS, 4)
    run.folder.settings({"seed": 0})
    for _ in evaluation.draw_columns(run, scene_columns(), {JUDGE: DemoJudge.from_concept()}):
        pass
    scene_figures(run, scene_columns())


READERS: dict[str, list[Callable[[Workspace], None]]] = {
    "candidates": [read_generate, read_push, read_pull, read_export, read_premask, read_purge],
    "premasks": [read_push, read_pull, read_export, read_premask, read_purge],
    "labeling": [read_push, read_purge],
    "annotations": [read_pull, read_export, read_purge],
    "samples": [read_generate],
    "reports": [read_evaluate],
}
"""Stage whose files are spoilt -> who reads them; those that write come last."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 0.5, float("inf"), 10**400, 2**70, [], [None], [[["x"]]], {}, {"path": "../../x"}),
    *("", "x", "..", "a\0b", "\ud800", "\x1b[31m", "x" * 5000, "images", "manifest.jsonl", "/etc/passwd"),
    *("images/../../../victim.png", "../" * 40 + "victim.png"),
]


def spoil_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flips, cuts, inserts or repeats somewhere."""
    start, end = sorted(rng.integers(0, len(data) + 1, 2))
    match rng.integers(5):
        case 0:
            return data[:start] + bytes([rng.integers(256)]) + data[start + 1 :]
        case 1:
            return data[:start] + data[end:]
        case 2:
            return data[:start] + rng.bytes(8) + data[start:]
        case 3:
            return data + data[start:]
        case _:
            return data * 2


def spoil_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Takes away a field of one line, or gives it another value."""
    lines = data.decode().splitlines() if data.count(b"}\n{") else [data.decode()]
    number = int(rng.integers(len(lines)))
    line = json.loads(lines[number])
    part, parent, at = line, None, None
    while isinstance(part, dict | list) and part and (parent is None or rng.random() < 0.7):
        at = list(part)[rng.integers(len(part))] if isinstance(part, dict) else int(rng.integers(len(part)))
        parent, part = part, part[at]
    if parent is None or rng.random() < 0.1:
        line = VALUES[rng.integers(len(VALUES))]
    elif rng.random() < 0.25:
        del parent[at]
    else:
        parent[at] = VALUES[rng.integers(len(VALUES))]
    lines[number] = json.dumps(line)
    return ("\n".join(lines) + "\n").encode()


def spoil(path: Path, rng: np.random.Generator) -> str:
    """Does something to a file; returns what, for the message of a test that fails."""
    data, is_json = path.read_bytes(), path.suffix != ".png"
    kind = (
        rng.choice(["bytes", "json"] if is_json else ["bytes", "header"], p=[0.35, 0.65])
        if rng.random() < 0.9
        else "file"
    )
    if kind == "bytes":
        path.write_bytes(spoil_bytes(data, rng))
    elif kind == "json":
        path.write_bytes(spoil_json(data, rng))
    elif kind == "header":  # sizes, depth, colour type and their checksum
        path.write_bytes(data[:16] + spoil_bytes(data[16:40], rng) + data[40:])
    else:
        path.unlink()
        kind = rng.choice(["pipe", "folder", "link", "circle", "gone"])
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "link":
                path.symlink_to(path.parents[4] / "victim.png")
            case "circle":
                path.symlink_to(path.name)
    return f"{kind}: {path.name}"


def refusal(read: Callable[[Workspace], None], root: Path) -> str | None:
    """What dagkit's own error says, or None where it goes on; any other error is a bug."""
    try:
        read(Workspace(root))
    except DagkitError as error:
        return str(error)
    return None


@pytest.mark.parametrize("stage", READERS)
def test_whatever_is_spoilt_is_named_in_one_line(stage: str, whole: Path, tmp_path: Path):
    victim = tmp_path / "victim.png"
    victim.write_bytes(next((whole / "candidates").rglob("*.png")).read_bytes())
    files = sorted(path.relative_to(whole) for path in (whole / stage).rglob("*") if path.is_file())
    manifests = [file for file in files if file.suffix != ".png"]
    num_refused = 0
    for seed in range(NUM_SPOILT):
        rng = np.random.default_rng([seed, len(stage)])
        root = tmp_path / f"runs-{seed}"
        shutil.copytree(whole, root)
        if stage == "candidates" and seed % 2:
            shutil.rmtree(root / "premasks")  # else all is pre-masked already, and no image is read
        some = manifests if seed % 4 else files
        done = spoil(root / some[rng.integers(len(some))], rng)
        for read in READERS[stage]:
            before = content(root)
            message = refusal(read, root)
            if message is None:
                continue
            num_refused += 1
            assert (message.isprintable(), len(message) < 1000) == (True, True), (seed, done, message)
            after = content(root)
            if read is read_premask:  # finishes all others
                after = {name: after.get(name) for name in before}
            assert after == before, (seed, done, read)
    assert victim.exists()
    assert num_refused > NUM_SPOILT // 4
