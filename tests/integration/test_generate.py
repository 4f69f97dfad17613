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
from small_tokens import small_token
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


def test_more_is_drawn_of_what_a_token_sees_weakly(tmp_path: Path):
    """On the bundled model: what is there stays, a killed run ends like an undisturbed one, later runs count them."""
    figures = {"count": 10, "num_held_out": 2, "iou": 0.5, "detection_rate": 1.0}
    slices = {name: {**figures, "early_rate": rate} for name, rate in {"bomb": 1.0, "axe": 0.5}.items()}
    token = small_token(metrics={"slices": slices}).save(tmp_path / "weapon" / "1.0.0")
    config = Path(load_concept("weapon").file or "")
    text = config.read_text().replace("num_inference_steps: 25", "num_inference_steps: 2")
    (tmp_path / "weapon.yaml").write_text(text)

    def arguments(name: str, num_images: int, *more: object) -> list[object]:
        where = ["--concept", tmp_path / "weapon.yaml", "--workspace", tmp_path / name, "--batch-size", 1]
        return ["generate", *where, "--num-images", num_images, "--quiet", *more]

    weak = ["--select", "weak", "--token", token]
    folder = tmp_path / "killed" / "candidates" / "weapon"
    for name in ("undisturbed", "killed"):
        finish(*arguments(name, 3))
    first = content(folder, ["manifest.jsonl"])
    finish(*arguments("undisturbed", 9, *weak))
    kill_when(lambda: num_rows(folder) >= 4, *arguments("killed", 9, *weak))
    finish(*arguments("killed", 9, *weak))
    assert content(folder) == content(tmp_path / "undisturbed" / "candidates" / "weapon")

    rows = StageFolder(folder).rows()
    added = [row["prompt"] for row in rows[3:] if row["prompt_kind"] == "unsafe"]
    assert len(rows) == 9
    assert added
    assert all("axe" in prompt for prompt in added)
    assert first.items() <= content(folder).items()
    assert "0 images drawn, 9 were there already" in finish(*arguments("killed", 9))
    assert "For more of axe, raise --num-images" in finish(*arguments("killed", 9, *weak))


def test_options_that_do_not_go_together_are_refused():
    weak = ["--concept", "weapon", "--select", "weak"]
    for line, expected in (
        (["generate", *weak], "say which with --token"),
        (["annotate", *weak], "say which with --token"),
        (["generate", "--concept", "weapon", "--token", "weapon@1.0.0"], "add --select weak"),
        (["annotate", *weak, "--token", "weapon@1.0.0", "--num-tasks", "2"], "leave out --num-tasks"),
        (["push", *weak], "'weak' is not one of"),
    ):
        result = CliRunner().invoke(command, line)
        assert (result.exit_code, expected in " ".join(result.output.split())) == (2, True), result.output
