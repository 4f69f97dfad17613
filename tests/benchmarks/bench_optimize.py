"""Optimisation: CPU time against the paper's recipe, number of tokens, data efficiency, peak memory at SD 1.5's size.

    python tests/benchmarks/bench_optimize.py [--quick]

``optimize.speedup``: both recipes learn from the same cached queries; CPU time of the paper's recipe (as published:
100 steps of SGD on all pairs) to its best validation IoU, divided by the default's CPU time to that same IoU.
Validation is not counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_world as bench
import torch
from torch import Tensor

from dagkit.families import BaseModel
from dagkit.optimization import RECIPES, Parameters, QueryCache, Recipe, data_efficiency, fit, initial_parameters, iou
from dagkit.optimization.cache import stored

BUDGET_BYTES = 1 << 30


def curve(
    base: BaseModel, cache: QueryCache, held: QueryCache, training: list[Any], recipe: Recipe, every: int
) -> list[tuple[float, float]]:
    """(CPU seconds, validation IoU) while a recipe runs; validation is not counted."""
    layers = base.layers
    points: list[tuple[float, float]] = []
    spent, last = 0.0, time.process_time()
    wanted = held.is_unsafe & (held.timesteps <= 700)

    def validate(parameters: Parameters) -> dict[str, float]:
        nonlocal spent, last
        spent += time.process_time() - last
        cams = parameters.cams(layers, held)
        value = max(float(iou(cams[wanted], held.masks[wanted], 0.05 * k).mean()) for k in range(1, 20))
        points.append((spent, value))
        last = time.process_time()
        return {"validation_loss": -float(len(points))}

    start = initial_parameters(base, training, recipe, layers, torch.Generator().manual_seed(1))
    last = time.process_time()
    fit(
        layers, cache, start, replace(recipe, validate_every=every), torch.Generator().manual_seed(1), validate=validate
    )
    return points


def first_at(points: list[tuple[float, float]], value: float) -> float:
    """CPU seconds to the first point that reaches a value."""
    return next((seconds for seconds, reached in points if reached >= value), float("nan"))


def memory(is_quick: bool) -> dict[str, object]:
    """Peak memory of caching and optimising 64 images x 8 timesteps at SD 1.5's size, in a process of its own.

    The queries are random numbers of SD 1.5's shapes (16 layers at 32x32 and 16x16 cells), so that no U-Net is
    needed; they go through the cache's own path.
    """
    code = f"import bench_optimize; bench_optimize.memory_child({is_quick})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=bench.HERE)
    rest, peak = (int(word) for word in done.stdout.split())
    return {
        "optimize.memory": peak - rest,
        "optimize.memory_budget": BUDGET_BYTES,
        "optimize.memory_within_budget": peak - rest <= BUDGET_BYTES,
    }


def memory_child(is_quick: bool) -> None:
    """Prints resident bytes before, and peak bytes after."""

    class Layer(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.heads, self.scale = 8, (width // 8) ** -0.5
            self.to_q, self.to_k = torch.nn.Identity(), torch.nn.Linear(768, width, bias=False)

    shapes = {f"coarse.{i}": (256, 1280) for i in range(5)} | {f"fine.{i}": (1024, 640) for i in range(5)}
    layers = {name: Layer(width).requires_grad_(False) for name, (_, width) in shapes.items()}
    count, batch = (128, 4) if is_quick else (512, 4)
    generator = torch.Generator().manual_seed(0)

    def predict(start: int, stop: int) -> dict[str, Tensor]:
        return {name: torch.randn((stop - start, *shape), generator=generator) for name, shape in shapes.items()}

    predict(0, 1)
    rest = peak_bytes()
    with stored(predict, count, batch, torch.float16, BUDGET_BYTES // 4) as (stores, _, is_on_disk):
        assert is_on_disk
        masks = (torch.rand(count, 32, 32, generator=generator) > 0.9).float()
        kinds = torch.arange(count) % 2 == 0
        cache = QueryCache(stores, masks, kinds, torch.zeros(count).long(), torch.arange(count), (64, 64))
        rows = torch.randn(21, 768, generator=generator)
        start = Parameters(rows[:1], rows[1:5].clone(), rows[5:].clone(), torch.zeros(80))
        fit(layers, cache, start, Recipe(num_steps=3, batch_size=4), generator)
    print(rest, peak_bytes())


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux; ``ru_maxrss`` would begin with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def main(*, is_quick: bool) -> dict[str, object]:
    base = bench.base_model()
    training, validation = bench.annotated(24)
    figures: dict[str, object] = {}
    knots = torch.tensor((100, 300, 500, 700))[:, None].expand(-1, len(validation))
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
        variants: dict[str, dict[str, Any]] = {
            "1_tokens": {"num_tokens": 1},
            "2_tokens": {"num_tokens": 2},
            "uniform_heads": {"learn_head_weights": False},
            "no_background": {"num_background": 0},
        }
        for name, options in ({} if is_quick else variants).items():
            points = run(replace(bench.recipe(), **options), 60)
            figures[f"optimize.iou_{name}"] = max(value for _, value in points)
    sizes = (8,) if is_quick else (2, 4, 8, 16, 32)
    for point in data_efficiency(base, training, validation, sizes=sizes, recipe=bench.recipe()):
        figures[f"optimize.iou_{point['num_images']:.0f}_images"] = point["validation_iou"]
    return {**figures, **memory(is_quick)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    bench.emit(main(is_quick=parser.parse_args().quick))
