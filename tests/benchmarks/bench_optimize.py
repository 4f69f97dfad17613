"""Optimisation: CPU time against the paper's recipe, peak memory at SD 1.5's size; variants and data efficiency.

    python tests/benchmarks/bench_optimize.py [--quick] [--variants]

``optimize.speedup``: both recipes learn from the same cached queries; CPU time of the paper's recipe (as published:
100 steps of SGD on all pairs) to its best validation IoU, divided by the default's CPU time to that same IoU.
Validation is not counted. ``--variants`` measures what has no bar as well: fewer tokens, uniform heads, no background
tokens, a random start, fewer images, and L-BFGS on all pairs (``optimize.lbfgs_cpu_s`` and
``optimize.lbfgs_best_cpu_s``: to the paper's best IoU and to its own best).

``optimize.memory``: of ``optimize()`` itself on 64 images x 8 timesteps at SD 1.5's size, all three caches and the
calibration included; see ``memory``.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_world as bench
import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from dagkit import models
from dagkit.metrics import iou
from dagkit.models import BaseModel
from dagkit.models.base import PLAIN
from dagkit.models.calls import Condition
from dagkit.models.cross_attention import CrossAttention
from dagkit.models.sites import Sites
from dagkit.optimization import (
    RECIPES,
    Example,
    Parameters,
    QueryCache,
    Recipe,
    data_efficiency,
    fit,
    initial_parameters,
    objective,
    optimize,
)

BUDGET_BYTES = 1 << 30
NUM_DRAWS, NUM_STEPS = 8, 3
LBFGS_CPU_S = 15
VARIANTS: dict[str, dict[str, Any]] = {
    "1_tokens": {"num_tokens": 1},
    "2_tokens": {"num_tokens": 2},
    "uniform_heads": {"learn_head_weights": False},
    "no_background": {"num_background": 0},
    "random_init": {"initial_phrase": ""},
}


def best_iou(parameters: Parameters, base: BaseModel, held: QueryCache) -> float:
    """Mean IoU on held-out pairs up to t = 700 at the best common threshold."""
    index = (held.is_unsafe & (held.levels <= 0.7)).nonzero()[:, 0]
    cams, masks = parameters.cams(base.sites, held, index), held.masks[index]
    return max(float(iou(cams >= 0.05 * k, masks >= 0.5).mean()) for k in range(1, 20))


def curve(
    base: BaseModel, cache: QueryCache, held: QueryCache, training: list[Any], recipe: Recipe, every: int
) -> list[tuple[float, float]]:
    """(CPU seconds, validation IoU) while a recipe runs; validation is not counted."""
    sites = base.sites
    points: list[tuple[float, float]] = []
    spent, last = 0.0, time.process_time()

    def validate(parameters: Parameters) -> dict[str, float]:
        nonlocal spent, last
        spent += time.process_time() - last
        points.append((spent, best_iou(parameters, base, held)))
        last = time.process_time()
        return {"validation_loss": -float(len(points))}

    start = initial_parameters(base, training, recipe, sites, torch.Generator().manual_seed(1))
    last = time.process_time()
    fit(sites, cache, start, replace(recipe, validate_every=every), torch.Generator().manual_seed(1), validate=validate)
    return points


def first_at(points: list[tuple[float, float]], value: float) -> float:
    """CPU seconds to the first point that reaches a value."""
    return next((seconds for seconds, reached in points if reached >= value), float("nan"))


def lbfgs(base: BaseModel, cache: QueryCache, held: QueryCache, training: list[Any]) -> list[tuple[float, float]]:
    """As ``curve``, for the default's rows and losses under L-BFGS on all pairs, for at most ``LBFGS_CPU_S``."""
    recipe = bench.recipe()
    parameters = initial_parameters(base, training, recipe, base.sites, torch.Generator().manual_seed(1))
    learned = [tensor.requires_grad_(True) for tensor in parameters.learned()]
    optimizer = torch.optim.LBFGS(learned, max_iter=5, history_size=20, line_search_fn="strong_wolfe")
    batch = cache.take(torch.arange(len(cache)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(parameters.cam(base.sites, batch), batch.masks, batch.is_unsafe, recipe)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    points: list[tuple[float, float]] = []
    spent = 0.0
    while spent < LBFGS_CPU_S:
        last = time.process_time()
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        spent += time.process_time() - last
        points.append((spent, best_iou(parameters, base, held)))
    return points


def memory(is_quick: bool) -> dict[str, object]:
    """Peak memory of the default recipe on 64 images x 8 timesteps at SD 1.5's size, in a process of its own.

    Only the number of steps differs from the default. The denoiser is ``OnlyQueries``; what counts is what the process
    takes beyond what it held before ``optimize()``: the memory of caches, micro-batches, gradients and calibration.
    """
    code = f"import bench_optimize; bench_optimize.memory_child({is_quick})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=bench.HERE)
    num_images, batch_size, rest, peak = (int(word) for word in done.stdout.split())
    return {
        "optimize.memory": peak - rest,
        "optimize.memory_of_process": peak,
        "optimize.memory_budget": BUDGET_BYTES,
        "optimize.memory_within_budget": peak - rest <= BUDGET_BYTES,
        "optimize.memory_batch_size": batch_size,
        "optimize.memory_num_images": num_images,
        "optimize.memory_num_draws": NUM_DRAWS,
        "optimize.memory_num_steps": NUM_STEPS,
    }


def memory_child(is_quick: bool) -> None:
    """Prints images, batch size, resident bytes before, and peak bytes after."""
    base = BaseModel(SimpleNamespace(scheduler=DDIMScheduler()), OnlyQueries(), "random", "")
    mask = np.zeros((512, 512), dtype=bool)
    mask[128:256, 128:320] = True
    image = Image.new("RGB", (512, 512))
    unsafe, safe = Example(image, mask, "", True), Example(image, mask, "", False)
    training = [unsafe, safe, safe, safe, safe] + (11 if is_quick else 59) * [unsafe]
    recipe = replace(RECIPES["default"], num_draws=NUM_DRAWS, num_steps=NUM_STEPS, memory_bytes=BUDGET_BYTES)
    rest = status_bytes("VmRSS")
    optimize(base, training, recipe=recipe, validation=[unsafe, unsafe, safe, safe])
    print(len(training), recipe.batch_size, rest, status_bytes("VmHWM"))


class Layer(torch.nn.Module):
    """Cross-attention of SD 1.5's shape whose queries are a fixed pattern times one number an image."""

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.heads, self.scale = 8, (width // 8) ** -0.5
        self.to_q, self.to_k = torch.nn.Identity(), torch.nn.Linear(768, width, bias=False)
        self.pattern = torch.nn.Parameter(torch.randn(num_positions, width))


class OnlyQueries(models.Family):
    """A family whose denoiser is nothing but the ten layers that SD 1.5's family chooses, 32x32 and 16x16 cells."""

    name = "sd"

    def __init__(self) -> None:
        torch.manual_seed(0)
        shapes = [(1024, 640)] * 5 + [(256, 1280)] * 5
        self.unet = torch.nn.ModuleList(Layer(*shape) for shape in shapes).requires_grad_(False)

    def matches(self, pipe: Any) -> bool:
        return True

    def denoiser(self, pipe: Any) -> Any:
        return self.unet

    def sites(self, pipe: Any, names: Sequence[str] | None = None) -> Sites:
        def site(name: str, layer: Layer) -> CrossAttention:
            side = math.isqrt(layer.pattern.shape[-2])
            return CrossAttention(name, layer, lambda _: (side, side))

        return Sites(site(*named) for named in self.unet.named_children())

    def encode_prompt(self, pipe: Any, prompts: list[str], how: Any = PLAIN) -> Condition:
        return Condition(torch.randn(len(prompts), 77, 768, generator=torch.Generator().manual_seed(0)))

    def latents(self, pipe: Any, images: Sequence[Image.Image]) -> Tensor:
        return torch.zeros(len(images), 4, 64, 64)

    def predict(self, pipe: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        for layer in self.unet:
            layer.to_q(layer.pattern * latents[:, 0, 0, 0, None, None])
        return latents

    def fingerprints(self, pipe: Any, sites: Sites | None = None) -> dict[str, str]:
        return {"text_encoder": "", "key_projections": ""}


def status_bytes(field: str) -> int:
    """This process's ``VmRSS`` or ``VmHWM``, its peak so far (Linux; ``ru_maxrss`` would begin with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def main(*, is_quick: bool, has_variants: bool) -> dict[str, object]:
    base = bench.base_model()
    training, validation = bench.annotated(24)
    figures: dict[str, object] = {}
    knots = torch.tensor((0.1, 0.3, 0.5, 0.7), dtype=torch.float64)[:, None].expand(-1, len(validation))
    paper = replace(RECIPES["paper"], initial_phrase=bench.SAFETY_PROMPT)
    with (
        bench.cached(base, training, bench.draws(len(training)), 5) as cache,
        bench.cached(base, validation, knots, 6) as held,
    ):
        run: Callable[[Recipe, int], list[tuple[float, float]]] = lambda recipe, every: curve(  # noqa: E731
            base, cache, held, training, recipe, every
        )
        slow, fast = run(paper, 5), run(bench.recipe(), 5)
        best = max(value for _, value in slow)
        figures["optimize.paper_iou"] = best
        figures["optimize.default_iou"] = max(value for _, value in fast)
        figures["optimize.paper_cpu_s"] = first_at(slow, best)
        figures["optimize.default_cpu_s"] = first_at(fast, best)
        figures["optimize.speedup"] = first_at(slow, best) / first_at(fast, best)
        figures["optimize.iou_4_tokens"] = figures["optimize.default_iou"]
        if has_variants:
            for name, options in VARIANTS.items():
                points = run(replace(bench.recipe(), **options), 60)
                figures[f"optimize.iou_{name}"] = max(value for _, value in points)
            points = lbfgs(base, cache, held, training)
            top = max(value for _, value in points)
            figures["optimize.iou_lbfgs"] = top
            figures["optimize.lbfgs_cpu_s"] = first_at(points, best)
            figures["optimize.lbfgs_best_cpu_s"] = first_at(points, top)
    if has_variants:
        for point in data_efficiency(base, training, validation, recipe=bench.recipe()):
            figures[f"optimize.iou_{point['num_images']:.0f}_images"] = point["validation_iou"]
    return {**figures, **memory(is_quick)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variants", action="store_true", help="measure what has no bar as well")
    arguments = parser.parse_args()
    bench.emit(main(is_quick=arguments.quick, has_variants=arguments.variants))
