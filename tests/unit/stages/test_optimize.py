import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from datasets import DatasetDict, concatenate_datasets

from dagkit.cli import command
from dagkit.concept import load_concept
from dagkit.dataset import load_dataset, save_dataset, summarise
from dagkit.errors import TokenError
from dagkit.stages import optimize
from dagkit.token import GuidelineToken, slices
from interruption import finish
from tiny_world import make_concept

ENOUGH_STEPS = 120


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A concept file of a model with random weights, and the dataset of 16 of its images."""
    concept = make_concept(tmp_path_factory.mktemp("tiny"))
    workspace = tmp_path_factory.mktemp("runs")
    where = ["--concept", concept, "--workspace", workspace, "--quiet"]
    finish("generate", *where, "--num-images", 16)
    finish("premask", *where)
    finish("export", *where[:-1], "--unreviewed")
    return concept, workspace / "dataset" / "tiny"


def line(made: tuple[Path, Path], workspace: Path, num_steps: int) -> list[str]:
    concept, dataset = made
    where = ["--concept", concept, "--dataset", dataset, "--workspace", workspace]
    return [str(one) for one in ("optimize", *where, "--num-steps", num_steps, "--tune", 0)]


def test_a_token_that_is_never_sure_is_not_written(made: tuple[Path, Path], tmp_path: Path) -> None:
    error = CliRunner().invoke(command, line(made, tmp_path, 1)).exception
    assert isinstance(error, TokenError)
    assert str(error) == (
        "tiny@1.0.0 was not written: from 10 unsafe and 6 safe images, no threshold tells unsafe from safe images "
        "(detection rate 0%), so its guard would never act. Annotate more images, get better masks from other "
        "proposals, or take more steps (--num-steps, now 1)."
    )
    tokens = tmp_path / "tokens" / "tiny"
    assert [path.name for path in tokens.iterdir() if path.is_dir()] == []
    assert len(list(tokens.glob(".checkpoint-*.safetensors"))) == 1


def test_the_papers_recipe_is_written_all_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    finish(*line(made, tmp_path, 1), "--recipe", "paper")
    record = json.loads((tmp_path / "tokens" / "tiny" / "1.0.0" / "token.json").read_text())
    assert record["metrics"]["validation_detection_rate"] == 0
    assert record["guidance"] | {"form": "paper", "strength": 1.0, "reuse_steps": 1} == record["guidance"]
    assert (record["thresholds"]["highlight"], record["thresholds"]["edit"]) == ([0.5], [0.01])
    assert record["metrics"]["calibrated_thresholds"]["certain"] == [1.0] * 6
    token = tmp_path / "tokens" / "tiny" / "1.0.0"
    assert record["base_model"]["id"] == "model"  # and not where it lies
    written = [path for path in (*token.iterdir(), *made[1].rglob("*")) if path.is_file()]
    places = [str(made[0].parent).encode(), str(made[1]).encode()]
    assert [path for path in written if any(place in path.read_bytes() for place in places)] == []


def test_a_low_detection_rate_is_said(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "LOW_DETECTION_RATE", 0.0)
    assert "but it recognises only" not in finish(*line(made, tmp_path / "first", ENOUGH_STEPS))
    monkeypatch.setattr(optimize, "LOW_DETECTION_RATE", 1.01)
    said = finish(*line(made, tmp_path / "second", ENOUGH_STEPS))
    record = GuidelineToken.load(tmp_path / "second" / "tokens" / "tiny" / "1.0.0").record
    rate = record.metrics["validation_detection_rate"]
    assert f"but it recognises only {rate:.0%} of the unsafe validation images: annotate more" in said


def test_a_weak_member_is_warned_of(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "WEAK", 1.01)
    said = finish(*line(made, tmp_path, ENOUGH_STEPS))
    record = GuidelineToken.load(tmp_path / "tokens" / "tiny" / "1.0.0").record
    weakest, *others = slices.slices_of(record)
    assert {one.name for one in (weakest, *others)} <= {"bomb", "knife", "axe"}
    assert f", weakest member {weakest.words()}" in said
    for one in (weakest, *others):
        assert f"WARNING: {one.name} is seen in time in only " in said
    prompts = {prompt.text for prompt in load_concept(str(made[0])).all_prompts("safe")}
    assert not any(prompt in json.dumps(record.model_dump(mode="json")) for prompt in prompts)


def test_the_result_holds_loss_and_validation_figures(made: tuple[Path, Path], tmp_path: Path) -> None:
    shown: dict[str, Any] = json.loads(finish(*line(made, tmp_path, ENOUGH_STEPS), "--json").splitlines()[-1])
    assert [row["step"] for row in shown["history"]] == [40, 80, 120]
    assert all(0 <= row["validation_iou"] <= 1 and row["loss"] > 0 for row in shown["history"])
    assert shown["metrics"]["validation_detection_rate"] > 0
    assert [point["is_chosen"] for point in shown["metrics"]["calibration_curve"]].count(True) == 1


def test_without_validation_images_figures_are_the_trainings(made: tuple[Path, Path], tmp_path: Path) -> None:
    """In output, record and card; nothing is called a validation figure."""
    concept, source = made
    data = load_dataset(source)
    whole = DatasetDict({**data, "train": concatenate_datasets([*data.values()])})
    whole |= {split: data[split].select([]) for split in ("validation", "test")}
    save_dataset(DatasetDict(whole), tmp_path / "data", summarise(DatasetDict(whole), load_concept(str(concept))))
    options = ["--recipe", "paper", "--json"]
    result = CliRunner().invoke(command, [*line((concept, tmp_path / "data"), tmp_path, 1), *options])
    shown = json.loads(result.stdout.splitlines()[-1])
    assert re.search(r", training IoU 0\.\d\d \(the dataset keeps no unsafe images apart", shown["message"])
    token = GuidelineToken.load(shown["path"])
    names = {*token.record.metrics, *shown["metrics"]}
    assert {"training_iou", "training_detection_rate", "training_false_trigger_rate"} <= names
    assert not [name for name in names if "validation" in name]
    card = (Path(shown["path"]) / "README.md").read_text()
    assert "the training's own safe and unsafe images, of which none were kept apart" in card
    assert "were measured on images that the token learned from" in card
    assert "validation" not in card.replace("validate_every", "")


def test_the_bar_shows_loss_and_validation_iou(made: tuple[Path, Path], tmp_path: Path) -> None:
    """On a real terminal."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dagkit.cli", *line(made, tmp_path, ENOUGH_STEPS)],
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env={**environment, "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    while chunk := read(ours):
        shown += chunk
    os.close(ours)
    assert process.wait() == 0, shown
    assert re.search(rb"optimize loss \d\.\d{3}, IoU [01]\.\d{3} ", shown), shown


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""
