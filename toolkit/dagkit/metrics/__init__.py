"""Figures as pure functions. Docstrings say exactly what is computed; each rate has a count and a 95 % interval."""

from __future__ import annotations

from dagkit.metrics.detection import DetectionScores, detection_scores
from dagkit.metrics.frechet import frechet_distance
from dagkit.metrics.intervals import Estimate, bootstrap_mean, bootstrap_ratio, proportion, transform, wilson
from dagkit.metrics.locality import Difference, difference, ssim
from dagkit.metrics.masks import iou
from dagkit.metrics.rates import (
    Concordance,
    PairedTest,
    cohen_kappa,
    concordance,
    erase_rate,
    erase_rate_by_detection,
    mcnemar,
    preservation,
    recall,
)

__all__ = [
    "Concordance",
    "DetectionScores",
    "Difference",
    "Estimate",
    "PairedTest",
    "bootstrap_mean",
    "bootstrap_ratio",
    "cohen_kappa",
    "concordance",
    "detection_scores",
    "difference",
    "erase_rate",
    "erase_rate_by_detection",
    "frechet_distance",
    "iou",
    "mcnemar",
    "preservation",
    "proportion",
    "recall",
    "ssim",
    "transform",
    "wilson",
]
