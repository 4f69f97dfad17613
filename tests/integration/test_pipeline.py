"""The whole way on a model with random weights; each stage killed half-way ends like an undisturbed one."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.workspace import StageFolder
from interruption import content, finish, kill_when, num_rows
from tiny_world import make_concept


@pytest.fixture(scope="module")
def concept_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_concept(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(concept_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace up to its token, made undisturbed."""
    workspace = tmp_path_factory.mktemp("undisturbed")
    where = ["--concept", concept_file, "--workspace", workspace, "--quiet"]
    finish("generate", *where, "--num-images", 16)
    finish("premask", *where)
    finish("export", *where[:-1], "--unreviewed")
    finish("optimize", *where, "--num-steps", 120, "--tune", 0, "--data-efficiency")
    return workspace


def copy(workspace: Path, to: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(workspace / stage, to / stage)
    return to


def test_every_stage_runs_on_a_model_with_random_weights(finished: Path):
    rows = {stage: StageFolder(finished / stage / "tiny").rows() for stage in ("candidates", "premasks")}
    assert len(rows["candidates"]) == len(rows["premasks"]) == 16
    summary = json.loads((finished / "dataset" / "tiny" / "dataset.json").read_text())
    assert summary["review_states"] == {"unreviewed": 16}
    record = json.loads((finished / "tokens" / "tiny" / "1.0.0" / "token.json").read_text())
    assert record["concept"] == "tiny"
    assert record["dataset"]["review_states"] == {"unreviewed": 16}
    assert [point["num_images"] for point in record["metrics"]["data_efficiency"]] == [2, 4, 8]
    assert "unreviewed" in (finished / "tokens" / "tiny" / "1.0.0" / "README.md").read_text().lower()


@pytest.mark.slow
def test_optimize_goes_on_from_its_checkpoint(concept_file: Path, finished: Path, tmp_path: Path):
    workspace = copy(finished, tmp_path, "dataset")
    where = [
        "optimize",
        "--concept",
        concept_file,
        "--workspace",
        workspace,
        "--quiet",
        "--num-steps",
        120,
        "--tune",
        0,
    ]
    tokens = workspace / "tokens" / "tiny"

    kill_when(lambda: any(tokens.glob(".checkpoint-*.safetensors")), *where)
    assert not (tokens / "1.0.0").exists()
    finish(*where)
    other = finished / "tokens" / "tiny" / "1.0.0"
    assert tensors(tokens / "1.0.0") == tensors(other)
    assert not list(tokens.glob(".checkpoint-*"))

    assert json.loads(finish(*where, "--json").splitlines()[-1])["skipped"] == 1
    assert sorted(path.name for path in tokens.iterdir() if path.is_dir()) == ["1.0.0"]


def tensors(token: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    return {name: value.flatten().tolist() for name, value in load_file(token / "guideline.safetensors").items()}


@pytest.mark.slow
def test_sample_killed_half_way(finished: Path, concept_file: Path, tmp_path: Path):
    prompts = ["a bomb on grass", "a knife on sand", "a cat on snow"]

    def arguments(workspace: Path) -> list[object]:
        model = concept_file.parent / "model"
        return [
            "sample",
            "--guard",
            "tiny@1.0.0",
            "--workspace",
            workspace,
            "--model",
            model,
            "--compare",
            "--num-inference-steps",
            4,
            "--quiet",
            *prompts,
        ]

    undisturbed = copy(finished, tmp_path / "undisturbed", "tokens")
    killed = copy(finished, tmp_path / "killed", "tokens")
    (tmp_path / "annotation_configs").mkdir()
    shutil.copy(concept_file, tmp_path / "annotation_configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        finish(*arguments(undisturbed))
        folder = killed / "samples" / "tiny"
        kill_when(lambda: num_rows(folder) >= 2, *arguments(killed))
        assert num_rows(folder) < 6
        finish(*arguments(killed))
    assert num_rows(folder) == 6
    assert content(folder) == content(undisturbed / "samples" / "tiny")


def test_checked_at_the_door(finished: Path, concept_file: Path, tmp_path: Path):
    workspace = copy(finished, tmp_path, "candidates")
    image = next((workspace / "candidates" / "tiny" / "images").glob("*.png"))
    image.write_bytes(b"no image")

    result = CliRunner().invoke(command, ["premask", "--concept", str(concept_file), "--workspace", str(workspace)])
    assert str(image) in str(result.exception)
    assert "expected an image, but it cannot be read" in str(result.exception)
