"""Scene columns drawn by worker processes; as a program: ``python scene_work.py FOLDER NUM_PROMPTS``."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from dagkit import engines, evaluation
from dagkit.concept import load_concept
from dagkit.engines import Engine
from dagkit.evaluation import ColumnWork, EvaluationRun
from dagkit.judges.demo import DemoJudge
from dagkit.workspace import StageFolder, lock
from scene_columns import JUDGE, scene_columns


def build() -> ColumnWork:
    return ColumnWork(scene_columns(), {JUDGE: DemoJudge.from_concept()})


def draw(folder: Path, num_prompts: int, engine: Engine | None, num_batches: int | None = None) -> EvaluationRun:
    """Draws a run on the weapon concept's own prompts, or its first batches."""
    prompts = evaluation.concept_prompts(load_concept("weapon"), num_prompts)
    run, judges = EvaluationRun(StageFolder(folder), prompts, 3), {JUDGE: DemoJudge.from_concept()}
    steps = evaluation.draw_columns(run, scene_columns(), judges, engine, build)
    with lock(folder), closing(steps):
        for number, _ in enumerate(steps, 1):
            if number == num_batches:
                break
    return run


if __name__ == "__main__":
    with engines.open_engine(2) as two:
        draw(Path(sys.argv[1]), int(sys.argv[2]), two)
