"""annotate and push with a selection, on the command line, against a real server."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from label_studio_server import make_reviewable, read_mask

from dagkit import models
from dagkit.cli import command
from dagkit.concept import Concept, load_concept
from dagkit.dataset import drop_near_duplicates
from dagkit.dataset.selection import disagreement, latent_features, layout_features, select_diverse
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.server import Login
from dagkit.models import BaseModel
from dagkit.proposers.token import TokenProposer
from dagkit.segmenters import combine
from dagkit.workspace import StageFolder, Workspace
from tiny_world import make_token, make_world

pytestmark = pytest.mark.label_studio


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_world(folder, folder / "tokens", ["1.0.0"])


@pytest.fixture(scope="module")
def base_model(world: Path) -> BaseModel:
    return models.load(world / "model")


@pytest.fixture
def run(login: Login, monkeypatch: pytest.MonkeyPatch):
    """Runs dagkit against the server of these tests."""
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", login.token)

    def invoke(name: str, *arguments: object) -> Result:
        line = [name, *map(str, arguments), "--label-studio", login.url, "--quiet"]
        return CliRunner().invoke(command, line, catch_exceptions=False)

    return invoke


def sent(workspace: Workspace, name: str, client: Client) -> list[str]:
    """Keys of the tasks on the server in the order in which annotators get them; dagkit must have noted the same."""
    noted = {row["key"]: row["task_id"] for row in workspace.stage("labeling", name).rows()}
    project = workspace.stage("labeling", name).read_json("project.json")["project_id"]
    tasks = client.request("GET", "/api/tasks", params={"project": project, "page_size": 100, "fields": "all"})["tasks"]
    there = {task["data"]["key"]: task["id"] for task in tasks}
    assert there == noted
    return sorted(there, key=lambda key: there[key])


def images(folder: StageFolder):
    return ((row["key"], folder.read_image(row["image"])) for row in folder.rows())


@pytest.mark.slow
def test_annotate_sends_what_differs_most(world: Path, base_model: BaseModel, run, client: Client, tmp_path: Path):
    where = ["--concept", world / "tiny.yaml", "--workspace", tmp_path, "--num-images", 6]
    workspace = Workspace(tmp_path)
    assert run("annotate", *where, "--select", "diverse", "--num-tasks", 3).exit_code == 0

    candidates = workspace.stage("candidates", "tiny")
    kept, _ = drop_near_duplicates(images(candidates))
    assert len(kept) > 3
    features = {key: latent_features(image, base_model) for key, image in images(candidates) if key in kept}
    assert sent(workspace, "tiny", client) == select_diverse(features, 3)

    assert run("annotate", *where).exit_code == 0  # what is there is not sent again
    assert set(sent(workspace, "tiny", client)) == candidates.keys()


def test_push_sends_what_is_trusted_least_and_no_twins(concept: Concept, run, client: Client, tmp_path: Path):
    workspace = make_reviewable(tmp_path, concept, 6, seed=21)
    candidates = workspace.stage("candidates", concept.name)
    keys = [row["key"] for row in candidates.rows()]
    shutil.copy(candidates.path / f"images/{keys[0]}.png", candidates.path / f"images/{keys[4]}.png")
    where = ["--concept", concept.name, "--workspace", tmp_path]

    result = run("push", *where, "--select", "uncertain", "--num-tasks", 2, "--json")
    assert json.loads(result.stdout)["done"] == 2
    assert sent(workspace, concept.name, client) == [keys[0], keys[1]]
    assert run("push", *where, "--select", "all").exit_code == 0
    assert sent(workspace, concept.name, client) == [keys[0], keys[1], keys[2], keys[3], keys[5]]
    assert run("push", *where).exit_code == 0
    assert sent(workspace, concept.name, client)[-1] == keys[4]  # all means all where nothing was selected


def test_push_sends_diverse_colours_first_without_a_model(concept: Concept, run, client: Client, tmp_path: Path):
    workspace = make_reviewable(tmp_path, concept, 6, seed=22)
    assert run("push", "--concept", concept.name, "--workspace", tmp_path, "--select", "diverse").exit_code == 0
    features = {key: layout_features(image) for key, image in images(workspace.stage("candidates", concept.name))}
    assert sent(workspace, concept.name, client) == select_diverse(features)


@pytest.mark.slow
def test_push_sends_first_what_token_and_pre_mask_disagree_about(
    world: Path, base_model: BaseModel, run, client: Client, tmp_path: Path
):
    concept = load_concept(world / "tiny.yaml")
    workspace = make_reviewable(tmp_path, concept, 6, seed=23)
    token = make_token(base_model, "1.0.0", 0)
    proposer = TokenProposer(base_model, token, "weapon")
    candidates, premasks = (workspace.stage(name, "tiny") for name in ("candidates", "premasks"))
    found = {row["key"]: row["masks"] for row in premasks.rows()}
    expected = {}
    for row in candidates.rows():
        image = candidates.read_image(row["image"])
        masks = {label: read_mask(premasks.path / mask["path"]) for label, mask in found[row["key"]].items()}
        region = proposer.region(image, row["prompt"], row["seed"])
        expected[row["key"]] = disagreement(region, combine(masks, ["handle"], (image.height, image.width)))
    where = ["--concept", world / "tiny.yaml", "--workspace", tmp_path, "--token", world / "tokens" / "tiny" / "1.0.0"]
    assert run("push", *where, "--select", "uncertain").exit_code == 0
    assert sent(workspace, "tiny", client) == sorted(expected, key=lambda key: -expected[key])


def test_a_token_without_uncertain_is_refused(concept: Concept, run, tmp_path: Path):
    make_reviewable(tmp_path, concept, 3)
    result = run("push", "--concept", concept.name, "--workspace", tmp_path, "--token", "weapon@1.0.0")
    assert result.exit_code == 2
    assert "--token says what is uncertain: add --select uncertain" in result.output
