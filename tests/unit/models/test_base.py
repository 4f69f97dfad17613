import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tiny_pipelines as tiny
from dagkit import models, plugins
from dagkit.errors import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.sd().save_pretrained(path)
    return path


def test_a_folder_becomes_a_frozen_base_model(folder: Path) -> None:
    base = models.load(folder)
    assert base.family.name == "sd"
    assert base.source == str(folder)
    assert base.device == torch.device("cpu")
    assert not base.pipe.unet.training
    assert not any(parameter.requires_grad for parameter in base.pipe.unet.parameters())
    assert base.pipe.unet.dtype == base.pipe.text_encoder.dtype == torch.float32
    assert base.pipe.progress_bar(total=1).disable


def test_the_fingerprint_is_of_the_weights(folder: Path, tmp_path: Path) -> None:
    first = models.load(folder).fingerprint
    assert first.startswith("sha256:")
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert models.load(copy).fingerprint == first
    tiny.sd(seed=1).save_pretrained(tmp_path / "other")
    assert models.load(tmp_path / "other").fingerprint != first


def test_half_precision_on_request(folder: Path) -> None:
    assert models.load(folder, dtype=torch.float16).pipe.unet.dtype == torch.float16


def test_no_such_folder(tmp_path: Path) -> None:
    for where in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "nowhere", "a b/nowhere"):
        with pytest.raises(
            ModelError, match=r"nowhere: no such folder. Expected a folder in diffusers' format, or a Hub id"
        ):
            models.load(where)


def test_a_hub_id_that_cannot_be_downloaded() -> None:
    with pytest.raises(ModelError, match="nobody/nothing: neither a folder nor a model that can be downloaded"):
        models.load("nobody/nothing")


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no model_index.json. Expected a folder written by diffusers' save_pretrained"
    ):
        models.load(tmp_path)


def test_a_folder_without_a_unet(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "unet")
    with pytest.raises(ModelError, match="no unet folder, so there is no denoiser to guard"):
        models.load(copy)


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    next((copy / "unet").glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(ModelError, match="diffusers cannot load this model"):
        models.load(copy)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.fp16.safetensors"])
def test_weights_that_are_no_plain_safetensors(folder: Path, tmp_path: Path, part: str, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    next((copy / part).glob("*.safetensors")).rename(copy / part / name)
    with pytest.raises(
        ModelError, match=f"copy: {part} has no plain safetensors.*neither pickles nor variants.*convert"
    ):
        models.load(copy)


def test_variants_and_pickles_beside_the_weights_are_not_looked_at(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors", "pytorch_model.bin"):
        for part in ("unet", "text_encoder"):
            (copy / part / name).write_bytes(b"never read")
    assert models.load(copy).fingerprint == models.load(folder).fingerprint


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe"])
def test_an_index_that_is_no_json_object(folder: Path, tmp_path: Path, text: bytes) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model_index.json").write_bytes(text)
    with pytest.raises(
        ModelError, match=r"model_index.json: (not JSON|expected a JSON object).*Download the model again"
    ):
        models.load(copy)


def test_an_index_of_unknown_classes(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelError, match="diffusers cannot load this model"):
        models.load(copy)


def test_an_unknown_pipeline_is_named_with_its_denoiser() -> None:
    class Strange:
        transformer = nn.Linear(1, 1)

    with pytest.raises(
        ModelError, match=r"no family knows Strange with denoiser Linear. Available families: .*sd, sd3, sdxl"
    ):
        models.match(Strange())


def test_a_subclass_of_a_known_pipeline_is_known() -> None:
    from diffusers import StableDiffusionPipeline

    class Mine(StableDiffusionPipeline):
        pass

    assert models.match(tiny.sd(Mine)).name == "sd"


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_the_contract_of_every_family(make: Any) -> None:
    pipe = make()
    family = models.match(pipe)
    base = models.BaseModel(pipe, family, "tiny", "")
    sites = family.sites(pipe)
    assert sites
    assert all(name.endswith("attn2") for name in sites)
    chosen = list(sites)[1:3]
    assert list(family.sites(pipe, chosen)) == chosen
    with pytest.raises(ModelError, match=r"no cross-attention layer mid.attn9 \(1 of 2 are missing\); it has"):
        family.sites(pipe, [chosen[0], "mid.attn9"])
    condition = base.encode(["a cat", "a dog and a bomb"])
    assert condition.hidden_states.shape == (2, 16, tiny.WIDTH)
    assert condition[:1].hidden_states.shape[0] == 1
    assert all(len(condition[:1].added[name]) == 1 for name in condition.added)
    latents = base.latents([Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")])
    assert latents.shape == (2, 4, 16, 16)
    features = base.features(latents, torch.tensor([0.005, 0.9]), condition, seed=1)
    assert list(features) == list(sites)
    again = base.features(latents, torch.tensor([0.005, 0.9]), condition, seed=1)
    assert all(torch.equal(value, again[name]) for name, value in features.items())
    prints = family.fingerprints(pipe, sites)
    assert set(prints) == {"text_encoder", "key_projections"}


def test_noise_follows_the_schedule() -> None:
    pipe = tiny.sd()
    base = models.BaseModel(pipe, models.match(pipe), "tiny", "")
    latents = torch.ones(2, 4, 16, 16)
    noised, timesteps = base.noised(latents, torch.tensor([0, 0.999]), seed=0)
    assert timesteps.tolist() == [0, 999]
    assert (noised[0] - 1).abs().mean() < 0.1
    assert abs(noised[1].std() - 1) < 0.05
    torch.testing.assert_close(
        noised,
        pipe.scheduler.add_noise(
            latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 999])
        ),
    )


def test_images_of_two_sizes_are_refused() -> None:
    pipe = tiny.sd()
    with pytest.raises(ModelError, match="images of one batch must have one size"):
        models.match(pipe).latents(pipe, [Image.new("RGB", (32, 32)), Image.new("RGB", (64, 32))])


def test_a_model_for_inpainting_is_no_base_for_optimisation() -> None:
    pipe = tiny.sd(unet=tiny.unet(in_channels=9))
    base = models.BaseModel(pipe, models.match(pipe), "tiny", "")
    with pytest.raises(ModelError, match="the denoiser takes 9 channels, but latents have 4"):
        base.features(torch.zeros(1, 4, 16, 16), torch.tensor([0.005]), base.encode(["a cat"]), seed=0)


def test_layers_are_chosen_by_their_grid() -> None:
    pipe = tiny.sd()
    family = models.match(pipe)
    assert len(family.sites(pipe)) == 7  # 32 and 16 cells a side
    pipe.unet.register_to_config(sample_size=64)  # 64 and 32: the finest are too fine
    assert all("down_blocks.1" in name or "up_blocks.0" in name or "mid" in name for name in family.sites(pipe))
    pipe.unet.register_to_config(sample_size=8)  # 8 and 4: the finest that there are
    assert all("down_blocks.0" in name or "up_blocks.1" in name for name in family.sites(pipe))


def test_families_are_plugins() -> None:
    assert {"sd", "sdxl"} <= set(plugins.names("families"))
