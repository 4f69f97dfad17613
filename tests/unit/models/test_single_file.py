"""A model in one file is the same model: the same weights, so the same fingerprints, and a guard knows it."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

import dagkit
import tiny_pipelines as tiny
from dagkit import demo, models
from dagkit.cli import command
from dagkit.engines.source import ModelSource
from dagkit.errors import ModelError
from dagkit.workspace import sha256_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_names(unet: Any) -> dict[str, str]:
    """Modules of a U-Net by latent-diffusion's names: blocks are counted through all levels, layer by layer."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    count = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{count}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for i, block in enumerate(unet.up_blocks):
        has_attention = hasattr(block, "attentions")
        for j in range(len(block.resnets)):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{count}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{count}.1"
            count += 1
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{1 + has_attention}.conv"
    return names


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A weight's name with the longest known beginning replaced."""
    start = max((known for known in names if name.startswith(f"{known}.")), key=len)
    return names[start] + name.removeprefix(start)


def ldm_unet(unet: Any) -> dict[str, Tensor]:
    names, result = ldm_names(unet), {}
    for name, weight in unet.state_dict().items():
        new = renamed(name, names)
        if match := re.fullmatch(r"(.*\.resnets\.\d+)\.(\w+)\.(weight|bias)", name):
            new = f"{names[match[1]]}.{RESNET[match[2]]}.{match[3]}"
        result[f"model.diffusion_model.{new}"] = weight
    return result


def ldm_vae(vae: Any) -> dict[str, Tensor]:
    count, result = len(vae.encoder.down_blocks), {}
    for name, weight in vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda match: f"up.{count - 1 - int(match[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{count - 1 - int(match[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", new):
            new = f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        result[f"first_stage_model.{new}"] = weight
    return result


def save_single_file(pipe: Any, path: Path) -> Path:
    """Writes a pipeline of SD 1.x's kind as one file with latent-diffusion's names."""
    text = {name.removeprefix("text_model."): weight for name, weight in pipe.text_encoder.state_dict().items()}
    text = {f"cond_stage_model.transformer.text_model.{name}": weight for name, weight in text.items()}
    weights = ldm_unet(pipe.unet) | ldm_vae(pipe.vae) | text
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def strip_weights(folder: Path, target: Path) -> Path:
    """A copy of a model's folder without any weights."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model as one file, and its configuration."""
    folder = tmp_path_factory.mktemp("single")
    pipe = models.load(demo.model_path(), dtype=torch.float16).pipe
    return save_single_file(pipe, folder / "demo.safetensors"), strip_weights(demo.model_path(), folder / "config")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Random weights in the shape of SD 1.5 (four levels, the last without attention): folder, file, configuration."""
    root = tmp_path_factory.mktemp("sd15")
    torch.manual_seed(0)
    unet = tiny.unet(
        layers_per_block=2,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )
    pipe = tiny.sd(unet=unet)
    pipe.save_pretrained(root / "folder")
    file = save_single_file(pipe, root / "model.safetensors")
    return root / "folder", file, strip_weights(root / "folder", root / "config")


def same_weights(one: Any, other: Any) -> bool:
    return all(
        torch.equal(weight, getattr(other, part).state_dict()[name])
        for part in ("unet", "vae", "text_encoder")
        for name, weight in getattr(one, part).state_dict().items()
    )


def test_the_bundled_model_in_one_file_is_guarded_as_from_its_folder(demo_file: tuple[Path, Path]) -> None:
    file, config = demo_file
    folder, single = models.load(demo.model_path()), models.load(file, config=config)
    assert same_weights(folder.pipe, single.pipe)
    assert single.family.fingerprints(single.pipe) == folder.family.fingerprints(folder.pipe)
    assert (single.source, single.fingerprint) == (str(file), sha256_file(file))

    guard = dagkit.load_token(Path(__file__).parents[2] / "tokens" / "weapon").guard()
    images = []
    for base in (folder, single):
        with guard.attach(base.pipe) as trace:
            prompt, generator = "a cat and a bomb on grass", torch.Generator().manual_seed(0)
            images.append(base.pipe(prompt, num_inference_steps=4, guidance_scale=5.0, generator=generator).images[0])
        assert trace.summary(0)["is_firing"]
    assert images[0].tobytes() == images[1].tobytes()


def test_commands_take_one_file(demo_file: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = demo_file
    token = str(Path(__file__).parents[2] / "tokens" / "weapon")
    where = ["--model", str(file), "--model-config", str(config)]

    done = CliRunner().invoke(command, ["token", "verify", token, *where])
    assert (done.exit_code, "base model: made for" in done.output) == (0, True), done.output
    drawing = ["sample", "a cat on grass", "--guard", token, "--num-inference-steps", "4"]
    done = CliRunner().invoke(command, [*drawing, *where, "--workspace", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(command, [*drawing, "--model-config", str(config)])
    assert "only a single .safetensors file takes a configuration" in str(done.exception)


def test_a_worker_finds_one_file_and_its_configuration_again(demo_file: tuple[Path, Path]) -> None:
    file, config = demo_file
    base = models.load(file, config=config)
    again = pickle.loads(pickle.dumps(ModelSource.of(base))).load()
    assert again is not base
    assert (again.fingerprint, again.config) == (base.fingerprint, str(config))


def test_a_model_of_the_shape_of_sd15_in_one_file(sd15: tuple[Path, Path, Path]) -> None:
    folder, file, config = sd15
    by_folder, single = models.load(folder), models.load(file, config=config)
    assert same_weights(by_folder.pipe, single.pipe)
    assert single.family.fingerprints(single.pipe) == by_folder.family.fingerprints(by_folder.pipe)
    assert single.family.name == "sd"
    assert single.pipe.safety_checker is None
    assert type(single.pipe.scheduler) is type(by_folder.pipe.scheduler)


def test_half_precision_of_one_file(sd15: tuple[Path, Path, Path]) -> None:
    _, file, config = sd15
    assert models.load(file, config=config, dtype=torch.float16).pipe.unet.dtype == torch.float16


def test_a_configuration_in_the_cache(
    sd15: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the architecture that diffusers tells from the weights, and of a Hub id that is named."""
    from huggingface_hub import constants

    folder, file, config = sd15
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5, but no .* --model-config FOLDER"
    ):
        models.load(file)
    with pytest.raises(ModelError, match=r"its configuration is to be dagkit/small, but no .* --model-config FOLDER"):
        models.load(file, config="dagkit/small")
    for name in ("stable-diffusion-v1-5--stable-diffusion-v1-5", "dagkit--small"):
        repository = tmp_path / f"models--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(config, repository / "snapshots" / ("0" * 40))
    for options in ({}, {"config": "dagkit/small"}):
        assert same_weights(models.load(file, **options).pipe, models.load(folder).pipe)


def test_what_is_no_single_file(sd15: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, file, config = sd15
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for model, message in {
        tmp_path / "none.safetensors": "none.safetensors: no such file. Expected one .safetensors file",
        tmp_path / "old.ckpt": "dagkit reads no pickles. Choose the .safetensors file",
        tmp_path / "torn.safetensors": r"diffusers cannot load this model: .* Check the file and --model-config",
        tmp_path
        / "other.safetensors": "Weights for this component appear to be missing .* Name another --model-config",
    }.items():
        with pytest.raises(ModelError, match=message):
            models.load(model, config=config)
    with pytest.raises(ModelError, match=r"torn.safetensors: not a model in safetensors"):
        models.load(tmp_path / "torn.safetensors")
    with pytest.raises(ModelError, match=r"only a single .safetensors file takes a configuration"):
        models.load(folder, config=config)
    assert not models.is_hub_id("loras/model.safetensors")
