"""Servers and processes that die in the middle, and bad input: nothing lost, nothing twice, one clear line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from label_studio_server import api, make_reviewable

from dagkit.cli import command
from dagkit.concept import Concept
from dagkit.errors import LabelStudioError, WorkspaceError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.http import ServerUnavailableError
from dagkit.labelstudio.server import EmbeddedServer, Login
from dagkit.stages import export, pull, purge, push
from dagkit.workspace import Workspace
from interruption import content, finish, kill_when, num_rows
from loopback import free_port

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]


def tasks_on_server(login: Login, workspace: Workspace, concept: Concept) -> list[dict]:
    project = workspace.stage("labeling", concept.name).read_json("project.json")
    with api(login) as http:
        query = {"project": http.get("/api/projects", params={"title": project["title"]}).json()["results"][0]["id"]}
        page = http.get("/api/tasks", params={**query, "page_size": 1000, "fields": "all"}).json()
    assert page["total"] == len(page["tasks"])
    return page["tasks"]


def assert_each_exactly_once(login: Login, workspace: Workspace, concept: Concept) -> None:
    premasks = {row["key"]: row for row in workspace.stage("premasks", concept.name).rows()}
    tasks = tasks_on_server(login, workspace, concept)
    assert sorted(task["data"]["key"] for task in tasks) == sorted(premasks)
    for task in tasks:
        labels = [region["value"]["brushlabels"][0] for p in task["predictions"] for region in p["result"]]
        assert labels == list(premasks[task["data"]["key"]]["masks"])
    noted = [(row["key"], row["task_id"]) for row in workspace.stage("labeling", concept.name).rows()]
    assert sorted(noted) == sorted((task["data"]["key"], task["id"]) for task in tasks)
    with api(login) as http:
        assert http.get(tasks[-1]["data"]["image"]).content[:8] == b"\x89PNG\r\n\x1a\n"


class Deadly(Client):
    """Kills the server with SIGKILL at chosen imports: before, during, or after them but before the answer is seen."""

    def __init__(self, server: EmbeddedServer, login: Login, when: Mapping[int, str]) -> None:
        super().__init__(login.url, login.token, patience_s=240)
        self.server, self.when = server, when
        self.num_imports = 0
        self.threads: list[threading.Thread] = []

    def kill_and_restart(self, delay_s: float) -> None:
        earlier = list(self.threads)

        def body() -> None:
            for thread in earlier:  # one restart at a time
                thread.join()
            time.sleep(delay_s)
            pid = self.server.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            self.server.up()

        self.threads.append(threading.Thread(target=body))
        self.threads[-1].start()

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        when = self.when.get(self.num_imports)
        self.num_imports += 1
        if when == "before":
            self.kill_and_restart(0)
            time.sleep(0.5)
        elif when == "during":
            self.kill_and_restart(0.03)
        ids = super().import_tasks(project_id, tasks)
        if when == "after":
            self.kill_and_restart(0)
            raise ServerUnavailableError("the answer was lost")
        return ids


def test_server_killed_in_mid_push_and_restarted(
    server: EmbeddedServer, login: Login, concept: Concept, tmp_path: Path
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 40, seed=1)
    with Deadly(server, login, {1: "during", 4: "after"}) as client:
        result = push.run(workspace, concept, client=client, batch_size=8)
        for thread in client.threads:
            thread.join()
        assert len(client.threads) == 2
    assert result.done == 40
    assert_each_exactly_once(login, workspace, concept)
    with Client(login.url, login.token) as client:
        assert push.run(workspace, concept, client=client).done == 0


def test_copies_are_removed_but_never_work(client: Client, login: Login, concept: Concept, tmp_path: Path) -> None:
    """A slow server may finish an import that was given up: the next push tidies, and keeps what was annotated."""
    workspace = make_reviewable(tmp_path / "runs", concept, 4, seed=2)
    project_id = push.run(workspace, concept, client=client).data["project_id"]
    before = {task["data"]["key"]: task for task in tasks_on_server(login, workspace, concept)}
    copies = client.import_tasks(project_id, [{"data": task["data"]} for task in list(before.values())[:2]])
    with api(login) as http:
        http.post(f"/api/tasks/{copies[1]}/annotations/", json={"result": []}).raise_for_status()
    assert push.run(workspace, concept, client=client).done == 0
    ids = [task["id"] for task in tasks_on_server(login, workspace, concept)]
    keys = list(before)
    assert sorted(ids) == sorted([before[keys[0]]["id"], copies[1], before[keys[2]]["id"], before[keys[3]]["id"]])


def test_push_killed_with_sigkill_resumes(
    server: EmbeddedServer, login: Login, concept: Concept, tmp_path: Path
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 30, seed=5)
    manifest = workspace.stage("labeling", concept.name).manifest
    arguments = ["push", "--concept", "weapon", "--workspace", str(workspace.root), "--label-studio", login.url]
    code = f"import sys; from dagkit.cli import main; sys.argv[1:] = {[*arguments, '--batch-size', '3']!r}; main()"
    environment = {**os.environ, "LABEL_STUDIO_API_KEY": login.token}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not (manifest.exists() and len(manifest.read_bytes().splitlines()) >= 6):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    if process.stderr:
        process.stderr.close()
    num_noted = len(manifest.read_bytes().splitlines())
    assert 6 <= num_noted < 30
    with manifest.open("ab") as file:
        file.write(b'{"key": "torn')
    with Client(login.url, login.token) as client:
        result = push.run(workspace, concept, client=client, batch_size=3)
    assert result.done + result.skipped == 30
    assert result.skipped >= num_noted
    assert_each_exactly_once(login, workspace, concept)
    rows = workspace.stage("labeling", concept.name).rows()
    assert [row["key"] for row in rows] == [row["key"] for row in workspace.stage("premasks", concept.name).rows()]


def test_pull_killed_with_sigkill_resumes(
    client: Client, login: Login, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_reviewable(tmp_path / "killed", concept, 50, seed=24)
    push.run(workspace, concept, client=client)
    with api(login) as http:
        for index, row in enumerate(workspace.stage("labeling", concept.name).rows()):
            proposed = http.get(f"/api/tasks/{row['task_id']}").json()["predictions"]
            result = proposed[0]["result"][: 2 - index % 2] if proposed else []
            answer = {"result": result, "was_cancelled": index % 7 == 6}
            http.post(f"/api/tasks/{row['task_id']}/annotations/", json=answer).raise_for_status()
    shutil.copytree(workspace.root, tmp_path / "undisturbed")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", login.token)
    line = ["pull", "--concept", concept.name, "--label-studio", login.url, "--quiet", "--workspace"]
    finish(*line, tmp_path / "undisturbed")

    folder = workspace.stage("annotations", concept.name).path
    kill_when(lambda: num_rows(folder) >= 5, *line, workspace.root)
    assert 5 <= num_rows(folder) < 50
    assert json.loads((folder / "cursor.json").read_text())["since"] is None
    before = {path: path.stat().st_mtime_ns for path in folder.glob("masks/*.png")}
    finish(*line, workspace.root)
    assert content(folder) == content(tmp_path / "undisturbed" / "annotations" / concept.name)
    states = Counter(row["state"] for row in workspace.stage("annotations", concept.name).rows())
    assert sum(states.values()) == 50
    assert {"accepted", "changed", "empty", "skipped"} == set(states)
    noted = {path: path.stat().st_mtime_ns for path in before}
    assert sum(noted[path] == before[path] for path in before) >= 5, "what was pulled before was pulled again"


def test_server_that_stays_down_is_one_line_and_the_next_push_goes_on(
    client: Client, login: Login, concept: Concept, tmp_path: Path
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 6, seed=6)
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", login.token, patience_s=0.5) as nowhere:
        with pytest.raises(LabelStudioError, match=r"cannot be reached.*dagkit label-studio up") as caught:
            push.run(workspace, concept, client=nowhere)
        assert "\n" not in str(caught.value)
    assert push.run(workspace, concept, client=client).done == 6
    assert_each_exactly_once(login, workspace, concept)


@pytest.mark.parametrize("damage", ["empty image", "empty mask file", "mask of another size"])
def test_bad_files_are_named_and_all_others_sent(
    client: Client, login: Login, concept: Concept, tmp_path: Path, damage: str
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 6, seed=8)
    candidates, premasks = (workspace.stage(name, concept.name) for name in ("candidates", "premasks"))
    key = "00001-0008"
    image, mask = candidates.path / f"images/{key}.png", premasks.path / f"masks/{key}-weapon.png"
    target = image if damage == "empty image" else mask
    whole = target.read_bytes()
    if damage == "mask of another size":
        premasks.write_image(
            f"masks/{key}-weapon.png", premasks.read_image(f"masks/{key}-weapon.png", "L").crop((0, 0, 9, 9))
        )
    else:
        target.write_bytes(b"")
    with pytest.raises((WorkspaceError, LabelStudioError)) as caught:
        push.run(workspace, concept, client=client)
    message = str(caught.value)
    assert key in message
    assert "\n" not in message
    assert (
        "a mask of 48x32 px, as large as its image, but got 9x9" if damage == "mask of another size" else target.name
    ) in message
    assert len(tasks_on_server(login, workspace, concept)) == 5
    target.write_bytes(whole)
    assert push.run(workspace, concept, client=client).done == 1
    assert_each_exactly_once(login, workspace, concept)


def test_answers_that_cannot_be_used_are_named_and_all_others_fetched(
    client: Client, login: Login, concept: Concept, tmp_path: Path
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 6, seed=9)
    push.run(workspace, concept, client=client)
    labeling, annotations = (workspace.stage(name, concept.name) for name in ("labeling", "annotations"))
    ids = [row["task_id"] for row in labeling.rows()]
    with api(login) as http:
        for task_id in ids:
            predictions = http.get(f"/api/tasks/{task_id}").json()["predictions"]
            result = predictions[0]["result"] if predictions else []
            if task_id == ids[1]:
                result[0]["value"]["brushlabels"] = ["knife"]
            http.post(f"/api/tasks/{task_id}/annotations/", json={"result": result}).raise_for_status()
    with pytest.raises(
        LabelStudioError, match=r"'knife' is not a label of this concept \(weapon, harmless\)"
    ) as caught:
        pull.run(workspace, concept, client=client)
    assert f"task {ids[1]} (00001-0009)" in str(caught.value)
    assert "1 of 6 tasks were left out" in str(caught.value)
    assert len(annotations.rows()) == 5
    with api(login) as http:
        entry = http.get(f"/api/tasks/{ids[1]}").json()["annotations"][0]
        entry["result"][0]["value"]["brushlabels"] = ["weapon"]
        http.patch(f"/api/annotations/{entry['id']}/", json={"result": entry["result"]}).raise_for_status()
    assert pull.run(workspace, concept, client=client).done == 1
    assert len(annotations.rows()) == 6


def test_answers_to_purged_images_are_passed_over(
    client: Client, login: Login, concept: Concept, tmp_path: Path
) -> None:
    """A task that was skipped is purged, and then answered all the same."""
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=25)
    push.run(workspace, concept, client=client, num_annotators=2)
    ids = {row["key"]: row["task_id"] for row in workspace.stage("labeling", concept.name).rows()}
    first, second, _ = ids
    with api(login) as http:
        for key, is_skipped in ((first, True), (second, False)):
            proposed = http.get(f"/api/tasks/{ids[key]}").json()["predictions"][0]["result"]
            answer = {"result": [] if is_skipped else proposed, "was_cancelled": is_skipped}
            http.post(f"/api/tasks/{ids[key]}/annotations/", json=answer).raise_for_status()
        pull.run(workspace, concept, client=client)
        export.run(workspace, concept)
        assert len(purge.run(workspace, concept, is_dry_run=False).data["files"]) == 3  # an image, masks of two labels
        http.post(f"/api/tasks/{ids[first]}/annotations/", json={"result": []}).raise_for_status()
    result = pull.run(workspace, concept, client=client, review=True)
    assert (result.done, result.data["states"]) == (0, {"accepted": 1, "skipped": 1})
    assert push.run(workspace, concept, client=client).done == 0


def test_deleted_project_is_said_and_nothing_else_touched(
    client: Client, login: Login, concept: Concept, tmp_path: Path
) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=10)
    project_id = push.run(workspace, concept, client=client).data["project_id"]
    with api(login) as http:
        http.delete(f"/api/projects/{project_id}").raise_for_status()
    for stage in (push, pull):
        with pytest.raises(LabelStudioError, match=r"has no (such )?project") as caught:
            stage.run(workspace, concept, client=client)
        assert "\n" not in str(caught.value)


def test_nothing_pushed_and_nothing_to_push(client: Client, concept: Concept, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "runs")
    with pytest.raises(WorkspaceError, match="Run `dagkit push` first"):
        pull.run(workspace, concept, client=client)
    with pytest.raises(WorkspaceError, match="Run `dagkit premask` first"):
        push.run(workspace, concept, client=client)
    assert not (tmp_path / "runs").exists()


def test_command_group_from_up_to_down(
    server: EmbeddedServer, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a newcomer: no server named, no token set; push starts the embedded one."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    shown: list[str] = []

    def dagkit(*arguments: str, expected: int = 0) -> str:
        ran = CliRunner().invoke(command, arguments)
        assert ran.exit_code == expected, ran.output
        shown.append(ran.output)
        return ran.output

    port = free_port()
    assert "is installed, but not running. Start it with: dagkit label-studio up" in dagkit("label-studio", "status")
    assert "was not running" in dagkit("label-studio", "down")
    with pytest.raises(LabelStudioError, match="cannot be used"):
        EmbeddedServer().up(int(server.login().url.rpartition(":")[2]))  # type: ignore[union-attr]
    try:
        assert f"Label Studio is up: http://127.0.0.1:{port}" in dagkit("label-studio", "up", "--port", str(port))
        status = json.loads(dagkit("label-studio", "status", "--json"))
        assert (status["is_running"], status["url"]) == (True, f"http://127.0.0.1:{port}")
        make_reviewable(tmp_path / "runs", concept, 3, seed=11)
        here = ("--concept", "weapon", "--workspace", str(tmp_path / "runs"))
        assert json.loads(dagkit("push", *here, "--json"))["done"] == 3
        assert dagkit("pull", *here).startswith("pull: 0 tasks new or changed, 0 in all (no answers yet; ")
        login = json.loads(Path(status["login_file"]).read_text())
        assert not any(secret in output for output in shown for secret in (login["password"], login["token"]))

        other = free_port()
        with pytest.raises(LabelStudioError, match=f"runs at http://127.0.0.1:{port} with other settings. Stop it"):
            EmbeddedServer().up(other)
        dagkit("label-studio", "down")
        assert f"127.0.0.1:{other}" in dagkit("label-studio", "up", "--port", str(other))
        assert dagkit("pull", *here).startswith("pull: 0 tasks new or changed, 0 in all (no answers yet; ")
    finally:
        dagkit("label-studio", "down")
    assert EmbeddedServer().pid is None
    assert "was not running" in dagkit("label-studio", "down")


def test_a_server_that_does_not_come_up_names_its_log(server: EmbeddedServer, tmp_path: Path) -> None:
    broken = EmbeddedServer(folder=tmp_path / "broken")
    (broken.folder / "data").mkdir(parents=True)
    (broken.folder / "data/label_studio.sqlite3").write_bytes(b"this is no database" * 100)
    with pytest.raises(LabelStudioError, match=r"ended: .*not a database.* The whole log: .*server.log") as caught:
        broken.up(free_port())
    assert "\n" not in str(caught.value)
    assert broken.pid is None
