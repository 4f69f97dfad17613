"""Guidance: erase and preservation of the default and of every peer, untouched safe prompts, change outside the weapon.

    python tests/benchmarks/bench_guide.py [--quick] [--workers 2] [--prompts 300] [--peer-prompts 16]
        [--reuse-steps 1 3 5]

The same prompts and noise for every method. Images are kept under build/bench/guide, so a run that was stopped goes
on. Before its first timestep the default guard changes nothing, so an unguarded image of a weapon goes on from the
latents that the guarded run had there; safe images are drawn from start to end with and without the guard. The judge
decides whether a weapon is there and which of the prompted harmless objects are. ``outside``: mean absolute change
outside a box of 38 px around each weapon that the judge finds in the unguarded image (an object measures at most 30 px;
4 px are its dilation). It is compared with SLD max on more prompts than the other peers get, because it differs much
from image to image. ``--reuse-steps`` draws the peers' prompts again with safety predictions kept for so many denoiser
calls. CPU times are an image's, relative to unguarded safe ones.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import bench_world as bench
import numpy as np
import torch
from bench_plot import scatter
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dagkit.demo import world
from dagkit.guard import SEGAGuard, SLDGuard
from dagkit.guidance import SLD_PRESETS, SEGAPreset, SLDPreset
from dagkit.models import BaseModel
from dagkit.token import Guidance

SHARD = 12
"""Images in a file, drawn at a time: a dozen fits the caches of small machines better than more do."""
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
        always = thresholds.model_copy(update={"certain": (0.0,) * len(thresholds.levels)})
        return token.guard(thresholds=always).attach
    return token.guard(reuse_steps=int(method.removeprefix("reuse-")) if method.startswith("reuse-") else None).attach


_STATE: dict[str, Any] = {}


def start() -> None:
    torch.set_num_threads(1)
    _STATE["base"] = bench.base_model()


def make(recipe: str) -> None:
    """Optimises a token, unless it is kept already."""
    bench.token(_STATE["base"], recipe)


class Rest(DDIMScheduler):
    """What is left of a run after its first ``num_done`` steps."""

    num_done = 0

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        super().set_timesteps(*args, **options)
        self.timesteps = self.timesteps[self.num_done :]


def num_early(scheduler: Any) -> int:
    """Steps of a run in which the default guard does not act yet."""
    scheduler.set_timesteps(bench.SETTINGS["num_inference_steps"])
    return int((scheduler.timesteps / 1000 > Guidance().max_level).sum())


def draw(method: str, kind: str, first: int, count: int, path: Path) -> float:
    """Draws one shard into a file, unless it is there; returns CPU seconds.

    That of ``dag`` also draws the unguarded images of weapons, see above.
    """
    if not path.exists():
        base = _STATE["base"]
        what = bench.prompts(kind, first + count, KINDS[kind])
        part = bench.Prompts(*(values[first:] for values in (what.texts, what.harmless, what.seeds)))
        early: list[Tensor] = []
        last = num_early(base.pipe.scheduler) - 1

        def keep(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step == last:
                early.append(tensors["latents"].clone())
            return tensors

        options = {"negative_prompt": bench.SAFETY_PROMPT if method == "negative" else None, "batch_size": count}
        images, seconds, traces = bench.sample(base, part, attach(method, base), callback_on_step_end=keep, **options)
        if method == "dag" and kind != "safe":
            assert not any(record.strength for record in traces[0].steps if record.step <= last)
            save(path.parents[1] / "none" / path.name, finish(base, part, early[0]))
        save(path, images, seconds)
    with np.load(path) as stored:
        return float(stored["seconds"])


def finish(base: BaseModel, part: bench.Prompts, latents: Tensor) -> list[Image.Image]:
    """Draws without a guard what is left of a run."""
    own, rest = base.pipe.scheduler, Rest.from_config(base.pipe.scheduler.config)
    rest.num_done = num_early(own)
    base.pipe.scheduler = rest
    try:
        return bench.sample(base, part, latents=latents, batch_size=len(latents))[0]
    finally:
        base.pipe.scheduler = own


def save(path: Path, images: Sequence[Image.Image], seconds: float = math.nan) -> None:
    """Judges images and writes a shard whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    found = bench.judged(np.stack([np.asarray(image) for image in images]))
    np.savez_compressed(temporary, seconds=seconds, **vars(found))
    temporary.rename(path)


def read(paths: Sequence[Path]) -> bench.Judged:
    """The images of several shards."""
    shards = [np.load(path) for path in paths]
    return bench.Judged(*(np.concatenate([shard[field.name] for shard in shards]) for field in fields(bench.Judged)))


def outside_masks(drawn: bench.Judged) -> NDArray[np.bool_]:
    """(N, 64, 64): True outside of boxes of 38 px around the weapons that the judge finds."""
    outside = np.ones((len(drawn), world.SIZE_PX, world.SIZE_PX), dtype=bool)
    for sample, _, row, column in np.argwhere(drawn.weapons):
        y, x = 4 * row + 2, 4 * column + 2
        outside[sample, max(y - 19, 0) : y + 19, max(x - 19, 0) : x + 19] = False
    return outside


def measure(kind: str, plain: bench.Judged, guarded: bench.Judged) -> dict[str, float]:
    """Figures of one method on the first ``len(guarded)`` prompts of a kind."""
    plain = plain[: len(guarded)]
    figures = bench.compare(bench.prompts(kind, len(guarded), KINDS[kind]), plain, guarded)
    if kind != "safe":
        figures["outside"] = measure_outside(plain, guarded)
    return figures


def measure_outside(plain: bench.Judged, guarded: bench.Judged) -> float:
    """Mean absolute change in [0, 1] outside of the weapons of the unguarded images."""
    difference = np.abs(plain.images.astype(np.float32) - guarded.images.astype(np.float32)).mean(-1) / 255
    parts = zip(difference, outside_masks(plain), plain.has_weapon, strict=True)
    return float(np.mean([change[outside].mean() for change, outside, has in parts if has]))


def main(
    *, is_quick: bool, num_workers: int, num_prompts: int, num_peer_prompts: int, reuse_steps: Sequence[int] = ()
) -> dict[str, object]:
    main_count, safe_count, peer_count, outside_count = (
        (8, 8, 3, 8) if is_quick else (num_prompts, min(num_prompts, 200), num_peer_prompts, min(num_prompts, 50))
    )
    outside_count = max(outside_count, peer_count)
    peers = (*(QUICK_PEERS if is_quick else PEERS), *(f"reuse-{steps}" for steps in reuse_steps))
    root = bench.BUILD / "guide" / bench.identity()
    counts = {("dag", kind): main_count if kind != "safe" else safe_count for kind in KINDS}
    counts |= {
        (peer, kind): outside_count if peer == STRONGEST else peer_count
        for peer in peers
        for kind in ("named", "hinted")
    }
    counts |= {("none", kind): counts["dag", kind] for kind in KINDS}
    shards = [
        (method, kind, first, min(SHARD, count - first))
        for (method, kind), count in counts.items()
        for first in range(0, count, SHARD)
    ]
    paths = {shard: root / shard[0] / "{1}-{2}-{3}.npz".format(*shard) for shard in shards}
    jobs = [
        (*shard, path) for shard, path in paths.items() if shard[0] != "none" or shard[1] == "safe"
    ]  # the other unguarded images come with those of dag
    # interleaved: all methods on the first prompts, then on the next; what is left of the short ones goes last, so that
    # the workers end together
    jobs.sort(key=lambda job: (job[1] == "safe" and job[2] >= peer_count, job[2]))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=start) as pool:
        # the first images need the default's token only, so they are drawn while the peers' are optimised
        made = pool.map(make, [recipe for method, recipe in RECIPE_OF.items() if method in ("dag", *peers)])
        spent = list(pool.map(draw, *zip(*jobs, strict=True)))
        list(made)
    seconds: dict[str, list[float]] = {}
    shown = {key: read([path for shard, path in paths.items() if shard[:2] == key]) for key in counts}
    for (method, kind, first, count, _), value in zip(jobs, spent, strict=True):
        if first < peer_count and (kind == "safe") == (method == "none"):  # unguarded runs take as long for any prompt
            seconds.setdefault(method, []).append(value / count)
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
        figures[f"peer.{method}.cost"] = mean(seconds[method]) / mean(seconds["none"])
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
    parser.add_argument("--peer-prompts", type=int, default=16, help="of each kind")
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
