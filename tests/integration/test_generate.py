"""generate: the bundled model, any SD-1.x-shaped model, interruption, and bad input."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.errors import DagkitError, ModelError, PromptRefused, WorkspaceError
from dagkit.stages import generate
from dagkit.workspace import StageFolder, Workspace
from interruption import content, finish, kill_when, num_rows
from tiny_world import make_concept


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_concept(tmp_path_factory.mktemp("tiny")).with_name("model")


@pytest.fixture
def concept_file(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_sd.with_name("tiny.yaml"), tmp_path))


def test_any_sd_shaped_model_draws(concept_file: Path, tmp_path: Path):
    options = ["--concept", str(concept_file), "--workspace", str(tmp_path / "runs"), "--num-images", "5", "--json"]
    result = CliRunner().invoke(command, ["generate", *options], catch_exceptions=False)

    report = json.loads(result.output.splitlines()[-1])
    assert (report["done"], report["skipped"], report["counts"]) == (5, 0, {"unsafe": 3, "hinted": 0, "safe": 2})
    rows = Workspace(tmp_path / "runs").stage("candidates", "tiny").rows()
    assert [row["kind"] for row in rows].count("safe") == 2
    assert all(row["model_fingerprint"].startswith("sha256:") for row in rows)

    more = CliRunner().invoke(command, ["generate", *options[:-3], "--num-images", "7", "--json"])
    assert json.loads(more.output.splitlines()[-1])["skipped"] == 5
    assert Workspace(tmp_path / "runs").stage("candidates", "tiny").rows()[:5] == rows


def test_killed_run_ends_like_an_undisturbed_one(concept_file: Path, tmp_path: Path):
    def arguments(workspace: Path) -> list[object]:
        where = ["--concept", concept_file, "--workspace", workspace]
        return ["generate", *where, "--num-images", 8, "--batch-size", 1, "--quiet"]

    finish(*arguments(tmp_path / "undisturbed"))
    folder = tmp_path / "killed" / "candidates" / "tiny"
    kill_when(lambda: num_rows(folder) >= 2, *arguments(tmp_path / "killed"))
    assert 2 <= num_rows(folder) < 8
    before = {row["image"]: (folder / row["image"]).stat().st_mtime_ns for row in StageFolder(folder).rows()}

    finish(*arguments(tmp_path / "killed"))
    assert content(folder) == content(tmp_path / "undisturbed" / "candidates" / "tiny")
    assert {image: (folder / image).stat().st_mtime_ns for image in before} == before


def run(concept_file: Path, workspace: Path, **options: object) -> DagkitError:
    """Runs generate through the command line and returns the error that it ended with."""
    arguments = [item for name, value in options.items() for item in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(
        command, ["generate", "--concept", str(concept_file), "--workspace", str(workspace), *arguments]
    )
    assert isinstance(result.exception, DagkitError), result.output
    return result.exception


def test_model_without_a_unet_is_named_and_nothing_is_written(tiny_sd: Path, concept_file: Path, tmp_path: Path):
    shutil.copytree(tiny_sd, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "unet")

    error = run(concept_file, tmp_path / "runs", model=tmp_path / "broken")
    assert isinstance(error, ModelError)
    assert "unet" in str(error)
    assert str(tmp_path / "broken") in str(error)
    assert not (tmp_path / "runs").exists()


def test_missing_model_and_device_are_named(concept_file: Path, tmp_path: Path):
    assert "nowhere" in str(run(concept_file, tmp_path / "runs", model=tmp_path / "nowhere"))
    assert "--device 'gpu' cannot be used here" in str(run(concept_file, tmp_path / "runs", device="gpu"))
    assert not (tmp_path / "runs").exists()


def test_refused_prompt_draws_nothing(concept_file: Path, tmp_path: Path):
    concept_file.write_text(concept_file.read_text().replace("[bomb, knife, axe]", "['nude ch1ld']"))

    error = run(concept_file, tmp_path / "runs")
    assert isinstance(error, PromptRefused)
    assert not (tmp_path / "runs").exists()


def test_other_settings_are_refused(concept_file: Path, tmp_path: Path):
    arguments = ["generate", "--concept", str(concept_file), "--workspace", str(tmp_path / "runs"), "--num-images", "1"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    before = content(tmp_path / "runs")

    error = run(concept_file, tmp_path / "runs", seed=3)
    assert isinstance(error, WorkspaceError)
    assert "begun with other settings: seed was 0, now 3" in str(error)
    assert content(tmp_path / "runs") == before


def test_full_disk_is_named_and_the_next_run_goes_on(concept_file: Path, full_disk: Path):
    with contextlib.suppress(OSError), (full_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(os.urandom(4096))

    error = run(concept_file, full_disk / "runs", num_images=2)
    assert isinstance(error, WorkspaceError)
    assert "no space left on device" in str(error)
    assert not list(full_disk.rglob("*.part"))
    (full_disk / "filler").unlink()
    arguments = [
        "generate",
        "--concept",
        str(concept_file),
        "--workspace",
        str(full_disk / "runs"),
        "--num-images",
        "2",
    ]
    assert CliRunner().invoke(command, arguments).exit_code == 0


def test_unknown_words_are_warned_of(tmp_path: Path):
    from dagkit import demo, models
    from dagkit.generation import generate_images

    base = models.load(demo.model_path())
    settings = {"num_inference_steps": 1, "guidance_scale": 2.0, "width": 64, "height": 64}
    with pytest.warns(UserWarning, match=r"does not know the word\(s\) mars, zebra and draws something else"):
        generate_images(base, ["a zebra on mars"], [0], settings=settings)


def test_plan_is_interleaved_and_grows_at_its_end():
    concept = load_concept("weapon")
    kinds = [prompt.kind for prompt in generate.plan_prompts(concept, 20, 0.4, 0.15, 0)]

    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"unsafe": 10, "hinted": 2, "safe": 8}
    assert {"unsafe", "safe"} == set(kinds[:3])
