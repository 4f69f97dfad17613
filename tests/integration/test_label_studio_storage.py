"""Images that the server does not hold: in a shared folder, and in an S3 bucket (moto, a real S3 API on loopback)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from label_studio_server import api, make_reviewable

from dagkit.concept import Concept, load_concept
from dagkit.errors import LabelStudioError
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.server import EmbeddedServer, Login, Sharing
from dagkit.labelstudio.storage import LocalFiles, parse_storage
from dagkit.stages import push
from dagkit.workspace import Workspace
from interruption import finish
from loopback import free_port
from tiny_world import make_concept

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]
BUCKET = "annotation"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not os.environ.get("CI"):
        for module in ("moto.server", "boto3", "flask"):
            pytest.importorskip(module, reason=f"NO {module}: the S3 tests did not run (pip install 'moto[s3,server]')")
    import boto3
    import moto.server as moto_server

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)  # as --s3-endpoint Label Studio takes no loopback address
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint
        server.stop()


@pytest.fixture(scope="module")
def sharing_login(server: EmbeddedServer, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Login]:
    """A second server, which may serve a folder and has credentials for the bucket."""
    root = tmp_path_factory.mktemp("served")
    sharing = EmbeddedServer(folder=tmp_path_factory.mktemp("sharing"))
    yield sharing.up(free_port(), sharing=Sharing(str(root), is_with_aws=True))
    assert sharing.sharing() == Sharing(str(root), is_with_aws=True)
    with pytest.raises(LabelStudioError, match=r"runs at .* with other settings. Stop it"):
        sharing.up(sharing=Sharing())
    sharing.down()


@pytest.fixture
def root(sharing_login: Login, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(path for path in tmp_path_factory.getbasetemp().iterdir() if path.name.startswith("served"))


def check_images(login: Login, workspace: Workspace, concept: Concept, project_id: int, beginning: str) -> None:
    candidates = workspace.stage("candidates", concept.name)
    images = {row["key"]: (candidates.path / row["image"]).read_bytes() for row in candidates.rows()}
    with api(login) as http:
        tasks = http.get("/api/tasks", params={"project": project_id, "fields": "all"}).json()["tasks"]
        assert {task["data"]["key"] for task in tasks} == images.keys()
        for task in tasks:
            shown = http.get(f"/api/tasks/{task['id']}").json()["data"]["image"]  # as the page gets it
            assert shown.startswith(beginning)
            answer = http.get(shown, follow_redirects=True)
            assert answer.content == images[task["data"]["key"]]
    anonymous = httpx.get(login.url + shown, follow_redirects=False)
    assert anonymous.status_code in (302, 401, 403)


def test_images_of_a_shared_folder(sharing_login: Login, root: Path, concept: Concept) -> None:
    workspace = make_reviewable(root / "runs", concept, 3, seed=13)
    with Client(sharing_login.url, sharing_login.token) as client:
        result = push.run(workspace, concept, client=client, storage=parse_storage(f"local:{root}"))
        assert push.run(workspace, concept, client=client, storage=LocalFiles(root)).done == 0
        rows = client.request("GET", "/api/storages/localfiles", params={"project": result.data["project_id"]})
    assert len(rows) == 1
    check_images(sharing_login, workspace, concept, result.data["project_id"], "/data/local-files/?d=runs/")


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_annotate_takes_the_same_places_as_push(
    kind: str, sharing_login: Login, root: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", sharing_login.token)
    monkeypatch.setenv("DAGKIT_LABEL_STUDIO", sharing_login.url)
    folder = root / f"annotate-{kind}"
    place = {"local": f"local:{root}", "s3": f"s3://{BUCKET}/annotate"}[kind]
    finish("annotate", "--concept", make_concept(folder), "--workspace", folder / "runs", "--num-images", 3,
           "--storage", place, "--quiet")  # fmt: skip
    workspace, concept = Workspace(folder / "runs"), load_concept(folder / "tiny.yaml")
    project_id = workspace.stage("labeling", "tiny").read_json("project.json")["project_id"]
    beginning = {"local": f"/data/local-files/?d=annotate-{kind}/runs/", "s3": "/tasks/"}[kind]
    check_images(sharing_login, workspace, concept, project_id, beginning)


def test_images_in_a_bucket(sharing_login: Login, s3: str, concept: Concept, tmp_path: Path) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=14)
    with Client(sharing_login.url, sharing_login.token) as client:
        result = push.run(workspace, concept, client=client, storage=parse_storage(f"s3://{BUCKET}/one/two"))
        assert push.run(workspace, concept, client=client, storage=parse_storage(f"s3://{BUCKET}/one/two")).done == 0
        rows = client.request("GET", "/api/storages/s3", params={"project": result.data["project_id"]})
        assert len(rows) == 1
        stored = client.request("GET", "/api/tasks", params={"project": result.data["project_id"]})["tasks"]
    assert all(
        task["data"]["image"].startswith(f"s3://{BUCKET}/one/two/") or "resolve" in task["data"]["image"]
        for task in stored
    )
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(rows)
    check_images(sharing_login, workspace, concept, result.data["project_id"], "/tasks/")


def test_an_endpoint_that_the_server_forbids(sharing_login: Login, s3: str, concept: Concept, tmp_path: Path) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=17)
    with (
        Client(sharing_login.url, sharing_login.token) as client,
        pytest.raises(
            LabelStudioError, match=r"/api/storages/s3.*reserved network address.*give the server its own credentials"
        ) as caught,
    ):
        push.run(workspace, concept, client=client, storage=parse_storage(f"s3://{BUCKET}/three", s3))
    assert "\n" not in str(caught.value)


def test_a_server_that_may_not_serve_the_folder(client: Client, concept: Concept, tmp_path: Path) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=15)
    with pytest.raises(LabelStudioError, match="dagkit label-studio up --serve-files") as caught:
        push.run(workspace, concept, client=client, storage=LocalFiles(tmp_path))
    assert "\n" not in str(caught.value)
    assert push.run(workspace, concept, client=client).done == 3


def test_a_bucket_that_is_not_there(client: Client, s3: str, concept: Concept, tmp_path: Path) -> None:
    workspace = make_reviewable(tmp_path / "runs", concept, 3, seed=16)
    with pytest.raises(
        LabelStudioError, match=r"s3://nowhere/x cannot be written: .*NoSuchBucket.* Check the bucket's name"
    ):
        push.run(workspace, concept, client=client, storage=parse_storage("s3://nowhere/x", s3))
    assert push.run(workspace, concept, client=client).done == 3
