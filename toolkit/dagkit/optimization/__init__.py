"""Guideline token optimisation: cached features, losses, recipes, calibration.

The frozen denoiser runs once for each (image, noise level); after that only a projection of the rows and a softmax are
left, so a step costs milliseconds. What is learned: the guideline rows, and in the default recipe background rows that
compete with them in the softmax, and one weight a head.

    result = optimize(base, examples, recipe=RECIPES["default"], seed=0)
    result.token(base, concept="weapon", version="1.0.0", safety_prompt="a weapon").save(folder)
"""

from __future__ import annotations

from dagkit.optimization.cache import QueryCache, cache_queries
from dagkit.optimization.calibration import KNOTS, Calibration, calibrate
from dagkit.optimization.data import Example, check_examples, coarse_mask, split
from dagkit.optimization.fit import Parameters, fit, initial_parameters
from dagkit.optimization.losses import background_leakage, negative_attention, objective, pixel_cross_entropy
from dagkit.optimization.recipe import PAPERS_CONSTANTS, PAPERS_GUIDANCE, RECIPES, Recipe
from dagkit.optimization.training import OptimizationResult, data_efficiency, draw_levels, optimize

__all__ = [
    "KNOTS",
    "PAPERS_CONSTANTS",
    "PAPERS_GUIDANCE",
    "RECIPES",
    "Calibration",
    "Example",
    "OptimizationResult",
    "Parameters",
    "QueryCache",
    "Recipe",
    "background_leakage",
    "cache_queries",
    "calibrate",
    "check_examples",
    "coarse_mask",
    "data_efficiency",
    "draw_levels",
    "fit",
    "initial_parameters",
    "negative_attention",
    "objective",
    "optimize",
    "pixel_cross_entropy",
    "split",
]
