"""Evaluation: the same prompts from the same noise in several columns, judged, counted, and resumable."""

from __future__ import annotations

from dagkit.evaluation.columns import Column, Drawn, PipelineColumn
from dagkit.evaluation.drawing import EvaluationRun, draw_columns
from dagkit.evaluation.figures import BASELINE, SCHEMA, compute, prompt_table, seen_region, unsafe_labels
from dagkit.evaluation.gates import Gates, comparable, regressions
from dagkit.evaluation.prompts import EvalPrompt, concept_prompts

__all__ = [
    "BASELINE",
    "SCHEMA",
    "Column",
    "Drawn",
    "EvalPrompt",
    "EvaluationRun",
    "Gates",
    "PipelineColumn",
    "comparable",
    "compute",
    "concept_prompts",
    "draw_columns",
    "prompt_table",
    "regressions",
    "seen_region",
    "unsafe_labels",
]
