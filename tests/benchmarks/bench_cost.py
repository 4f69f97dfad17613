"""Cost of the guard: CPU time against the unguarded pipeline, on an SD-1.5-sized pipeline and on the bundled model.

    python tests/benchmarks/bench_cost.py [--quick] [--only large bundled]

Guarded and unguarded calls alternate, on one thread. The large pipeline has random weights; its token never fires
(``safe``) or fires in every call (``firing``, so at least 1.5 without reuse for the denoiser alone: three predictions
instead of two). A run of that pipeline is 25 denoiser calls and one decoding of the latents, composed from the least
CPU time of each kind of call over two rounds; the bundled model draws whole images, and a figure is the ratio of the
sums. ``--quick`` takes latents of 32x32 instead of 64x64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench_world as bench
import numpy as np
import torch
from diffusers import AutoencoderKL

from dagkit.token import Thresholds

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_pipelines as tiny

NUM_STEPS = bench.SETTINGS["num_inference_steps"]
NUM_ROUNDS = 2
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
    pipe, side = large_pipeline(), 32 if is_quick else 64
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    hidden = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(1))
    token = tiny.token(pipe, thresholds=NEVER)
    never, always = token.guard(), token.guard(thresholds=ALWAYS, reuse_steps=2)
    least: dict[str, float] = {}

    def measure(name: str, call: Callable[[], object]) -> None:
        least[name] = min(least.get(name, float("inf")), cpu_s(call))

    def denoise(step: int) -> Callable[[], object]:
        """A denoiser call with classifier-free guidance, as a pipeline makes it."""
        return lambda: pipe.unet(latents, torch.tensor(900 - step), hidden)

    for _ in range(NUM_ROUNDS):
        measure("plain", denoise(0))
        with ExitStack() as stack:
            measure("attach", lambda stack=stack: stack.enter_context(never.attach(pipe)))
            measure("safe", denoise(0))
        with always.attach(pipe):
            measure("firing", denoise(0))  # makes a safety prediction
            measure("kept", denoise(1))  # uses it again
    measure("decode", lambda: pipe.vae.decode(latents[:1]))
    num_made = (NUM_STEPS + 1) // 2
    calls = {
        "safe": NUM_STEPS * least["safe"],
        "firing": NUM_STEPS * least["firing"],
        "firing_reuse": num_made * least["firing"] + (NUM_STEPS - num_made) * least["kept"],
    }
    plain = NUM_STEPS * least["plain"]
    figures = {
        f"guard.cost_{name}": (least["attach"] + value + least["decode"]) / (plain + least["decode"])
        for name, value in calls.items()
    }
    return figures | {f"guard.cost_{name}_denoiser": value / plain for name, value in calls.items()}


def bundled(is_quick: bool) -> dict[str, float]:
    base = bench.base_model()
    token = bench.token(base)
    count = 16 if is_quick else 24
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


PARTS = {"large": large, "bundled": bundled}


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
