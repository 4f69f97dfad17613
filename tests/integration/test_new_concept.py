"""From nothing to a published token: the README's last section; and a file for another model, whose lines all count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dagkit
from dagkit.cli import command
from dagkit.concept import Concept, Labels, Prompts, Sampling, ThresholdSettings, files, load_concept
from tiny_clip import save_tiny_clip

README = Path(__file__).parents[2] / "README.md"
CLASSES = (Concept, Labels, Prompts, ThresholdSettings, Sampling)
PROMPTS = """\
prompts:
  unsafe: ["a {blade} on {place}", "a {object} and a {blade} on {place}"]
  hinted: ["a {object} in danger on {place}"]
  safe: ["a {object} on {place}", "a {object} and a {object_2} on {place}"]
  slots:
    blade: [knife, axe]
    object: [cat, dog, apple, car, ball, fish]
    place: [grass, sand, water, snow]
  keep: [object]

"""


def fill_in(path: Path, clip: Path) -> None:
    """What a user does with the file: prompts, the model, where weights are; the template's other lines stay."""
    text = path.read_text()
    start, end = text.index("prompts:\n"), text.index("words: ")
    text = text[:start] + PROMPTS + text[end:]
    for old, new in {
        "model: stable-diffusion-v1-5/stable-diffusion-v1-5": "model: demo",
        "model_type: vit_b": "model_type: vit_tiny",
        "judge: {name: clip,": f"judge: {{name: clip, checkpoint: {clip},",
        "# highlight: 0.5": "highlight: 0.45",
        "# edit: 0.01": "edit: 0.2",
        "num_inference_steps: 50": "num_inference_steps: 8",
        "width: 512, height: 512": "width: 64, height: 64",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fields of concepts that somebody reads after their files were checked, as ``Class.field``."""
    found: set[str] = set()
    checking = [False]
    for cls in CLASSES:

        def spy(self: Any, name: str, cls: type = cls) -> Any:
            if not checking[0]:
                is_whole = cls is Sampling and name == "model_dump"  # handed on as a pipeline's settings
                fields = cls.model_fields if is_whole else {name} & set(cls.model_fields)
                found.update(f"{cls.__name__}.{field}" for field in fields)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", spy, raising=False)
    parse = files.parse_concept

    def quietly(*arguments: Any, **options: Any) -> Concept:
        checking[0] = True
        try:
            return parse(*arguments, **options)
        finally:
            checking[0] = False

    monkeypatch.setattr(files, "parse_concept", quietly)
    return found


def run(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the bundled model does not know")
def test_a_file_for_another_model_is_filled_in_and_every_line_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("concept", "new", "blade", "--words", "knife, axe")
    file = tmp_path / "annotation_configs" / "blade.yaml"
    fill_in(file, save_tiny_clip(tmp_path / "clip"))
    assert "unsafe prompts: 56, 9 of them kept for evaluation" in run("concept", "show", "blade")
    assert "MISSING" not in run("doctor", "--concept", "blade")
    read.clear()  # to check or to show a field is not to use it
    run("generate", "--concept", "blade", "--num-images", 10, "--batch-size", 8, "--quiet")
    run("premask", "--concept", "blade", "--quiet")
    run("export", "--concept", "blade", "--unreviewed")
    run("optimize", "--concept", "blade", "--num-steps", 30, "--tune", 0, "--quiet")
    run("evaluate", "--token", "blade@1.0.0", "--num-prompts", 1, "--column", "none", "--num-examples", 1, "--quiet")
    run("publish", "blade@1.0.0", "--to", f"file://{tmp_path}/tokens")
    token = dagkit.load_token(f"file://{tmp_path}/tokens@^1")

    assert token.name == "blade@1.0.0"
    assert set(token.record.thresholds.highlight) == {0.45}
    assert set(token.record.thresholds.edit) == {0.2}
    assert set(token.record.metrics["calibrated_thresholds"]["edit"]) != {0.2}
    figures = json.loads((tmp_path / "runs" / "reports" / "blade" / "1.0.0" / "figures.json").read_text())
    assert figures["settings"]["judge"]["options"]["present"] == ["a photo of knife"]
    assert figures["settings"]["prompt_source"] == "the concept's own, kept apart from those of its candidates (blade)"
    drawn = [json.loads(line) for line in (tmp_path / "runs/candidates/blade/manifest.jsonl").read_text().splitlines()]
    assert not {row["prompt"] for row in drawn} & {row["text"] for row in figures["prompts"]}
    assert not {row["seed"] for row in drawn} & {row["seed"] for row in figures["prompts"]}
    assert drawn[0]["settings"].items() >= load_concept(file).sampling.model_dump().items()

    fields = {f"{cls.__name__}.{field}" for cls in CLASSES for field in cls.model_fields}
    assert sorted(fields - read) == []  # what nothing reads would be a comment, not an option


@pytest.mark.slow
def test_the_readmes_last_section_as_it_stands(tmp_path: Path) -> None:
    """In a shell, in an empty folder, where `dagkit` and `python` are those that run this test."""
    section = README.read_text().split("## A concept of your own, in five minutes")[1]
    block = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert [line.split()[1] for line in block.splitlines()[:-1]] == [
        *("concept", "concept", "generate", "premask", "export", "optimize", "evaluate", "publish")
    ]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, more in {"python": "", "dagkit": "-m dagkit.cli "}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {more}"$@"\n')
        (tools / name).chmod(0o755)
    (tmp_path / "empty").mkdir()
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(dagkit.__file__).parents[1]),
    }
    line = ["sh", "-eu", "-c", block]
    done = subprocess.run(line, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "concept lint: 0 errors, 0 warnings" in done.stdout
    assert done.stdout.endswith("animal@1.0.0\n")
    record = dagkit.load_token(f"file://{tmp_path}/empty/published/animal@1.0.0").record
    assert record.safety_phrases == ("a cat", "a dog", "a fish", "a duck")
    figures = json.loads((tmp_path / "empty/runs/reports/animal/1.0.0/figures.json").read_text())
    assert figures["settings"]["judge"]["options"]["present"] == ["cat", "dog", "fish", "duck"]
