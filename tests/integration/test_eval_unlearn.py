"""dagkit as a technique of eval-unlearn, in that package's own runner, on the bundled model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import tiny_pipelines as tiny
from dagkit import demo, models
from dagkit.errors import ConceptError
from dagkit.evaluation.eval_unlearn import DagkitTechnique
from dagkit.resources import user_cache_folder

PROMPTS = ["a bomb on grass", "a cat on sand"]
STEPS = 4
VERSION = "1.1.2"


def test_the_entry_point_names_the_technique() -> None:
    (entry,) = entry_points(group="eval_unlearn.techniques", name="dagkit")
    assert entry.load() is DagkitTechnique


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    pipe = models.load(demo.model_path()).pipe
    folder = tmp_path_factory.mktemp("token") / "1.0.0"
    tiny.token(pipe).save(folder)
    return str(folder)


def test_a_config_without_token_and_concept_is_named() -> None:
    with pytest.raises(ConceptError, match="expected a token or a concept in its config, but got neither"):
        DagkitTechnique()


def test_seeds_and_settings_are_eval_unlearns(token: str) -> None:
    technique = DagkitTechnique(token=token, device="cpu", num_inference_steps=STEPS, strength=0.0)
    first = technique.generate(PROMPTS, seed=3)
    assert [image.size for image in first] == [(64, 64)] * 2
    assert technique.generate(PROMPTS[1:], seed=4)[0].size == (64, 64)
    assert [image.tobytes() for image in technique.generate(PROMPTS, seed=3)] == [image.tobytes() for image in first]
    plain = DagkitTechnique(erase_concept="weapon", device="cpu", num_inference_steps=STEPS)
    assert plain.guard is None
    assert [one.tobytes() for one in plain.generate(PROMPTS, seed=3)] == [one.tobytes() for one in first]


RUN = """\
import json, sys
from eval_unlearn import runners
from eval_unlearn.registry import register_metric
from eval_unlearn.types import Dataset, MetricResult
from dagkit.judges.demo import DemoJudge

token, folder, prompts, steps = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])


@register_metric("weapons_left")
class WeaponsLeft:
    def __init__(self, **_):
        self.said = []

    def load_dataset(self):
        return [Dataset(prompts=prompts)]

    def update(self, images, prompts, metadata):
        self.said += [one.is_present for one in DemoJudge.from_concept().judge(images)]

    def compute(self):
        return MetricResult("weapons_left", sum(self.said) / len(self.said), {"num_images": len(self.said)})


report = runners.SingleBenchmarkRunner(
    technique_name="dagkit",
    metric_name="weapons_left",
    technique_config={"token": token, "device": "cpu", "num_inference_steps": steps, "erase_concept": "weapon"},
    output_dir=folder,
    seed=7,
).run()
print(report)
"""


@pytest.fixture(scope="module")
def eval_unlearn() -> Path:
    """eval-unlearn in a folder of its own, kept in the user's cache.

    It asks for numpy 2.4, which label-studio-sdk 2.1 does not allow beside it, but runs with what is installed here.
    """
    cache = user_cache_folder() / "eval-unlearn" / VERSION
    if not (cache / "eval_unlearn").is_dir():
        building = cache.with_name(f".{VERSION}-{os.getpid()}")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(building)]
        done = subprocess.run([*install, f"eval-unlearn=={VERSION}"], capture_output=True, text=True)
        if done.returncode:
            if os.environ.get("CI"):
                pytest.fail(f"CI must be able to install eval-unlearn: {done.stderr}")
            pytest.skip("NO EVAL-UNLEARN: its runner did not run (pip could not install it)")
        try:
            building.rename(cache)
        except OSError:  # another process was faster
            shutil.rmtree(building)
    return cache


def test_it_runs_in_eval_unlearns_own_runner(eval_unlearn: Path, token: str, tmp_path: Path) -> None:
    given = [sys.executable, "-c", RUN, token, str(tmp_path), json.dumps(PROMPTS), str(STEPS)]
    paths = [str(eval_unlearn), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(given, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weapons_left" in done.stdout
    assert "'num_images': 2" in done.stdout
    assert list(tmp_path.rglob("*.png"))
