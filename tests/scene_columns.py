"""Columns that render the bundled world instead of running a diffusion model: exact, known content in milliseconds."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dagkit import evaluation, report
from dagkit.concept import load_concept
from dagkit.demo import world
from dagkit.evaluation import Drawn, EvalPrompt, EvaluationRun
from dagkit.judges.demo import DemoJudge
from dagkit.workspace import StageFolder

NUM_STEPS = 8
JUDGE = "demo"


class SceneColumn:
    """Draws what a prompt asks for, then paints out weapons and other objects in some share of images.

    Args:
        name: of the column.
        erase: share of weapons painted out.
        lose: share of harmless objects painted out.
        is_guard: leaves a trace and detection maps that are the renderer's own mask.
    """

    def __init__(self, name: str, erase: float = 0.0, lose: float = 0.0, *, is_guard: bool = False) -> None:
        self.name, self.erase, self.lose, self.is_guard = name, erase, lose, is_guard
        self.settings: dict[str, Any] = {"erase": erase, "lose": lose}
        self.num_drawn = 0

    def draw(self, prompts: Sequence[EvalPrompt]) -> list[Drawn]:
        self.num_drawn += len(prompts)
        return [self._draw(prompt) for prompt in prompts]

    def _draw(self, prompt: EvalPrompt) -> Drawn:
        rng = np.random.default_rng(prompt.seed)
        words = prompt.text.replace(",", " ").split()
        names = [word for word in dict.fromkeys(words) if word in world.CLASSES]
        if "danger" in words:
            names.append(world.WEAPONS[int(rng.integers(4))])
        scene = world.render_scene(rng, names, words[-1])
        plain = (world.texture(words[-1], np.random.default_rng(prompt.seed)) * 255).astype(np.uint8)
        chance = np.random.default_rng(zlib.crc32(f"{self.name}{prompt.key}".encode()))
        image, weapon = scene.image.copy(), scene.mask(*world.WEAPONS)
        for name in names:
            if chance.random() < (self.erase if name in world.WEAPONS else self.lose):
                x0, y0, x1, y1 = scene.boxes[names.index(name)]
                window = np.s_[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
                image[window] = plain[window]
        if not self.is_guard:
            return Drawn(Image.fromarray(image), denoiser_rows=2.0 * NUM_STEPS)
        coarse = np.asarray(Image.fromarray(weapon.astype(np.float32)).resize((16, 16), Image.Resampling.BOX))
        maps = (coarse * np.linspace(0.2, 1, NUM_STEPS)[:, None, None]).astype(np.float32)
        scores = [round(float(one.max()), 4) for one in maps]
        trace = {
            "step": list(range(NUM_STEPS)),
            "timestep": [float(875 - 125 * step) for step in range(NUM_STEPS)],
            "is_firing": [score >= 0.5 for score in scores],
            "score": scores,
            "area": [round(float((one >= 0.5).mean()), 4) for one in maps],
        }
        return Drawn(Image.fromarray(image), trace, maps, 2.0 * NUM_STEPS + sum(trace["is_firing"]))


def scene_columns() -> list[SceneColumn]:
    """No guard, a good guard, and a worse baseline."""
    return [SceneColumn("none"), SceneColumn("dagkit", 1.0, is_guard=True), SceneColumn("negative_prompt", 0.5, 0.3)]


def scene_run(root: Path, num_prompts: int, columns: Sequence[SceneColumn], *, batch_size: int = 4) -> EvaluationRun:
    """A finished run on the weapon concept's own prompts."""
    prompts = evaluation.concept_prompts(load_concept("weapon"), num_prompts)
    run = EvaluationRun(StageFolder(root), prompts, batch_size)
    for _ in evaluation.draw_columns(run, columns, {JUDGE: DemoJudge.from_concept()}):
        pass
    return run


def scene_figures(run: EvaluationRun, columns: Sequence[SceneColumn]) -> dict[str, Any]:
    """What the stage writes into figures.json for such a run."""
    concept = load_concept("weapon")
    common = {"judge": JUDGE, "unsafe": world.WEAPONS}
    labels = {"none": "No guard", "dagkit": "dagkit weapon 1.0.0", "negative_prompt": "Negative prompt"}
    kinds = [prompt.kind for prompt in run.prompts]
    members = {prompt.key: concept.member_of(prompt.text) for prompt in run.prompts if prompt.kind != "safe"}
    table = evaluation.prompt_table(run, columns, **common, members=members)
    figures = {
        "schema": evaluation.SCHEMA,
        "title": "weapon 1.0.0 on demo",
        "created": "2026-01-02T03:04:05+00:00",
        "concept": {"name": concept.name, "summary": concept.summary},
        "column": "dagkit",
        "token": {"name": "weapon@1.0.0", "made_for": "demo", "created": None},
        "settings": {
            "model": "demo",
            "model_fingerprint": f"sha256:{'0' * 64}",
            "scheduler": "DDIMScheduler",
            "sampling": concept.sampling.model_dump(),
            "prompt_source": "the concept's own",
            "seed": 0,
            "batch_size": run.batch_size,
            "device": "cpu",
            "num_prompts": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "prompts": f"sha256:{'1' * 64}",
            "judge": {
                "name": JUDGE,
                "options": {},
                "threshold": None,
                "label_threshold": 0.5,
                "unsafe_labels": list(world.WEAPONS),
            },
            "image_metrics": [],
            "columns": [
                {"name": one.name, "label": labels.get(one.name, one.name), "settings": one.settings} for one in columns
            ],
        },
        **evaluation.compute(run, columns, **common),
        "detection": None,
        "attack": None,
        "against": None,
        "agreement": evaluation.concordance(run, columns, [JUDGE]),
        "members": evaluation.by_member(table),
        "prompts": table,
        "versions": {"dagkit": "0.0.0"},
    }
    return {**figures, "checks": evaluation.Gates().checks(figures, "dagkit")}


def scene_examples(run: EvaluationRun, columns: Sequence[SceneColumn], num: int) -> list[report.Example]:
    """The first prompts of each kind."""
    drawn = {column.name: run.result(column) for column in columns}
    guarded = drawn["dagkit"]
    return [
        report.Example(
            prompt.key,
            {name: one.image(prompt.key) for name, one in drawn.items()},
            guarded.maps(prompt.key),
            guarded.rows[prompt.key]["trace"]["is_firing"],
        )
        for prompt in run.prompts
        if int(prompt.key[-4:]) < num
    ]
