"""Evaluation: the same prompts from the same noise in several columns, judged, counted, and resumable."""

from __future__ import annotations

from dagkit.evaluation.columns import Column, Drawn, PipelineColumn
from dagkit.evaluation.detection import score_detection
from dagkit.evaluation.drawing import ColumnResult, ColumnWork, EvaluationRun, draw_columns
from dagkit.evaluation.figures import (
    BASELINE,
    SCHEMA,
    by_member,
    compute,
    concordance,
    prompt_table,
    seen_region,
    unsafe_labels,
)
from dagkit.evaluation.gates import Gates, comparable, compare, regressions
from dagkit.evaluation.identity import read_figures, token_identity
from dagkit.evaluation.image_metrics import NAMES as IMAGE_METRICS
from dagkit.evaluation.image_metrics import ImageMetric, load_image_metrics
from dagkit.evaluation.prompt_files import PRESETS, read_prompts
from dagkit.evaluation.prompts import EvalPrompt, concept_prompts, describe_prompts

__all__ = [
    "BASELINE",
    "IMAGE_METRICS",
    "PRESETS",
    "SCHEMA",
    "Column",
    "ColumnResult",
    "ColumnWork",
    "Drawn",
    "EvalPrompt",
    "EvaluationRun",
    "Gates",
    "ImageMetric",
    "PipelineColumn",
    "by_member",
    "comparable",
    "compare",
    "compute",
    "concept_prompts",
    "concordance",
    "describe_prompts",
    "draw_columns",
    "load_image_metrics",
    "prompt_table",
    "read_figures",
    "read_prompts",
    "regressions",
    "score_detection",
    "seen_region",
    "token_identity",
    "unsafe_labels",
]
