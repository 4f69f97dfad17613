"""Evaluation: the same prompts from the same noise in several columns, judged, counted, and resumable."""

from __future__ import annotations

from dagkit.evaluation.columns import Column, Drawn, PipelineColumn
from dagkit.evaluation.drawing import EvaluationRun, draw_columns
from dagkit.evaluation.figures import BASELINE, compute, seen_region, unsafe_labels
from dagkit.evaluation.prompts import EvalPrompt, concept_prompts

__all__ = [
    "BASELINE",
    "Column",
    "Drawn",
    "EvalPrompt",
    "EvaluationRun",
    "PipelineColumn",
    "compute",
    "concept_prompts",
    "draw_columns",
    "seen_region",
    "unsafe_labels",
]
