"""Trains the bundled models: ``python -m dagkit.demo.train {autoencoder,base,judge,sam,sd3,all} --out DIR``.

Each command goes on from its checkpoint in DIR. The autoencoder comes first; with ``--init`` an existing model provides
it, and the weights from which the base model starts. ``sd3`` takes the autoencoder and a text encoder of the bundled
model, or of ``--init``.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dagkit.demo import claim, model_path
from dagkit.demo.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


def train_autoencoder(recipe: Recipe, out: Path, is_resumed: bool = True) -> None:
    """Trains the autoencoder, then its decoder; the result is ``out/vae``."""
    import torch

    from dagkit.demo import networks
    from dagkit.demo.autoencoder import AutoencoderLoss, psnr_db, scaling_factor
    from dagkit.demo.training import Training

    torch.manual_seed(recipe.autoencoder.schedule.seed)
    autoencoder = networks.build_autoencoder(recipe.autoencoder).train()
    training = Training(autoencoder, recipe.autoencoder.schedule, out / "autoencoder", is_resumed)
    training.run(AutoencoderLoss(autoencoder, recipe.autoencoder))
    training.use_average()
    autoencoder.register_to_config(scaling_factor=scaling_factor(autoencoder))
    autoencoder.requires_grad_(False)
    for part in (autoencoder.decoder, autoencoder.post_quant_conv):
        part.requires_grad_(True)
    decoder_training = Training(autoencoder, recipe.autoencoder.decoder_schedule, out / "decoder", is_resumed)
    decoder_training.run(
        AutoencoderLoss(autoencoder, recipe.autoencoder, is_decoder_only=True),
        export=lambda: autoencoder.save_pretrained(out / "vae"),
    )
    decoder_training.use_average()
    click.echo(f"PSNR of held-out scenes: {psnr_db(autoencoder.eval()):.1f} dB")


def train_base(
    recipe: Recipe,
    out: Path,
    autoencoder_path: Path,
    init: Path | None,
    is_resumed: bool = True,
    device: str = "cpu",
    num_workers: int = 0,
) -> None:
    """Trains text encoder and UNet, from random weights or from those of ``init``; the result is ``out/model``."""
    import torch

    from dagkit.demo import networks
    from dagkit.demo.base import Denoiser, DenoisingLoss, SceneBatches
    from dagkit.demo.training import Training

    torch.manual_seed(recipe.base.schedule.seed)
    text_encoder, tokenizer, unet = (
        networks.build_denoiser(recipe.base) if init is None else networks.load_denoiser(init)
    )
    if networks.is_growable(unet, recipe.base):
        unet = networks.grow_unet(unet)
    autoencoder = load_autoencoder(autoencoder_path).to(device)
    denoiser = Denoiser(text_encoder.train(), unet.train().to(memory_format=torch.channels_last)).to(device)
    training = Training(denoiser, recipe.base.schedule, out / "base", is_resumed)
    training.run(
        DenoisingLoss(denoiser, autoencoder, recipe.base),
        draw=SceneBatches(tokenizer, recipe.base),
        num_workers=num_workers,
        export=lambda: networks.save_pipeline(out / "model", autoencoder, text_encoder, tokenizer, unet),
    )


def train_joint(
    recipe: Recipe, out: Path, init: Path, is_resumed: bool = True, device: str = "cpu", is_compiled: bool = False
) -> None:
    """Trains the joint-attention model; the result is ``out/sd3``.

    Args:
        recipe: how.
        out: where its bank of scenes, checkpoint and result stand.
        init: `StableDiffusionPipeline` whose autoencoder it uses and whose text encoder it starts from.
        is_resumed: go on from the checkpoint.
        device: where.
        is_compiled: compile the blocks: twice as fast, after a minute.
    """
    import torch

    from dagkit.demo import networks
    from dagkit.demo.joint import JointDenoiser, VelocityLoss, load_bank
    from dagkit.demo.training import BANK_NAME, Training

    torch.manual_seed(recipe.sd3.schedule.seed)
    known, tokenizer, _ = networks.load_denoiser(init)
    first, second, transformer = networks.build_joint(recipe.sd3, len(tokenizer), known)
    autoencoder = load_autoencoder(init / "vae")
    denoiser = JointDenoiser(first, second, transformer, recipe.sd3.class_layer).train().to(device)
    bank = load_bank(out / "sd3-training" / BANK_NAME, recipe.sd3, recipe.base, autoencoder, tokenizer)
    training = Training(denoiser, recipe.sd3.schedule, out / "sd3-training", is_resumed)
    for block in transformer.transformer_blocks if is_compiled else ():
        block.forward = torch.compile(block.forward)
    training.run(
        VelocityLoss(denoiser, bank, recipe.sd3, lambda: training.step),
        export=lambda: networks.save_joint_pipeline(out / "sd3", autoencoder, (first, second), tokenizer, transformer),
    )


def train_judge(recipe: Recipe, out: Path, autoencoder_path: Path, is_resumed: bool = True) -> None:
    """Trains the judge; the result is ``out/judge.safetensors``."""
    import torch

    from dagkit.demo.judge import JudgeLoss
    from dagkit.demo.training import Training
    from dagkit.judges.demo import JudgeNetwork

    torch.manual_seed(recipe.judge.schedule.seed)
    network = JudgeNetwork().train()
    loss = JudgeLoss(network, load_autoencoder(autoencoder_path), recipe.judge)
    training = Training(network, recipe.judge.schedule, out / "judge", is_resumed)
    training.run(loss, export=lambda: save_half(network, out / "judge.safetensors"))


def train_sam(recipe: Recipe, out: Path, autoencoder_path: Path, is_resumed: bool = True) -> None:
    """Trains the small SAM; the result is ``out/sam_tiny.safetensors``."""
    import torch

    from dagkit.demo.sam import SamLoss
    from dagkit.demo.training import Training
    from dagkit.segmenters.sam_tiny import build_sam_tiny

    torch.manual_seed(recipe.sam.schedule.seed)
    sam = build_sam_tiny().train()
    loss = SamLoss(sam, load_autoencoder(autoencoder_path), recipe.sam)
    training = Training(sam, recipe.sam.schedule, out / "sam", is_resumed)
    training.run(loss, export=lambda: save_half(sam, out / "sam_tiny.safetensors"))


def load_autoencoder(path: Path) -> Any:
    """AutoencoderKL in float32, frozen."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(path).float().eval().requires_grad_(False)


def save_half(network: nn.Module, path: Path) -> None:
    """Writes the network's weights in float16."""
    from dagkit.demo.training import save_tensors

    save_tensors({name: value.half().contiguous() for name, value in network.state_dict().items()}, path)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with every schedule cut or stretched to the same number of steps."""
    parts: dict[str, Any] = {}
    for name in ("autoencoder", "base", "sd3", "judge", "sam"):
        part = getattr(recipe, name)
        keys = [field.name for field in fields(part) if field.name.endswith("schedule")]
        schedules = {key: replace(getattr(part, key), num_steps=steps) for key in keys}
        parts[name] = replace(part, **schedules)
    return Recipe(**parts)


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["autoencoder", "base", "judge", "sam", "sd3", "all"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoints and results.")
@click.option("--resume/--restart", "is_resumed", default=True, help="Go on from the checkpoints, or start again.")
@click.option("--init", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Base model to start from.")
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's number of steps.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of PyTorch.")
@click.option("--device", default="cpu", show_default=True, help="Where the base models are trained.")
@click.option("--compile", "is_compiled", is_flag=True, help="Compile the blocks of sd3.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that draw the base's scenes."
)
def main(
    what: str,
    out: Path,
    is_resumed: bool,
    init: Path | None,
    steps: int | None,
    threads: int,
    device: str,
    is_compiled: bool,
    workers: int,
) -> None:
    """Command line of the training."""
    import torch

    from dagkit.demo.training import BANK_NAME, CHECKPOINT_NAME

    results = ("model/model_index.json", "sd3/model_index.json", "judge.safetensors", "sam_tiny.safetensors")
    claim(out, f"*/{CHECKPOINT_NAME}", f"*/{BANK_NAME}", *results)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    recipe = with_steps(Recipe(), steps) if steps else Recipe()
    autoencoder_path = (init or out) / "vae"
    if what == "autoencoder" or (what == "all" and init is None):
        train_autoencoder(recipe, out, is_resumed)
    if what in ("base", "all"):
        train_base(recipe, out, autoencoder_path, init, is_resumed, device, workers)
    if what in ("sd3", "all"):
        train_joint(
            recipe, out, init or (out / "model" if what == "all" else model_path()), is_resumed, device, is_compiled
        )
    if what in ("judge", "all"):
        train_judge(recipe, out, autoencoder_path, is_resumed)
    if what in ("sam", "all"):
        train_sam(recipe, out, autoencoder_path, is_resumed)


if __name__ == "__main__":
    main()
