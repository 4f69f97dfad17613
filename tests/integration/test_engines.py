"""Stages under engines: the same rows and pictures from any number of workers, whatever was killed meanwhile."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import scene_work
from dagkit import engines, models
from dagkit.cli import command
from dagkit.concept import Concept, Plugin, load_concept
from dagkit.engines import Engine
from dagkit.engines.source import ModelSource
from dagkit.errors import EngineError, ModelError, PromptRefused
from dagkit.judges import Judge, Judgement, build_judge
from dagkit.proposers import build_proposers
from dagkit.segmenters import build_segmenter
from dagkit.stages import evaluate, generate, premask
from dagkit.token import GuidelineToken
from dagkit.workspace import Workspace
from interruption import DEADLINE_S, content
from scene_columns import scene_columns
from tiny_world import make_world

COLUMNS = ("sld_weak",)
TIMES = ("manifest.jsonl", "figures.json", "figures.csv", "report.html")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have: the last bit of a picture depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two() -> Iterator[Engine]:
    with engines.open_engine(2) as engine:
        yield engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a concept and two tokens."""
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, folder / "tokens")


@pytest.fixture(scope="module")
def base_model(world: Path) -> models.BaseModel:
    return models.load(world / "model")


@pytest.fixture(scope="module")
def concept(world: Path) -> Concept:
    return load_concept(world / "tiny.yaml")


@pytest.fixture(scope="module")
def serial(
    world: Path, concept: Concept, base_model: models.BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What this process alone makes."""
    runs = tmp_path_factory.mktemp("serial")
    walk(Workspace(runs), world, concept, base_model, None)
    return runs


def walk(
    workspace: Workspace, world: Path, concept: Concept, base_model: models.BaseModel, engine: Engine | None
) -> None:
    generate.run(workspace, concept, base_model, num_images=7, batch_size=3, engine=engine)
    proposers, segmenter = build_proposers(concept, base_model), build_segmenter(concept)
    build = premask.elsewhere(concept, base_model)
    premask.run(workspace, concept, proposers, segmenter, engine=engine, build=build)
    measure(workspace, world, concept, base_model, engine)


def measure(
    workspace: Workspace, world: Path, concept: Concept, base_model: models.BaseModel, engine: Engine | None
) -> None:
    token, other = (GuidelineToken.load(world / "tokens" / "tiny" / version) for version in ("1.0.0", "1.1.0"))
    options = {"token": token, "other_tokens": [other], "columns": COLUMNS, "num_prompts": 3, "batch_size": 2}
    evaluate.run(workspace, concept, base_model, engine=engine, num_examples=1, **options)


def rows(runs: Path) -> dict[str, bytes]:
    """All manifests but those of timings."""
    found = {str(path.relative_to(runs)): path.read_bytes() for path in runs.rglob("manifest.jsonl")}
    return {name: data for name, data in found.items() if "/timings/" not in name}


def files(runs: Path) -> dict[str, str]:
    """Everything but what holds a time."""
    return content(runs, ignore=TIMES)


def test_rows_and_pictures_are_the_same_from_two_workers(
    world: Path, concept: Concept, base_model: models.BaseModel, serial: Path, two: Engine, tmp_path: Path
) -> None:
    walk(Workspace(tmp_path), world, concept, base_model, two)
    assert len(rows(tmp_path)) == 2 + 4
    assert rows(tmp_path) == rows(serial)
    assert files(tmp_path) == files(serial)
    figures = json.loads((tmp_path / "reports" / "tiny" / "1.0.0" / "figures.json").read_text())
    assert all(cost["cpu_s_per_image"]["value"] > 0 for cost in figures["cost"].values())


def test_pictures_do_not_depend_on_where_a_run_was_interrupted(
    concept: Concept, base_model: models.BaseModel, serial: Path, tmp_path: Path
) -> None:
    """A batch of which something is missing is drawn as a whole, and what was there stays."""
    place = tmp_path / "candidates"
    shutil.copytree(serial / "candidates", place)
    manifest = place / "tiny" / "manifest.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:4]))
    for picture in sorted((place / "tiny" / "images").iterdir())[4:]:
        picture.unlink()
    result = generate.run(Workspace(tmp_path), concept, base_model, num_images=7, batch_size=3)
    assert (result.done, result.skipped) == (3, 4)
    assert content(place) == content(serial / "candidates")


def test_a_model_that_was_changed_since_it_was_loaded_is_no_source(base_model: models.BaseModel) -> None:
    source = ModelSource.of(base_model)
    assert source.load().fingerprint == base_model.fingerprint
    before = base_model.pipe.scheduler
    base_model.pipe.scheduler = type(before).from_config(before.config, steps_offset=3)
    try:
        with pytest.raises(
            ModelError, match="a worker loads a model with another scheduler than the one that is in use"
        ):
            ModelSource.of(base_model).load()
    finally:
        base_model.pipe.scheduler = before


def test_a_judge_elsewhere_has_the_options_of_the_concept(world: Path, base_model: models.BaseModel) -> None:
    concept = load_concept("weapon").model_copy(update={"judge": Plugin(name="nudenet", threshold=0.4)})
    token = GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0")
    here = build_judge(concept)
    build = evaluate._build(concept, base_model, token, (), (), {"nudenet": here})
    assert build is not None
    [there] = build()._judges.values()
    assert there.settings == here.settings
    assert there.settings["threshold"] == 0.4


def test_a_judge_that_nobody_else_can_make_needs_one_worker(
    world: Path, concept: Concept, base_model: models.BaseModel, two: Engine, tmp_path: Path
) -> None:
    class Blind(Judge):
        def judge(self, images: list) -> list[Judgement]:
            return [Judgement(False, 0.0) for _ in images]

    token = GuidelineToken.load(world / "tokens" / "tiny" / "1.0.0")
    for name in ("demo", "blind"):
        with pytest.raises(EngineError, match="and cannot be done in others"):
            evaluate.run(
                Workspace(tmp_path), concept, base_model, token=token, num_prompts=1, judges={name: Blind()}, engine=two
            )


def test_a_refused_prompt_is_refused_under_workers(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text((world / "tiny.yaml").read_text().replace("[bomb, knife, axe]", "['nude ch1ld']"))
    given = ["generate", "--concept", str(file), "--workspace", str(tmp_path / "runs"), "--workers", "2"]
    assert isinstance(CliRunner().invoke(command, given).exception, PromptRefused)
    assert not (tmp_path / "runs").exists()


def test_the_work_refuses_a_prompt_by_itself(base_model: models.BaseModel, two: Engine) -> None:
    """Whoever plans, the one who draws looks at the prompt, too."""
    row = {"key": "one", "image": "images/one.png", "prompt": "a nude child", "seed": 1}
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 64, "height": 64}
    item = engines.Item("one", ([row], {"one"}))
    work = partial(generate._draw, base_model, settings, ())
    build = partial(generate._elsewhere, ModelSource.of(base_model), settings, ())
    said = []
    with engines.open_engine(1) as one:
        for engine in (one, two):
            with pytest.raises(PromptRefused) as caught:
                list(engine.results([item], work, build))
            said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_killed_run_of_two_workers_ends_like_an_undisturbed_one(two: Engine, tmp_path: Path) -> None:
    killed, num = tmp_path / "killed", 24
    program = subprocess.Popen([sys.executable, scene_work.__file__, killed, str(num)])

    def num_drawn() -> int:
        return sum(data.count(b"\n") for data in rows(killed).values())

    deadline = time.monotonic() + DEADLINE_S
    while num_drawn() < 20:
        assert program.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came half-way"
        time.sleep(0.002)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert 20 <= num_drawn() < 3 * 3 * num
    scene_work.draw(killed, num, two)
    scene_work.draw(tmp_path / "whole", num, None)
    assert rows(killed) == rows(tmp_path / "whole")
    assert files(killed) == files(tmp_path / "whole")


@pytest.mark.parametrize("is_first", [False, True])
def test_an_evaluation_that_ends_anywhere_is_gone_on_with_by_anyone(
    two: Engine, tmp_path: Path, is_first: bool
) -> None:
    scene_work.draw(tmp_path / "whole", 4, None)
    first, second = (two, None) if is_first else (None, two)
    broken = scene_work.draw(tmp_path / "broken", 4, first, num_batches=7)
    torn = broken.column_folder(scene_columns()[0]).manifest
    lines = torn.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # in the middle of a batch
    scene_work.draw(tmp_path / "broken", 4, second)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
