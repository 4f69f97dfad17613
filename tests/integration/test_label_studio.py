"""Push and pull against a real Label Studio server."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from label_studio_server import api, read_mask

from dagkit.concept import Concept
from dagkit.errors import LabelStudioError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.server import EmbeddedServer, Login
from dagkit.stages import pull, push
from dagkit.workspace import Workspace
from loopback import free_port

pytestmark = pytest.mark.label_studio


def project_of(workspace: Workspace, concept: Concept) -> int:
    return workspace.stage("labeling", concept.name).read_json("project.json")["project_id"]


def check(url: str, token: str) -> None:
    with Client(url, token) as client:
        client.check()


def submit(http, task_id: int, result: list, **more) -> None:
    http.post(f"/api/tasks/{task_id}/annotations/", json={"result": result, **more}).raise_for_status()


def submit_as_proposed(http, task_id: int) -> None:
    predictions = http.get(f"/api/tasks/{task_id}").json()["predictions"]
    if predictions:
        submit(http, task_id, predictions[0]["result"], parent_prediction=predictions[0]["id"], lead_time=2.5)
    else:
        submit(http, task_id, [], lead_time=2.5)


def test_masks_come_back_bit_identical(client: Client, login: Login, concept: Concept, reviewable: Workspace) -> None:
    result = push.run(reviewable, concept, client=client)
    assert (result.done, result.skipped) == (6, 0)
    task_ids = {row["key"]: row["task_id"] for row in reviewable.stage("labeling", concept.name).rows()}
    with api(login) as http:
        for task_id in task_ids.values():
            submit_as_proposed(http, task_id)

    result = pull.run(reviewable, concept, client=client)
    assert result.data["states"] == {"accepted": 4, "empty": 2}
    annotations = reviewable.stage("annotations", concept.name)
    rows = {row["key"]: row for row in annotations.rows()}
    premasks = {row["key"]: row for row in reviewable.stage("premasks", concept.name).rows()}
    assert rows.keys() == premasks.keys()
    for key, row in rows.items():
        assert row["masks"].keys() == premasks[key]["masks"].keys()
        for label, path in row["masks"].items():
            before = reviewable.stage("premasks", concept.name).path / premasks[key]["masks"][label]["path"]
            assert np.array_equal(read_mask(annotations.path / path), read_mask(before))
        assert row["annotators"] == ["annotator-1"]
        assert row["seconds"] == 2.5
        assert row["iou_to_premask"] == 1.0

    again = pull.run(reviewable, concept, client=client)
    assert (again.done, again.skipped) == (0, 6)


def test_second_push_sends_only_what_is_new(
    client: Client, login: Login, concept: Concept, reviewable: Workspace
) -> None:
    premasks = reviewable.stage("premasks", concept.name)
    lines = premasks.manifest.read_bytes().splitlines(keepends=True)
    premasks.manifest.write_bytes(b"".join(lines[:4]))
    assert push.run(reviewable, concept, client=client).done == 4
    premasks.manifest.write_bytes(b"".join(lines))
    result = push.run(reviewable, concept, client=client)
    assert (result.done, result.skipped) == (2, 4)
    assert push.run(reviewable, concept, client=client).done == 0
    with api(login) as http:
        page = http.get("/api/tasks", params={"project": project_of(reviewable, concept), "page_size": 100}).json()
    assert page["total"] == 6
    assert len({task["data"]["key"] for task in page["tasks"]}) == 6


def test_wrong_token_is_one_clear_line_without_the_token(login: Login) -> None:
    token = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(LabelStudioError, match=r"does not take the token.*LABEL_STUDIO_API_KEY") as caught:
        check(login.url, token)
    assert token not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/api", "/projects", "/user/login"])
def test_wrong_path_in_the_address(login: Login, path: str) -> None:
    with pytest.raises(LabelStudioError, match="is not the address of a Label Studio server"):
        check(login.url + path, login.token)


def test_server_down() -> None:
    with pytest.raises(LabelStudioError, match=r"cannot be reached.*dagkit label-studio up"):
        check(f"http://127.0.0.1:{free_port()}", "x" * 40)


def test_nothing_secret_in_workspace_or_log(
    server: EmbeddedServer, client: Client, login: Login, concept: Concept, reviewable: Workspace
) -> None:
    push.run(reviewable, concept, client=client)
    pull.run(reviewable, concept, client=client)
    written = b"".join(path.read_bytes() for path in reviewable.root.rglob("*") if path.is_file())
    for secret in (login.token, login.password):
        assert secret.encode() not in written
        assert secret not in server.log.read_text()
        assert secret not in repr(login)
    assert stat.S_IMODE(server.login_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600


def test_images_are_hidden_in_the_data_manager(
    client: Client, login: Login, concept: Concept, reviewable: Workspace
) -> None:
    push.run(reviewable, concept, client=client)
    with api(login) as http:
        views = http.get("/api/dm/views", params={"project": project_of(reviewable, concept)}).json()
    assert [view["data"]["title"] for view in views] == ["Default"]
    for place in ("explore", "labeling"):
        assert "tasks:data.image" in views[0]["data"]["hiddenColumns"][place]


def test_server_listens_on_loopback_only(login: Login) -> None:
    port = int(login.url.rpartition(":")[2])
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, local_port = line.split()[1].split(":")
            if int(local_port, 16) == port and line.split()[3] == "0A":
                assert address == "0100007F"


def test_settings_of_the_server_send_nothing_out(server: EmbeddedServer) -> None:
    pid = server.pid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    for setting in (b"SENTRY_DSN=", b"COLLECT_ANALYTICS=false", b"LATEST_VERSION_CHECK=false"):
        assert setting in environment
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    login = json.loads(server.login_file.read_text())
    assert login["password"] not in command
    assert login["token"] not in command
