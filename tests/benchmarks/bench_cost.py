"""Cost of the guard: CPU time against the unguarded pipeline, on an SD-1.5-sized pipeline and on the bundled model.

    python tests/benchmarks/bench_cost.py [--quick] [--only large bundled-safe bundled-firing]
        [--side 48] [--images 1] [--device cuda]

Guarded and unguarded calls alternate, on one thread. The large pipeline has random weights; its token never fires
(``safe``) or fires in every call (``firing``, so at least 1.5 without reuse for the denoiser alone but for what the
safety forward shares: three predictions instead of two); ``firing_default`` fires only from the first timestep on which
the default acts. A run of the large pipeline is composed from these kinds of calls and one decoding of the latents. The
bundled model draws whole images; where nothing fires runs are short, and their steps stand for those of a whole run.

A call is timed block by block of the U-Net, and of each block the least time counts: what else runs on a machine only
ever adds to it. Guarded and unguarded calls get equally many looks.

``--quick`` takes smaller latents and fewer images. ``--device cuda`` runs the large pipeline in float16 on a GPU and
gives wall times of whole calls.
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
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from numpy.typing import NDArray

from dagkit.token import Guidance, Thresholds

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_pipelines as tiny

NUM_STEPS = int(bench.SETTINGS["num_inference_steps"])
NUM_ACTING = sum(timestep / 1000 <= Guidance().max_level for timestep in range(0, 1000, 1000 // NUM_STEPS))
"""Calls of a run in which the default may act; timesteps as of DDIM."""
SHORT = 4
"""Steps of runs in which nothing fires."""
SIDE, QUICK_SIDE = 48, 32
"""Of the large pipeline's latents, an eighth of its images in pixels."""
NUM_ROUNDS = 3
NUM_CUDA_ROUNDS = 20
NUM_LOOKS = 6
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


class Clock:
    """The least seconds that each kind of call has taken so far, between the blocks of a U-Net.

    CPU time of all threads together; on a GPU wall time, and calls are not cut.
    """

    def __init__(self, unet: Any) -> None:
        self.seconds: dict[str, NDArray[np.float64]] = {}
        self.stamps: list[float] = []
        self.is_cuda = unet.device.type == "cuda"
        for block in [] if self.is_cuda else blocks(unet):
            block.register_forward_hook(lambda *_: self.stamp())

    def stamp(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter() if self.is_cuda else time.process_time())

    def measure(self, name: str, call: Callable[[], object]) -> None:
        self.stamps = []
        self.stamp()
        with torch.no_grad():
            call()
        self.stamp()
        seconds = np.diff(self.stamps)
        self.seconds[name] = np.minimum(seconds, self.seconds.get(name, seconds))

    def __getitem__(self, name: str) -> float:
        return float(self.seconds[name].sum())


def blocks(unet: Any) -> list[torch.nn.Module]:
    """All blocks but those before the text condition: of a hooked one the safety forward takes no result over."""
    _, *resnets = (module for module in unet.modules() if isinstance(module, ResnetBlock2D))
    _, *transformers = (module for module in unet.modules() if isinstance(module, Transformer2DModel))
    return [*resnets, *transformers]


def large(device: str, side: int, num_images: int) -> dict[str, float]:
    pipe = large_pipeline()
    pipe._guidance_scale = 7.5  # of the denoiser calls below, which no pipeline makes
    token = tiny.token(pipe, thresholds=NEVER)
    if device == "cuda":
        pipe.to(device, torch.float16)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side, side, generator=generator).repeat(2 * num_images, 1, 1, 1)
    nothing = pipe.encode_prompt([""], pipe.device, 1, False)[0]  # 16 tokens; five times, as of a long prompt
    hidden = torch.cat([nothing.repeat(1, 5, 1), torch.randn(1, 80, 768, generator=generator)])
    hidden = hidden.repeat_interleave(num_images, 0)
    latents, hidden = (part.to(pipe.unet.device, pipe.unet.dtype) for part in (latents, hidden))
    never, always = token.guard(), token.guard(thresholds=ALWAYS, reuse_steps=2)
    clock = Clock(pipe.unet)

    def denoise(step: int) -> Callable[[], object]:
        """A denoiser call with classifier-free guidance, as a pipeline makes it."""
        return lambda: pipe.unet(latents, torch.tensor(700 - step), hidden)

    for _ in range(NUM_CUDA_ROUNDS if clock.is_cuda else NUM_ROUNDS):
        clock.measure("plain", denoise(0))
        with ExitStack() as stack:
            clock.measure("attach", lambda stack=stack: stack.enter_context(never.attach(pipe)))
            clock.measure("safe", denoise(0))
        with always.attach(pipe):
            clock.measure("firing", denoise(0))  # makes a safety prediction
            clock.measure("kept", denoise(1))  # uses it again
    for _ in range(2 if clock.is_cuda else 1):
        clock.measure("decode", lambda: pipe.vae.decode(latents[:num_images]))
    num_made = (NUM_STEPS + 1) // 2
    calls = {
        "safe": NUM_STEPS * clock["safe"],
        "firing": NUM_STEPS * clock["firing"],
        "firing_reuse": num_made * clock["firing"] + (NUM_STEPS - num_made) * clock["kept"],
        "firing_default": (NUM_STEPS - NUM_ACTING) * clock["safe"] + NUM_ACTING * clock["firing"],
    }
    plain = NUM_STEPS * clock["plain"]
    figures = {
        f"guard.cost_{name}": (clock["attach"] + value + clock["decode"]) / (plain + clock["decode"])
        for name, value in calls.items()
    }
    return figures | {f"guard.cost_{name}_denoiser": value / plain for name, value in calls.items()}


def whole(clock: Clock, name: str, num_blocks: int) -> float:
    """Seconds of a whole run, from runs of ``SHORT`` steps that all but the last do the same.

    ``num_blocks`` intervals lead from the first stamp of one step to the first of the next.
    """
    first, steps, last = np.split(clock.seconds[name], [1, 1 + (SHORT - 1) * num_blocks])
    return float(first.sum() + (NUM_STEPS - 1) * steps.reshape(-1, num_blocks).min(0).sum() + last.sum())


def bundled_safe(is_quick: bool) -> dict[str, float]:
    """A small difference takes many looks, in an order that favours neither."""
    base = bench.base_model()
    what = bench.prompts("safe", 4 if is_quick else 13, 801)
    attach = {"plain": None, "guarded": bench.token(base).guard().attach}
    clock = Clock(base.pipe.unet)

    def draw(name: str) -> None:
        *_, traces = bench.sample(base, what, attach[name], num_inference_steps=SHORT)
        steps = [record for trace in traces for record in (trace.steps if trace else ())]
        assert not any(record.is_firing for record in steps if record.step < SHORT - 1)

    for name in NUM_LOOKS * ("plain", "guarded", "guarded", "plain"):
        clock.measure(name, lambda name=name: draw(name))
    num_blocks = len(blocks(base.pipe.unet))
    return {"guard.cost_safe_bundled": whole(clock, "guarded", num_blocks) / whole(clock, "plain", num_blocks)}


def bundled_firing(is_quick: bool) -> dict[str, float]:
    base = bench.base_model()
    what = bench.prompts("named", 4 if is_quick else 10, 802)
    token = bench.token(base)
    attach = {"plain": None, "firing": token.guard(reuse_steps=1).attach, "reuse": token.guard().attach}
    clock = Clock(base.pipe.unet)
    for name in NUM_ROUNDS * tuple(attach):
        clock.measure(name, lambda name=name: bench.sample(base, what, attach[name]))
    return {
        "guard.cost_firing_bundled": clock["firing"] / clock["plain"],
        "guard.cost_firing_reuse_bundled": clock["reuse"] / clock["plain"],
    }


PARTS = ("large", "bundled-safe", "bundled-firing")


def main(parts: Sequence[str], *, is_quick: bool, device: str, side: int | None, num_images: int) -> dict[str, object]:
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    if "large" in parts:
        figures |= large(device, side or (QUICK_SIDE if is_quick else SIDE), num_images)
    if "bundled-safe" in parts:
        figures |= bundled_safe(is_quick)
    if "bundled-firing" in parts:
        figures |= bundled_firing(is_quick)
    assert all(np.isfinite(value) for value in figures.values())  # type: ignore[call-overload]
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--side", type=int, help="of the large pipeline's latents")
    parser.add_argument("--images", type=int, default=1, help="drawn at a time with the large pipeline")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the large pipeline")
    arguments = parser.parse_args()
    bench.emit(
        main(
            arguments.only,
            is_quick=arguments.quick,
            device=arguments.device,
            side=arguments.side,
            num_images=arguments.images,
        )
    )
