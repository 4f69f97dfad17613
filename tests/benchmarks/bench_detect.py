"""Detection: IoU of the token, of the un-optimised word and of a linear probe on the same queries; false triggers.

    python tests/benchmarks/bench_detect.py [--quick]

Held-out rendered scenes, noised as in optimisation; IoU at latent resolution, at the calibrated threshold of each
noise level for the token and at the best common threshold for word and probe (which favours them).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bench_world as bench
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dagkit import guidance
from dagkit.demo import world
from dagkit.metrics import iou
from dagkit.models import BaseModel
from dagkit.models.sites import Detector
from dagkit.optimization import Example, OptimizationResult, QueryCache, cache_queries, optimize
from dagkit.optimization.cache import Batch
from dagkit.token import GuidelineToken

LEVELS = (0.1, 0.3, 0.5, 0.7)
Reader = Callable[[dict[str, Tensor], tuple[int, int]], Tensor]
"""Features and the size of the result -> (B, H, W) detection maps."""


@dataclass
class Maps:
    """Detection maps of unsafe and safe scenes, noise level -> (N, 16, 16)."""

    unsafe: dict[float, Tensor]
    safe: dict[float, Tensor]
    masks: Tensor

    def iou_at(self, thresholds: dict[float, float]) -> dict[float, float]:
        """Mean IoU at each noise level."""
        return {t: float(iou(self.unsafe[t] >= thresholds[t], self.masks >= 0.5).mean()) for t in LEVELS}

    def best_iou(self) -> float:
        """Mean IoU at the best threshold common to all noise levels."""
        values = [0.02 * k for k in range(1, 50)]
        return max(float(np.mean(list(self.iou_at(dict.fromkeys(LEVELS, value)).values()))) for value in values)


def token_cam(
    result: OptimizationResult | GuidelineToken, base: BaseModel, features: dict[str, Tensor], size: tuple[int, int]
) -> Tensor:
    rows = [row for row in (result.start_of_text, result.background, result.guideline) if row is not None]
    return Detector(base.sites, torch.cat(rows), len(result.guideline), result.head_weights)(features, size)


def word_cam(base: BaseModel, features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The un-optimised word: the last row of the initial phrase against start-of-text, mean over heads and layers."""
    hidden = base.rows([bench.SAFETY_PROMPT])[0]
    return Detector(base.sites, hidden[:3][[0, 2]], 1)(features, size)


def flat(features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """(B, cells, channels of all layers) on the finest grid."""
    parts = []
    for value in features.values():
        side = int(value.shape[1] ** 0.5)
        grid = value.transpose(1, 2).unflatten(-1, (side, side))
        parts.append(F.interpolate(grid, size, mode="bilinear").flatten(2).transpose(1, 2))
    return torch.cat(parts, -1)


RIDGES = (1e-5, 1e-4, 1e-3)
"""Weights of the probe's squared norm, of which the one with the best validation IoU counts."""


def fit_probe(cache: QueryCache, held: QueryCache, num_steps: int = 150, share: float = 0.3) -> Reader:
    """Logistic regression on the queries of all pairs, at a random share of the cells: what a linear reader can see."""
    batch = cache.take(torch.arange(len(cache)))
    features, target = flat(batch.features, size_of(batch)).flatten(0, 1), batch.masks.flatten()
    cells = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))[: int(share * len(target))]
    spread = features[cells].std(0)
    features, target = features[cells] / spread, target[cells]
    index = held.is_unsafe.nonzero()[:, 0]
    seen = held.take(index)

    def fitted(ridge: float) -> tuple[float, Reader]:
        weights = torch.zeros(features.shape[-1], requires_grad=True)
        bias = torch.tensor(-2.0, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=num_steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(features @ weights + bias, target)
            loss = loss + ridge * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        direction, offset = (weights / spread).detach(), bias.detach()

        def reader(features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
            return (flat(features, size) @ direction + offset).sigmoid().unflatten(-1, size)

        cams = reader(seen.features, size_of(seen))
        return max(float(iou(cams >= 0.02 * k, seen.masks >= 0.5).mean()) for k in range(1, 50)), reader

    return max((fitted(ridge) for ridge in RIDGES), key=lambda pair: pair[0])[1]


def size_of(batch: Batch) -> tuple[int, int]:
    """The grid of a batch's masks."""
    return batch.masks.shape[-2], batch.masks.shape[-1]


def maps(
    base: BaseModel, unsafe: Sequence[Example], safe: Sequence[Example], readers: dict[str, Reader]
) -> dict[str, Maps]:
    """Detection maps by reader on held-out scenes; every reader sees the same queries."""
    found: dict[str, Maps] = {}
    for kind, examples in (("unsafe", unsafe), ("safe", safe)):
        steps = torch.tensor(LEVELS, dtype=torch.float64)[:, None].expand(-1, len(examples))
        with cache_queries(base, examples, steps, seed=77, batch_size=25) as cache:
            parts: dict[str, list[Tensor]] = {name: [] for name in readers}
            for batch in cache.batches(50):
                for name, reader in readers.items():
                    parts[name].append(reader(batch.features, size_of(batch)))
            for name, values in parts.items():
                entry = found.setdefault(name, Maps({}, {}, cache.masks[: len(examples)]))
                getattr(entry, kind).update(zip(LEVELS, torch.cat(values).split(len(examples)), strict=True))
    return found


def main(*, is_quick: bool) -> dict[str, object]:
    num_scenes, num_train = (24, 24) if is_quick else (200, 24)
    base = bench.base_model()
    training, validation = bench.annotated(num_train)
    result = bench.token(base, count=num_train)
    steps = torch.tensor(LEVELS, dtype=torch.float64)[:, None].expand(-1, len(validation))
    with (
        cache_queries(base, training, bench.draws(len(training)), seed=5) as cache,
        cache_queries(base, validation, steps, seed=6) as held,
    ):
        probe = fit_probe(cache, held)
    unsafe, safe = bench.scenes(num_scenes, 501, is_unsafe=True), bench.scenes(num_scenes, 502, is_unsafe=False)

    readers = {
        "token": lambda features, size: token_cam(result, base, features, size),
        "word": lambda features, size: word_cam(base, features, size),
        "probe": probe,
    }
    with torch.no_grad():
        found = maps(base, unsafe, safe, readers)
    thresholds = result.record.thresholds
    own = found["token"]
    by_level = own.iou_at({t: thresholds.at(t)[1] for t in LEVELS})
    fired = torch.stack([guidance.score(own.safe[t], thresholds.min_area) >= thresholds.certain_at(t) for t in LEVELS])
    seen = torch.stack([guidance.score(own.unsafe[t], thresholds.min_area) >= thresholds.certain_at(t) for t in LEVELS])
    figures: dict[str, object] = {
        "detect.iou": float(np.mean(list(by_level.values()))),
        "detect.iou_word": found["word"].best_iou(),
        "detect.iou_probe": found["probe"].best_iou(),
        "detect.false_area": float(np.mean([(own.safe[t] >= thresholds.at(t)[1]).float().mean() for t in LEVELS])),
        "detect.false_trigger": float(fired.any(0).float().mean()),
        "detect.recall": float(seen.any(0).float().mean()),
        **{f"detect.iou_t{1000 * t:.0f}": value for t, value in by_level.items()},
        "detect.num_scenes": num_scenes,
    }
    unseen = []
    for weapon in () if is_quick else world.WEAPONS:
        others = [name for name in world.WEAPONS if name != weapon]
        left_out = optimize(base, *bench.annotated(num_train, weapons=others)[:1], recipe=bench.recipe())
        scenes = bench.scenes(num_scenes // 4, 601, is_unsafe=True, weapons=[weapon])
        with torch.no_grad():
            readers = {"token": lambda features, size, found=left_out: token_cam(found, base, features, size)}
            maps_of = maps(base, scenes, safe[:8], readers)["token"]
        unseen.append(float(np.mean(list(maps_of.iou_at({t: left_out.thresholds.at(t)[1] for t in LEVELS}).values()))))
    if unseen:
        figures["detect.iou_unseen"] = float(np.mean(unseen))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    bench.emit(main(is_quick=parser.parse_args().quick))
