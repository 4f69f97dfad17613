"""premask and export: the bundled model and any SD-shaped model, interruption, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dagkit import demo, models
from dagkit.cli import command
from dagkit.concept import Concept, load_concept
from dagkit.dataset import load_dataset
from dagkit.demo import world
from dagkit.errors import CheckpointError, DagkitError, DatasetError, WorkspaceError
from dagkit.proposers import build_proposers
from dagkit.segmenters import build_segmenter
from dagkit.stages import premask, push
from drawn_workspace import draw_workspace
from interruption import content, finish, kill_when, num_rows
from tiny_pipelines import scheduler, sd

BOX = Concept.model_validate({**load_concept("weapon").model_dump(), "segmenter": "box"})


@pytest.fixture(scope="module")
def base_model() -> models.BaseModel:
    return models.load(demo.model_path())


@pytest.fixture
def box_file(tmp_path: Path) -> Path:
    """The weapon concept with boxes for masks, as a file."""
    path = tmp_path / "weapon.yaml"
    path.write_text(json.dumps(BOX.model_dump(exclude_none=True)))
    return path


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, DagkitError | SystemExit):
        raise result.exception
    return result


def error_of(*arguments: object) -> DagkitError:
    result = invoke(*arguments)
    assert isinstance(result.exception, DagkitError), result.output
    return result.exception


def test_pre_masks_of_the_bundled_model_match_the_renderers(base_model: models.BaseModel, tmp_path: Path):
    concept = load_concept("weapon")
    truth = draw_workspace(tmp_path, concept, 24, 4)
    expected = {
        row["key"]: np.asarray(truth.stage("premasks", "weapon").read_image(row["masks"]["weapon"]["path"], "L")) > 127
        for row in truth.stage("premasks", "weapon").rows()
        if row["masks"]
    }
    workspace = draw_workspace(tmp_path / "runs", concept, 24, 4, with_premasks=False)
    result = premask.run(workspace, concept, build_proposers(concept, base_model), build_segmenter(concept))

    assert (result.done, result.skipped, result.data["expected"]) == (28, 0, 24)
    rows = {row["key"]: row for row in workspace.stage("premasks", "weapon").rows()}
    assert [rows[f"s{i:03d}"]["masks"] for i in range(4)] == [{}] * 4
    ious = []
    for key, mask in expected.items():
        found = rows[key]["masks"].get("weapon")
        read = (
            workspace.stage("premasks", "weapon").read_image(found["path"], "L") if found else Image.new("L", (64, 64))
        )
        pixels = np.asarray(read) > 127
        ious.append((pixels & mask).sum() / (pixels | mask).sum())
    assert np.mean(ious) > 0.7
    assert np.median(ious) > 0.8


def test_any_sd_shaped_model_goes_all_the_way_to_a_dataset(tmp_path: Path, box_file: Path):
    sd(scheduler=scheduler(steps_offset=1)).save_pretrained(tmp_path / "tiny-sd")
    eager = {"model": str(tmp_path / "tiny-sd"), "proposers": {"name": "attention", "min_score": 0.0}}
    box_file.write_text(json.dumps({**json.loads(box_file.read_text()), **eager}))
    draw_workspace(tmp_path / "runs", BOX, 6, 4, with_premasks=False)
    common = ("--concept", box_file, "--workspace", tmp_path / "runs")

    report = json.loads(invoke("premask", *common, "--json").stdout.splitlines()[-1])
    assert (report["done"], report["skipped"]) == (10, 0)
    assert json.loads(invoke("premask", *common, "--json").stdout.splitlines()[-1])["skipped"] == 10

    assert isinstance(error := error_of("export", *common), DatasetError)
    assert "nothing was annotated yet" in str(error)
    assert "--unreviewed" in str(error)
    report = json.loads(invoke("export", *common, "--unreviewed", "--json").stdout.splitlines()[-1])
    data = load_dataset(tmp_path / "runs" / "dataset" / "weapon")
    assert sum(map(len, data.values())) == report["done"] == 10 - report["skipped"]
    assert report["review_states"] == {"unreviewed": report["done"]}
    assert "rows were reviewed by nobody" in (tmp_path / "runs" / "dataset" / "weapon" / "README.md").read_text()

    keys = {split: set(data[split]["key"]) for split in data}
    again = json.loads(invoke("export", *common, "--unreviewed", "--seed", "5", "--json").stdout.splitlines()[-1])
    assert again["fingerprint"] == report["fingerprint"]
    assert {s: set(d["key"]) for s, d in load_dataset(tmp_path / "runs" / "dataset" / "weapon").items()} == keys


@pytest.mark.slow
def test_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, box_file: Path):
    for name in ("undisturbed", "killed"):
        draw_workspace(tmp_path / name, BOX, 20, 4, with_premasks=False)

    def arguments(name: str) -> list[object]:
        return ["premask", "--concept", box_file, "--workspace", tmp_path / name, "--quiet"]

    finish(*arguments("undisturbed"))
    folder = tmp_path / "killed" / "premasks" / "weapon"
    kill_when(lambda: num_rows(folder) >= 3, *arguments("killed"))
    before = (folder / "manifest.jsonl").read_bytes()
    assert num_rows(folder) < 24

    finish(*arguments("killed"))
    assert (folder / "manifest.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


def test_unreadable_images_are_named_and_nothing_else_is_lost(base_model: models.BaseModel, tmp_path: Path):
    workspace = draw_workspace(tmp_path, BOX, 4, 0, with_premasks=False)
    images = workspace.stage("candidates", "weapon").path / "images"
    whole = (images / "u001.png").read_bytes()
    (images / "u001.png").write_bytes(b"")
    (images / "u002.png").unlink()
    proposers, segmenter = build_proposers(BOX, base_model), build_segmenter(BOX)

    with pytest.raises(WorkspaceError) as caught:
        premask.run(workspace, BOX, proposers, segmenter)
    message = str(caught.value)
    assert f"{images / 'u001.png'}: expected an image, but it cannot be read" in message
    assert f"{images / 'u002.png'}: no such image" in message
    assert "2 other images were pre-masked and are kept." in message
    assert workspace.stage("premasks", "weapon").keys() == {"u000", "u003"}

    (images / "u001.png").write_bytes(whole)
    (images / "u002.png").write_bytes(whole)
    assert premask.run(workspace, BOX, proposers, segmenter).done == 2


def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, box_file: Path, monkeypatch: pytest.MonkeyPatch):
    common = ("--concept", box_file, "--workspace", tmp_path / "runs")
    assert isinstance(error := error_of("premask", *common), WorkspaceError)
    assert "no candidates. Run: dagkit generate --concept weapon" in str(error)
    assert not (tmp_path / "runs" / "premasks").exists()

    draw_workspace(tmp_path / "runs", BOX, 2, 1, with_premasks=False)
    monkeypatch.setenv("DAGKIT_CHECKPOINTS", str(tmp_path / "checkpoints"))
    box_file.write_text(json.dumps({**json.loads(box_file.read_text()), "segmenter": {"name": "sam"}}))
    assert isinstance(error := error_of("premask", *common), CheckpointError)
    assert f"{tmp_path / 'checkpoints'}/sam_vit_h_4b8939.pth: no such SAM checkpoint" in str(error)
    assert not (tmp_path / "runs" / "premasks").exists()


def test_other_settings_are_refused(base_model: models.BaseModel, tmp_path: Path):
    workspace = draw_workspace(tmp_path, BOX, 2, 0, with_premasks=False)
    premask.run(workspace, BOX, build_proposers(BOX, base_model), build_segmenter(BOX))
    other = Concept.model_validate({**BOX.model_dump(), "proposers": "none"})
    with pytest.raises(WorkspaceError, match="begun with other settings: proposers was"):
        premask.run(workspace, other, build_proposers(other), build_segmenter(other))


def test_proposals_survive_a_wide_image(base_model: models.BaseModel, tmp_path: Path):
    workspace = draw_workspace(tmp_path, BOX, 1, 0, with_premasks=False)
    folder = workspace.stage("candidates", "weapon")
    scene = world.render_scene(np.random.default_rng(0), ("bomb",), "sand")
    folder.write_image("images/u000.png", Image.fromarray(scene.image).resize((200, 96)))
    premask.run(workspace, BOX, build_proposers(BOX, base_model), build_segmenter(BOX))
    row = workspace.stage("premasks", "weapon").rows()[0]
    assert workspace.stage("premasks", "weapon").read_image(row["masks"]["weapon"]["path"], "L").size == (200, 96)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (200, 96)])
def test_images_of_any_size_are_chosen_among(base_model: models.BaseModel, tmp_path: Path, size: tuple[int, int]):
    workspace = draw_workspace(tmp_path, BOX, 3, 0)
    workspace.stage("candidates", "weapon").write_image("images/u001.png", Image.new("RGB", size, "red"))

    for model in (None, base_model):
        keys = push.choose(workspace, BOX, "diverse", None, base_model=model)
        assert sorted(keys or []) == ["u000", "u001", "u002"]
