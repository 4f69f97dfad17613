"""Cost of the guard: CPU time against the unguarded denoiser, on an SD-1.5-sized U-Net and on the bundled model.

    python tests/benchmarks/bench_cost.py [--quick]

Guarded and unguarded calls alternate; the figure is the ratio of the sums. The large U-Net has random weights: its
token never fires (``safe``) or always does (``firing``).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import bench_world as bench
import numpy as np
import torch

from dagkit.guard import Guard
from dagkit.token import GuidelineToken, Thresholds

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_pipelines as tiny

NEVER = Thresholds(highlight=(1.0,), edit=(1.0,), min_area=1.0)
ALWAYS = Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0)


def large_pipeline() -> Any:
    """Stable Diffusion 1.5's U-Net, 860 million random weights, with small other parts."""
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
    return tiny.sd(unet=unet, text_encoder=tiny.text_encoder(768))


def steps(pipe: Any, guard: Guard | None, num_steps: int) -> float:
    """CPU seconds of denoiser calls with classifier-free guidance, as a pipeline makes them."""
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    hidden = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))

    def run() -> float:
        start = time.process_time()
        with torch.no_grad():
            for step in range(num_steps):
                pipe.unet(latents, torch.tensor(900 - step), hidden)
        return time.process_time() - start

    if guard is None:
        return run()
    with guard.attach(pipe):
        return run()


def large(is_quick: bool) -> dict[str, float]:
    pipe = large_pipeline()
    token = tiny.token(pipe, thresholds=NEVER)
    guards = {
        "plain": None,
        "safe": token.guard(),
        "firing": token.guard(thresholds=ALWAYS, reuse_steps=1),
        "reuse": token.guard(thresholds=ALWAYS, reuse_steps=2),
    }
    spent = dict.fromkeys(guards, 0.0)
    steps(pipe, None, 1)
    for _ in range(1 if is_quick else 2):
        for name, guard in guards.items():
            spent[name] += steps(pipe, guard, 2 if is_quick else 4)
    return {
        "guard.cost_safe": spent["safe"] / spent["plain"],
        "guard.cost_firing": spent["firing"] / spent["plain"],
        "guard.cost_firing_reuse": spent["reuse"] / spent["plain"],
    }


def bundled(token: GuidelineToken, is_quick: bool) -> dict[str, float]:
    base = bench.base_model()
    count = 8 if is_quick else 24
    safe, named = bench.prompts("safe", count, 801), bench.prompts("named", count, 802)
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
