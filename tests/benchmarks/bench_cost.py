"""Cost of the guard: CPU time against the unguarded pipeline, on an SD-1.5-sized pipeline and on the bundled model.

    python tests/benchmarks/bench_cost.py [--quick] [--only large bundled-safe bundled-firing]

Guarded and unguarded calls alternate, on one thread. The large pipeline has random weights; its token never fires
(``safe``) or fires in every call (``firing``, so at least 1.5 without reuse for the denoiser alone: three predictions
instead of two); ``firing_default`` fires only from the first timestep on which the default acts. Of each kind of call
the least CPU time counts: what else runs on a machine only ever adds to it. A run of the large pipeline is composed
from these kinds of calls and one decoding of the latents. The bundled model draws whole images, and of each of their
steps the least time counts; where nothing fires runs are short, and their middle steps stand for those of a whole run.
``--quick`` takes latents of 32x32 instead of 64x64, fewer images and fewer rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import bench_world as bench
import numpy as np
import torch
from diffusers import AutoencoderKL

from dagkit.families import BaseModel
from dagkit.token import Guidance, Thresholds

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_pipelines as tiny

NUM_STEPS = int(bench.SETTINGS["num_inference_steps"])
NUM_ACTING = sum(timestep <= Guidance().max_timestep for timestep in range(0, 1000, 1000 // NUM_STEPS))
"""Calls of a run in which the default may act; timesteps as of DDIM."""
SHORT = 4
"""Steps of runs in which nothing fires: all but the first and the last cost the same."""
NUM_ROUNDS = 3
NUM_QUICK_ROUNDS = 2
NUM_LOOKS = 8
NUM_QUICK_LOOKS = 6
NEVER = Thresholds(highlight=(0.9999,), edit=(0.9999,), min_area=1.0)
ALWAYS = Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0)


def large_pipeline() -> Any:
    """Stable Diffusion 1.5's U-Net and decoder (860 and 84 million random weights) with a small text encoder."""
    torch.manual_seed(0)
    unet = tiny.unet(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return tiny.sd(unet=unet, vae=vae, text_encoder=tiny.text_encoder(768))


class Least:
    """The least CPU seconds that each kind of call has taken so far, all threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str, call: Callable[[], object]) -> None:
        start = time.process_time()
        with torch.no_grad():
            call()
        self.seconds[name] = min(self.seconds.get(name, float("inf")), time.process_time() - start)

    def __getitem__(self, name: str) -> float:
        return self.seconds[name]


def large(is_quick: bool) -> dict[str, float]:
    pipe, side = large_pipeline(), 32 if is_quick else 64
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    hidden = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    token = tiny.token(pipe, thresholds=NEVER)
    never, always = token.guard(), token.guard(thresholds=ALWAYS, reuse_steps=2)
    least = Least()

    def denoise(step: int) -> Callable[[], object]:
        """A denoiser call with classifier-free guidance, as a pipeline makes it."""
        return lambda: pipe.unet(latents, torch.tensor(700 - step), hidden)

    for _ in range(NUM_QUICK_ROUNDS if is_quick else NUM_ROUNDS):
        least.measure("plain", denoise(0))
        with ExitStack() as stack:
            least.measure("attach", lambda stack=stack: stack.enter_context(never.attach(pipe)))
            least.measure("safe", denoise(0))
        with always.attach(pipe):
            least.measure("firing", denoise(0))  # makes a safety prediction
            least.measure("kept", denoise(1))  # uses it again
    least.measure("decode", lambda: pipe.vae.decode(latents[:1]))
    num_made = (NUM_STEPS + 1) // 2
    calls = {
        "safe": NUM_STEPS * least["safe"],
        "firing": NUM_STEPS * least["firing"],
        "firing_reuse": num_made * least["firing"] + (NUM_STEPS - num_made) * least["kept"],
        "firing_default": (NUM_STEPS - NUM_ACTING) * least["safe"] + NUM_ACTING * least["firing"],
    }
    plain = NUM_STEPS * least["plain"]
    figures = {
        f"guard.cost_{name}": (least["attach"] + value + least["decode"]) / (plain + least["decode"])
        for name, value in calls.items()
    }
    return figures | {f"guard.cost_{name}_denoiser": value / plain for name, value in calls.items()}


def alternate(
    base: BaseModel, what: bench.Prompts, guards: dict[str, Any], order: Sequence[str], num_steps: int
) -> dict[str, float]:
    """CPU seconds of a whole run under each guard; each name in ``order`` stands for a run of ``num_steps``."""
    least: dict[str, list[float]] = {}
    for name in order:
        guard = guards[name]
        seconds = steps(base, what, guard and guard.attach, num_steps)
        least[name] = [min(pair) for pair in zip(seconds, least.get(name, seconds), strict=True)]
    return {name: first + (NUM_STEPS - 2) * mean(middle) + last for name, (first, *middle, last) in least.items()}


def bundled_safe(is_quick: bool) -> dict[str, float]:
    """A small difference takes many looks, in an order that favours neither."""
    base = bench.base_model()
    guards = {"plain": None, "guarded": bench.token(base).guard()}
    order = (NUM_QUICK_LOOKS if is_quick else NUM_LOOKS) * ("plain", "guarded", "guarded", "plain")
    spent = alternate(base, bench.prompts("safe", 4 if is_quick else 13, 801), guards, order, SHORT)
    return {"guard.cost_safe_bundled": spent["guarded"] / spent["plain"]}


def bundled_firing(is_quick: bool) -> dict[str, float]:
    base = bench.base_model()
    token = bench.token(base)
    guards = {"plain": None, "firing": token.guard(reuse_steps=1), "reuse": token.guard()}
    order = (NUM_QUICK_ROUNDS if is_quick else NUM_ROUNDS) * tuple(guards)
    spent = alternate(base, bench.prompts("named", 4 if is_quick else 10, 802), guards, order, NUM_STEPS)
    return {
        "guard.cost_firing_bundled": spent["firing"] / spent["plain"],
        "guard.cost_firing_reuse_bundled": spent["reuse"] / spent["plain"],
    }


def steps(base: BaseModel, what: bench.Prompts, attach: Any, num_steps: int) -> list[float]:
    """CPU seconds of each step of one batch, attaching in the first and decoding in the last."""
    stamps = [time.process_time()]

    def stamp(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stamps.append(time.process_time())
        return tensors

    bench.sample(base, what, attach, callback_on_step_end=stamp, num_inference_steps=num_steps)
    stamps[-1] = time.process_time()
    return list(np.diff(stamps))


PARTS = {"large": large, "bundled-safe": bundled_safe, "bundled-firing": bundled_firing}


def main(parts: Sequence[str], *, is_quick: bool) -> dict[str, object]:
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    for part in parts:
        figures |= PARTS[part](is_quick)
    assert all(np.isfinite(value) for value in figures.values())  # type: ignore[call-overload]
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=tuple(PARTS))
    arguments = parser.parse_args()
    bench.emit(main(arguments.only, is_quick=arguments.quick))
