"""Pull and push at servers that answer anything: one clear line or work done rightly, and never a 'safe' by mistake."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from label_studio_server import SIZE, make_reviewable

from dagkit.concept import Concept
from dagkit.errors import DagkitError, LabelStudioError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.config import labelling_config
from dagkit.labelstudio.tasks import prediction
from dagkit.stages import pull, push
from dagkit.workspace import Workspace
from loopback import JSON, Answer, answer, site

TOKEN = "0123456789abcdef0123456789abcdef01234567"
TITLE = "dagkit weapon 00000000"
Spoil = Callable[[str, Any], Answer]


class Server:
    """The few endpoints that pull and push use, over tasks in memory; ``spoil`` may change every answer."""

    def __init__(self, concept: Concept) -> None:
        self.concept = concept
        self.tasks: list[dict[str, Any]] = []
        self.spoil: Spoil = lambda _, body: answer(200, body)

    def respond(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        parts = urlsplit(path)
        name, query = self._name(method, parts.path), parse_qs(parts.query)
        return self.spoil(name, getattr(self, f"_{name}")(query))

    def _name(self, method: str, path: str) -> str:
        last = path.rstrip("/").rpartition("/")[2]
        if last == "projects":
            return "created" if method == "POST" else "projects"
        if last == "import":
            return "imported"
        return {"file-uploads": "uploads"}.get(last, last) if not last.isdigit() else "project"

    def _version(self, query: dict[str, list[str]]) -> Any:
        return {"label-studio-os-package": {"version": "1.23.2"}}

    def _whoami(self, query: dict[str, list[str]]) -> Any:
        return {"id": 1}

    def _projects(self, query: dict[str, list[str]]) -> Any:
        found = [{"id": 1, "title": TITLE}] if query["title"] == [TITLE] else []
        return {"results": found, "count": len(found)}

    def _created(self, query: dict[str, list[str]]) -> Any:
        return {"id": 2}

    def _views(self, query: dict[str, list[str]]) -> Any:
        return {"id": 1}

    def _project(self, query: dict[str, list[str]]) -> Any:
        return {"id": 1, "label_config": labelling_config(self.concept), "maximum_annotations": 1}

    def _tasks(self, query: dict[str, list[str]]) -> Any:
        keep = {"id", *query["include"][0].split(",")}
        return {"tasks": [{k: v for k, v in one.items() if k in keep} for one in self.tasks], "total": len(self.tasks)}

    def _export(self, query: dict[str, list[str]]) -> Any:
        return [one for one in self.tasks if str(one["id"]) in query["ids[]"]]

    def _uploads(self, query: dict[str, list[str]]) -> Any:
        return [{"file": "upload/1/00000000-x.png"}]

    def _imported(self, query: dict[str, list[str]]) -> Any:
        return {"file_upload_ids": [1]} if "commit_to_project" in query else {"task_ids": [7]}


def annotation(number: int, result: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": number,
        "completed_by": {"id": 1},
        "result": result,
        "was_cancelled": False,
        "lead_time": 2.5,
        "created_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-02T00:00:00Z",
        "prediction": {},
    }


def square(label: str, kind: str = "rectanglelabels", **changes: Any) -> dict[str, Any]:
    value = {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, kind: [label]}
    whole = {"id": "r", "type": kind, "original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0}
    return {**whole, "value": value, **changes}


@pytest.fixture
def workspace(tmp_path: Path, concept: Concept) -> Workspace:
    workspace = make_reviewable(tmp_path / "runs", concept, 3)
    workspace.stage("labeling", concept.name).write_json("project.json", {"title": TITLE})
    return workspace


@pytest.fixture
def scripted(workspace: Workspace, concept: Concept) -> Server:
    server = Server(concept)
    rng = np.random.default_rng(0)
    label = concept.labels.positive[0]
    for number, row in enumerate(workspace.stage("candidates", concept.name).rows()):
        brush = prediction({label: rng.random((SIZE[1], SIZE[0])) < 0.5}, {}, model_version="x")["result"]
        task = {
            "id": number + 1,
            "data": {"key": row["key"], "image": "/data/a.png"},
            "updated_at": "2026-01-02T00:00:00Z",
        }
        server.tasks.append({**task, "annotations": [annotation(number + 1, [*brush, square(label)])]})
    return server


@contextmanager
def connected(server: Server) -> Iterator[Client]:
    with site(server.respond) as url, Client(url, TOKEN, patience_s=0) as client:
        yield client


def states(workspace: Workspace, concept: Concept) -> dict[str, str]:
    return {row["key"]: row["state"] for row in workspace.stage("annotations", concept.name).rows()}


FOREIGN: dict[str, Callable[[str], dict[str, Any]]] = {
    "keypoint": lambda label: square(label, "keypointlabels"),
    "unknown kind": lambda label: square(label, "hologramlabels"),
    "turned": lambda label: square(label, image_rotation=90),
    "no label": lambda label: square(label, value={"x": 1, "y": 1, "width": 9, "height": 9}),
    "beside the image": lambda label: square(
        label, value={"x": 200, "y": 1, "width": 9, "height": 9, "rectanglelabels": [label]}
    ),
    "truncated brush": lambda label: square(
        label, "brushlabels", value={"format": "rle", "rle": [0] * 9, "brushlabels": [label]}
    ),
    "another size": lambda label: square(label, original_width=9),
    "huge size": lambda label: square(label, original_width=10**9, original_height=10**9),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_task_that_cannot_be_read_is_never_safe(scripted: Server, workspace: Workspace, concept: Concept, case: str):
    """Neither when it is new, nor when an earlier pull had taken it for an empty one."""
    scripted.tasks[1]["annotations"] = [annotation(9, [])]
    with connected(scripted) as client:
        pull.run(workspace, concept, client=client)
        key = scripted.tasks[1]["data"]["key"]
        assert states(workspace, concept)[key] == "empty"

        scripted.tasks[1]["annotations"] = [annotation(9, [FOREIGN[case](concept.labels.positive[0])])]
        with pytest.raises(LabelStudioError) as caught:
            pull.run(workspace, concept, client=client)
        assert f"task 2 ({key})" in str(caught.value)
        assert "(1 of 3 tasks were left out; pull again then.)" in str(caught.value)
        assert states(workspace, concept) == dict.fromkeys(
            [scripted.tasks[0]["data"]["key"], scripted.tasks[2]["data"]["key"]], "changed"
        )

        scripted.tasks[1]["annotations"] = [annotation(9, [square(concept.labels.positive[0])])]
        pull.run(workspace, concept, client=client)
        assert states(workspace, concept)[key] == "changed"


def test_what_an_older_dagkit_took_for_empty_is_read_anew(scripted: Server, workspace: Workspace, concept: Concept):
    with connected(scripted) as client:
        pull.run(workspace, concept, client=client)
        folder = workspace.stage("annotations", concept.name)
        cursor = folder.read_json("cursor.json")
        del cursor["settings"]["reader"]
        folder.write_json("cursor.json", {**cursor, "since": "2099-01-01T00:00:00+00:00"})
        rows = [{**row, "state": "empty", "masks": {}} for row in folder.rows()]
        folder.write_bytes("manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        pull.run(workspace, concept, client=client)
    assert set(states(workspace, concept).values()) == {"changed"}


JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**18,
    10**40,
    1e308,
    "",
    "x" * 5000,
    "\0",
    "../../x",
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
)


def mutated(body: Any, rng: random.Random) -> Any:
    """A copy in which one part, anywhere, is something else or gone."""
    body = copy.deepcopy(body)
    parent, place = None, None
    node = body
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
        parent, place = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[place]
    if parent is None or rng.random() < 0.1:
        return rng.choice(JUNK)
    if rng.random() < 0.25:
        del parent[place]
    else:
        parent[place] = rng.choice(JUNK)
    return body


def spoilt(body: Any, rng: random.Random) -> Answer:
    whole = json.dumps(body).encode()
    match rng.randrange(12):
        case 0:
            return 200, JSON, whole[: rng.randrange(len(whole))]
        case 1:
            return 200, {"Content-Type": "text/html"}, b"<html>\n<p>Welcome</p>" + b"x" * rng.choice([0, 10_000])
        case 2:
            return (
                200,
                JSON,
                rng.choice([b"[" * 100_000, b"NaN", b'{"id": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"1e999"]),
            )
        case 3:
            return 200, {**JSON, "Content-Encoding": "gzip"}, whole
        case _:
            return answer(200, mutated(body, rng))


def assert_clear(error: DagkitError) -> None:
    """One line of bounded length, which tells no secret."""
    assert "\n" not in str(error)
    assert len(str(error)) < 1500
    assert TOKEN not in str(error)


@pytest.mark.parametrize("endpoint", ["version", "whoami", "projects", "tasks", "export"])
def test_fuzzed_answers_to_pull(scripted: Server, workspace: Workspace, concept: Concept, endpoint: str):
    rng = random.Random(endpoint)
    num = 40 if endpoint == "export" else 12
    with connected(scripted) as client:
        pull.run(workspace, concept, client=client)
        before = workspace.stage("annotations", concept.name).rows()
        failed = 0
        for _ in range(num):
            folder = workspace.stage("annotations", concept.name)
            (folder.path / "cursor.json").unlink(missing_ok=True)  # all is asked for again
            folder.write_bytes("manifest.jsonl", b"")
            scripted.spoil = lambda name, body: spoilt(body, rng) if name == endpoint else answer(200, body)
            try:
                client.check()
                pull.run(workspace, concept, client=client, review=True)
            except DagkitError as error:
                failed += 1
                assert_clear(error)
                if endpoint != "export":
                    assert folder.rows() == []
            for row in folder.rows():
                assert all((folder.path / path).is_file() for path in row["masks"].values())
    assert failed >= (0 if endpoint == "whoami" else num // 3)
    assert len(before) == 3


@pytest.mark.parametrize("endpoint", ["projects", "project", "tasks", "uploads", "imported", "created"])
def test_fuzzed_answers_to_push(scripted: Server, workspace: Workspace, concept: Concept, endpoint: str):
    rng = random.Random(endpoint)
    scripted.tasks = scripted.tasks[:2]  # one is to be sent
    folder = workspace.stage("labeling", concept.name)
    with connected(scripted) as client:
        for _ in range(10):
            folder.write_json("project.json", {"title": TITLE if endpoint != "created" else "another"})
            folder.write_bytes("manifest.jsonl", b"")
            scripted.spoil = lambda name, body: spoilt(body, rng) if name == endpoint else answer(200, body)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("dagkit.labelstudio.tasks._MAX_TRIES", 1)
                try:
                    push.run(workspace, concept, client=client)
                except DagkitError as error:
                    assert_clear(error)
            assert all(row["task_id"] >= 0 for row in folder.rows())


def test_a_server_that_repeats_its_pages_does_not_hang(scripted: Server, workspace: Workspace, concept: Concept):
    scripted.spoil = lambda name, body: answer(200, body | {"total": 10**9} if name == "tasks" else body)
    with connected(scripted) as client, pytest.raises(LabelStudioError, match="page 2 is one that was there before"):
        pull.run(workspace, concept, client=client)
