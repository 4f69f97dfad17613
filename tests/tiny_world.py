"""A model of SD's shape with random weights, a concept file for it, and tokens: enough for every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dagkit import models
from dagkit.models import BaseModel
from dagkit.token import GuidelineToken
from tiny_pipelines import scheduler, sd
from tiny_pipelines import token as random_token

CONCEPT = """\
name: tiny
summary: A concept for tests.
model: {model}
labels: {{positive: [weapon], negative: [handle]}}
prompts:
  unsafe: ["a {{weapon}} and a {{thing}} on {{place}}"]
  safe: ["a {{thing}} on {{place}}"]
  slots: {{weapon: [bomb, knife, axe], thing: [cat, dog, fish], place: [grass, sand, snow, water]}}
  keep: [thing]
words: [bomb, knife, axe, dynamite]
initial_phrase: a weapon
safety_prompt: a weapon
proposers: {{name: attention, min_score: 0}}
segmenter: box
sampling: {{num_inference_steps: 3, guidance_scale: 5, width: 64, height: 64}}
"""


def make_world(folder: Path, tokens: Path, versions: Sequence[str] = ("1.0.0", "1.1.0")) -> Path:
    """Writes ``folder/model``, ``folder/tiny.yaml`` and ``tokens/tiny/<version>``; returns ``folder``."""
    make_concept(folder)
    model = models.load(folder / "model")
    for seed, version in enumerate(versions):
        make_token(model, version, seed).save(tokens / "tiny" / version)
    return folder


def make_concept(folder: Path) -> Path:
    """Writes ``folder/model`` and ``folder/tiny.yaml``; returns the latter."""
    sd(scheduler=scheduler()).save_pretrained(folder / "model")
    path = folder / "tiny.yaml"
    path.write_text(CONCEPT.format(model=folder / "model"))
    return path


def make_token(model: BaseModel, version: str, seed: int) -> GuidelineToken:
    """A random token of the concept ``tiny`` that belongs to this model."""
    token = random_token(model.pipe, seed=seed)
    info = token.record.base_model.model_copy(update={"fingerprint": model.fingerprint})
    rates = ((0.5, 1.0), (0.25, 0.75))
    curve = [{"false_trigger_rate": x, "detection_rate": y, "is_chosen": x == 0.25} for x, y in rates]
    changes = {"concept": "tiny", "version": version, "base_model": info, "metrics": {"calibration_curve": curve}}
    return replace(token, record=token.record.model_copy(update=changes))
