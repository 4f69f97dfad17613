"""Cost of the guard: CPU time against the unguarded pipeline, on an SD-1.5-sized pipeline and on the bundled model.

    python tests/benchmarks/bench_cost.py [--quick]

Guarded and unguarded calls alternate; a figure is the ratio of the sums. The large pipeline has random weights; its
token never fires (``safe``) or fires in every call (``firing``, so at least 1.5 without reuse for the denoiser alone:
three predictions instead of two). A run of a pipeline is 25 denoiser calls, composed from the cost of a few, and one
decoding of the latents. ``--quick`` takes latents of 32x32 instead of 64x64.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bench_world as bench
import numpy as np
import torch
from diffusers import AutoencoderKL

from dagkit.guard import Guard
from dagkit.token import GuidelineToken, Thresholds

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_pipelines as tiny

NUM_STEPS = bench.SETTINGS["num_inference_steps"]
NUM_CALLS = 2
"""Denoiser calls at a time: with ``reuse_steps=2`` one makes a safety prediction and one keeps it."""
NEVER = Thresholds(highlight=(1.0,), edit=(1.0,), min_area=1.0)
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


def cpu_s(call: Callable[[], object]) -> float:
    """CPU seconds of a call, all threads together."""
    start = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - start


def large(is_quick: bool) -> dict[str, float]:
    torch.set_num_threads(os.cpu_count() or 1)
    pipe, side = large_pipeline(), 32 if is_quick else 64
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    hidden = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    token = tiny.token(pipe, thresholds=NEVER)
    guards = {
        "plain": None,
        "safe": token.guard(),
        "firing": token.guard(thresholds=ALWAYS, reuse_steps=1),
        "reuse": token.guard(thresholds=ALWAYS, reuse_steps=2),
    }

    def calls(guard: Guard | None, count: int) -> None:
        """Denoiser calls with classifier-free guidance, as a pipeline makes them."""
        with nullcontext() if guard is None else guard.attach(pipe):
            for step in range(count):
                pipe.unet(latents, torch.tensor(900 - step), hidden)

    cpu_s(lambda: calls(None, 1))  # the first call is slower; it must be as large as those that are measured
    spent = dict.fromkeys(guards, 0.0)
    decoding = cpu_s(lambda: pipe.vae.decode(latents[:1]))
    for name, guard in guards.items():
        spent[name] = cpu_s(lambda guard=guard: calls(guard, NUM_CALLS)) / NUM_CALLS
    runs = {name: NUM_STEPS * value + decoding for name, value in spent.items()}
    return {
        "guard.cost_safe": runs["safe"] / runs["plain"],
        "guard.cost_firing": runs["firing"] / runs["plain"],
        "guard.cost_firing_reuse": runs["reuse"] / runs["plain"],
        "guard.cost_firing_denoiser": spent["firing"] / spent["plain"],
        "guard.cost_firing_reuse_denoiser": spent["reuse"] / spent["plain"],
    }


def bundled(token: GuidelineToken, is_quick: bool) -> dict[str, float]:
    base = bench.base_model()
    count = 8 if is_quick else 24
    safe, named = bench.prompts("safe", count, 801), bench.prompts("named", count, 802)
    bench.sample(base, bench.prompts("safe", 8, 803), batch_size=8)  # the first run of a process is slower
    spent: dict[str, float] = {}
    for first in range(0, count, 8):
        for name, what, guard in (
            ("plain_safe", safe, None),
            ("safe", safe, token.guard()),
            ("plain_firing", named, None),
            ("firing", named, token.guard(reuse_steps=1)),
            ("reuse", named, token.guard()),
        ):
            part = bench.Prompts(*(values[first : first + 8] for values in (what.texts, what.harmless, what.seeds)))
            spent[name] = spent.get(name, 0.0) + bench.sample(base, part, guard and guard.attach, batch_size=8)[1]
    return {
        "guard.cost_safe_bundled": spent["safe"] / spent["plain_safe"],
        "guard.cost_firing_bundled": spent["firing"] / spent["plain_firing"],
        "guard.cost_firing_reuse_bundled": spent["reuse"] / spent["plain_firing"],
    }


def main(*, is_quick: bool) -> dict[str, object]:
    token = bench.token(bench.base_model())
    figures: dict[str, object] = {**bundled(token, is_quick), **large(is_quick)}
    assert all(np.isfinite(value) for value in figures.values())  # type: ignore[call-overload]
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    bench.emit(main(is_quick=parser.parse_args().quick))
