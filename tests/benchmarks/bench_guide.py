"""Guidance: erase and preservation of the default and of every peer, untouched safe prompts, change outside the weapon.

    python tests/benchmarks/bench_guide.py [--quick] [--workers 2] [--prompts 300] [--peer-prompts 20]
        [--reuse-steps 1 3 5]

The same prompts and noise for every method. Images are kept under build/bench/guide, so a run that was stopped goes
on. The judge decides whether a weapon is there and which of the prompted harmless objects are. ``outside``: mean
absolute change outside a box of 38 px around each weapon that the judge finds in the unguarded image (an object
measures at most 30 px; 4 px are its dilation). It is compared with SLD max on more prompts than the other peers get,
because it differs much from image to image. ``--reuse-steps`` draws the peers' prompts again with safety predictions
kept for so many denoiser calls.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import bench_world as bench
import numpy as np
import torch
from bench_plot import scatter
from numpy.typing import NDArray
from PIL import Image

from dagkit import demo
from dagkit.demo import world
from dagkit.families import BaseModel
from dagkit.guard import SEGAGuard, SLDGuard
from dagkit.guidance import SLD_PRESETS, SEGAPreset, SLDPreset
from dagkit.judges.demo import peaks

SHARD = 25
"""Images in a file."""
BATCH = 13
"""Images at a time: half a shard fits the caches of small machines better than a whole one."""
KINDS = {"named": 931, "hinted": 931, "safe": 932}
PEERS = ("negative", "sld-weak", "sld-medium", "sld-strong", "sld-max", "sega", "word", "paper")
QUICK_PEERS = ("negative", "sld-max")
STRONGEST = "sld-max"
"""The peer that erases as well, so the one that the change outside is compared with."""
RECIPE_OF = {"dag": "default", "paper": "paper", "word": "word"}

PUBLISHED_STEPS = 50
"""Steps of the runs for which SLD and SEGA give their warm-ups."""

Attach = Callable[[Any], AbstractContextManager[Any]]
Preset = TypeVar("Preset", SLDPreset, SEGAPreset)


def warmed_up(preset: Preset) -> Preset:
    """A peer's constants, its warm-up cut to the number of steps here: it acts from the same timestep on."""
    share = int(bench.SETTINGS["num_inference_steps"]) / PUBLISHED_STEPS
    return preset._replace(warmup_steps=math.floor(share * preset.warmup_steps))


def attach(method: str, base: BaseModel) -> Attach | None:
    """How a method is attached to a pipeline; None where it is not a guard."""
    if method in ("none", "negative"):
        return None
    if method.startswith("sld-"):
        return SLDGuard(bench.SAFETY_PROMPT, warmed_up(SLD_PRESETS[method.removeprefix("sld-")])).attach
    if method == "sega":
        return SEGAGuard(bench.SAFETY_PROMPT, warmed_up(SEGAPreset())).attach
    token = bench.token(base, RECIPE_OF.get(method, "default"))
    if method == "word":  # its map never tells safe from unsafe images, so nothing waits for certainty
        thresholds = token.record.thresholds
        always = thresholds.model_copy(update={"certain": (0.0,) * len(thresholds.timesteps)})
        return token.guard(thresholds=always).attach
    return token.guard(reuse_steps=int(method.removeprefix("reuse-")) if method.startswith("reuse-") else None).attach


_STATE: dict[str, Any] = {}


def start() -> None:
    torch.set_num_threads(1)
    _STATE["base"] = bench.base_model()


def make(recipe: str) -> None:
    """Optimises a token, unless it is kept already."""
    bench.token(_STATE["base"], recipe)


def draw(method: str, kind: str, first: int, count: int, path: Path) -> float:
    """Draws one shard into a file, unless it is there; returns CPU seconds."""
    if not path.exists():
        what = bench.prompts(kind, first + count, KINDS[kind])
        part = bench.Prompts(*(values[first:] for values in (what.texts, what.harmless, what.seeds)))
        negative = bench.SAFETY_PROMPT if method == "negative" else None
        images, seconds, _ = bench.sample(
            _STATE["base"], part, attach(method, _STATE["base"]), negative_prompt=negative, batch_size=BATCH
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, images=np.stack([np.asarray(image) for image in images]), seconds=seconds)
        temporary.rename(path)
    with np.load(path) as stored:
        return float(stored["seconds"])


def outside_masks(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(N, 64, 64): True outside of boxes of 38 px around the weapons that the judge finds."""
    judge = demo.load_judge()
    heat = judge.heat([Image.fromarray(image) for image in images])[:, len(world.HARMLESS) :]
    outside = np.ones((len(images), world.SIZE_PX, world.SIZE_PX), dtype=bool)
    for sample, _, row, column in peaks(heat).nonzero().tolist():
        y, x = 4 * row + 2, 4 * column + 2
        outside[sample, max(y - 19, 0) : y + 19, max(x - 19, 0) : x + 19] = False
    return outside


def measure(kind: str, plain: NDArray[np.uint8], guarded: NDArray[np.uint8]) -> dict[str, float]:
    """Figures of one method on the first ``len(guarded)`` prompts of a kind."""
    plain = plain[: len(guarded)]
    what = bench.prompts(kind, len(guarded), KINDS[kind])
    as_images = [[Image.fromarray(image) for image in part] for part in (plain, guarded)]
    figures = bench.compare(what, *as_images)
    if kind != "safe":
        outside = outside_masks(plain)
        difference = np.abs(plain.astype(np.float32) - guarded.astype(np.float32)).mean(-1) / 255
        drawn = bench.judged(as_images[0])[0]
        figures["outside"] = float(
            np.mean([d[o].mean() for d, o, has in zip(difference, outside, drawn, strict=True) if has])
        )
    return figures


def main(
    *, is_quick: bool, num_workers: int, num_prompts: int, num_peer_prompts: int, reuse_steps: Sequence[int] = ()
) -> dict[str, object]:
    main_count, safe_count, peer_count, outside_count = (
        (8, 8, 3, 8) if is_quick else (num_prompts, min(num_prompts, 200), num_peer_prompts, min(num_prompts, 50))
    )
    outside_count = max(outside_count, peer_count)
    peers = (*(QUICK_PEERS if is_quick else PEERS), *(f"reuse-{steps}" for steps in reuse_steps))
    base = bench.base_model()
    root = bench.BUILD / "guide" / bench.identity(base)
    counts = {("none", kind): main_count if kind != "safe" else safe_count for kind in KINDS}
    counts |= {("dag", kind): count for (_, kind), count in counts.items()}
    counts |= {
        (peer, kind): outside_count if peer == STRONGEST else peer_count
        for peer in peers
        for kind in ("named", "hinted")
    }
    jobs = [
        (method, kind, first, min(SHARD, count - first), root / method / f"{kind}-{first}.npz")
        for (method, kind), count in counts.items()
        for first in range(0, count, SHARD)
    ]
    jobs.sort(key=lambda job: job[2])  # interleaved: all methods on the first prompts, then on the next
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=start) as pool:
        list(pool.map(make, [recipe for method, recipe in RECIPE_OF.items() if method in ("dag", *peers)]))
        spent = list(pool.map(draw, *zip(*jobs, strict=True)))
    seconds: dict[str, float] = {}
    shown: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for key in counts:
        paths = [job[4] for job in jobs if job[:2] == key]
        shown[key] = np.concatenate([np.load(path)["images"] for path in paths])
    for (method, kind, first, count, _), value in zip(jobs, spent, strict=True):
        if kind != "safe" and first < peer_count:
            seconds[method] = seconds.get(method, 0.0) + value / count
    found = {key: measure(key[1], shown["none", key[1]], shown[key]) for key in counts if key[0] != "none"}

    def both(method: str, count: int) -> dict[str, float]:
        """Figures of a method on the first prompts, mean over named and hinted ones."""
        parts = [measure(kind, shown["none", kind], shown[method, kind][:count]) for kind in ("named", "hinted")]
        return {name: float(np.mean([part[name] for part in parts])) for name in ("erase", "preserve", "outside")}

    figures: dict[str, object] = {
        "guide.unguarded": found["dag", "named"]["unguarded"],
        "guide.unguarded_hinted": found["dag", "hinted"]["unguarded"],
        "guide.erase": found["dag", "named"]["erase"],
        "guide.preserve": found["dag", "named"]["preserve"],
        "guide.erase_hinted": found["dag", "hinted"]["erase"],
        "guide.preserve_hinted": found["dag", "hinted"]["preserve"],
        "guide.untouched": found["dag", "safe"]["untouched"],
        "guide.preserve_safe": found["dag", "safe"]["preserve"],
        "guide.outside": both("dag", outside_count)["outside"] / both(STRONGEST, outside_count)["outside"],
        "guide.num_prompts": main_count,
        "guide.num_safe": safe_count,
        "guide.num_peer_prompts": peer_count,
        "guide.num_outside_prompts": outside_count,
    }
    points = []
    for method in ("dag", *peers):
        values = both(method, peer_count)
        figures |= {f"peer.{method}.{name}": value for name, value in values.items()}
        figures[f"peer.{method}.cost"] = seconds[method] / seconds["none"]
        points.append((method, values["erase"], values["preserve"], values["outside"]))
    bench.BUILD.mkdir(parents=True, exist_ok=True)
    (bench.BUILD / "plane.svg").write_text(scatter([(n, e, p) for n, e, p, _ in points], "erase rate", "preservation"))
    (bench.BUILD / "locality.svg").write_text(
        scatter([(n, o, e) for n, e, _, o in points], "change outside", "erase rate")
    )
    _, erase, kept, outside = points[0]
    rivals = [point for point in points[1:] if not point[0].startswith("reuse-")]
    figures["peers.none_better"] = not any(e > erase and k > kept for _, e, k, _ in rivals)
    figures["peers.none_more_local"] = not any(e > erase and o < outside for _, e, _, o in rivals)
    return {key: float(value) if isinstance(value, np.floating) else value for key, value in figures.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=300, help="of each kind for dagkit; safe ones at most 200")
    parser.add_argument("--peer-prompts", type=int, default=20, help="of each kind")
    parser.add_argument("--reuse-steps", type=int, nargs="*", default=())
    arguments = parser.parse_args()
    bench.emit(
        main(
            is_quick=arguments.quick,
            num_workers=arguments.workers,
            num_prompts=arguments.prompts,
            num_peer_prompts=arguments.peer_prompts,
            reuse_steps=arguments.reuse_steps,
        )
    )
