"""Trains the bundled models: ``python -m dagkit.demo.train {autoencoder,base,judge,sam,all} --out DIR``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from dagkit.demo.recipe import Recipe


def train_base(recipe: Recipe, out: Path, init: Path | None, autoencoder_path: Path, is_resumed: bool) -> None:
    """Trains text encoder and UNet; exports go to ``out/model``."""
    from diffusers import StableDiffusionPipeline

    from dagkit.demo import networks
    from dagkit.demo.base import Denoiser, DenoisingLoss
    from dagkit.demo.training import Training

    schedule = recipe.base.schedule
    torch.manual_seed(schedule.seed)
    tokenizer: Any
    if init is None:
        tokenizer = networks.build_tokenizer(recipe.base.max_tokens)
        text_encoder = networks.build_text_encoder(recipe.base, len(tokenizer))
        unet = networks.build_unet(recipe.base)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(init, torch_dtype=torch.float32)
        tokenizer, text_encoder, unet = pipeline.tokenizer, pipeline.text_encoder, pipeline.unet
        if unet.config.layers_per_block == 1 and recipe.base.layers_per_block[0] == 2:
            unet = networks.grow_unet(unet)
    autoencoder = load_autoencoder(autoencoder_path)
    unet.train().to(memory_format=torch.channels_last)
    text_encoder.train()
    denoiser = Denoiser(text_encoder, unet)
    training = Training(denoiser, schedule, out, is_resumed)

    def export() -> None:
        networks.save_pipeline(out / "model", autoencoder, text_encoder, tokenizer, unet)

    training.run(DenoisingLoss(denoiser, autoencoder, tokenizer, recipe.base), export=export)


def train_judge(recipe: Recipe, out: Path, autoencoder_path: Path, is_resumed: bool) -> None:
    """Trains the judge; exports go to ``out/judge.safetensors``."""
    from dagkit.demo.judge import JudgeLoss
    from dagkit.demo.training import Training
    from dagkit.judges.demo import JudgeNetwork

    torch.manual_seed(recipe.judge.schedule.seed)
    network = JudgeNetwork().train()
    loss = JudgeLoss(network, load_autoencoder(autoencoder_path), recipe.judge)
    training = Training(network, recipe.judge.schedule, out, is_resumed)
    training.run(loss, export=lambda: save_half(network, out / "judge.safetensors"))


def train_sam(recipe: Recipe, out: Path, autoencoder_path: Path, is_resumed: bool) -> None:
    """Trains the small SAM; exports go to ``out/sam_tiny.safetensors``."""
    from dagkit.demo.sam import SamLoss
    from dagkit.demo.training import Training
    from dagkit.segmenters.sam_tiny import build_sam_tiny

    torch.manual_seed(recipe.sam.schedule.seed)
    sam = build_sam_tiny().train()
    training = Training(sam, recipe.sam.schedule, out, is_resumed)
    loss = SamLoss(sam, load_autoencoder(autoencoder_path), recipe.sam)
    training.run(loss, export=lambda: save_half(sam, out / "sam_tiny.safetensors"))


def load_autoencoder(path: Path) -> Any:
    """AutoencoderKL in float32, frozen."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32).eval()
    autoencoder.requires_grad_(False)
    return autoencoder


def save_half(network: nn.Module, path: Path) -> None:
    """Writes the network's weights in float16."""
    from dagkit.demo.training import save_tensors

    save_tensors({name: value.half().contiguous() for name, value in network.state_dict().items()}, path)


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["autoencoder", "base", "judge", "sam", "all"]))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for checkpoints and exports."
)
@click.option(
    "--resume/--restart", "is_resumed", default=True, help="Go on from the checkpoint in --out, or start again."
)
@click.option("--init", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Base model to start from.")
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's number of steps.")
def main(what: str, out: Path, is_resumed: bool, init: Path | None, steps: int | None) -> None:
    """Command line of the training."""
    recipe = Recipe()
    torch.set_num_threads(1)
    if what == "base":
        if steps:
            recipe = replace(recipe, base=replace(recipe.base, schedule=replace(recipe.base.schedule, num_steps=steps)))
        train_base(recipe, out / "base", init, (init or out) / "vae", is_resumed)
    elif what == "judge":
        train_judge(recipe, out / "judge", (init or out) / "vae", is_resumed)
    elif what == "sam":
        train_sam(recipe, out / "sam", (init or out) / "vae", is_resumed)
    else:
        sys.exit("not yet")


if __name__ == "__main__":
    main()
