import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from dagkit.demo import networks
from dagkit.demo.recipe import AutoencoderRecipe, BaseRecipe
from dagkit.demo.vocabulary import VOCABULARY

TINY = BaseRecipe(channels=(16, 32, 32), layers_per_block=(1, 1, 1), num_heads=2, norm_num_groups=8, text_width=16)


def small_unet() -> UNet2DConditionModel:
    unet = networks.build_unet(TINY)
    unet.register_to_config(layers_per_block=1)
    return unet


def test_growth_keeps_the_function():
    torch.manual_seed(0)
    unet = small_unet()
    grown = networks.grow_unet(unet)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 16, 16)
    with torch.no_grad():
        before, after = unet(*inputs).sample, grown(*inputs).sample
    assert before.std() > 0.01
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    # What a training step changes is no longer the identity: the new layers receive a gradient.
    grown(*inputs).sample.square().mean().backward()
    for name in ("down_blocks.0.resnets.1.conv2", "up_blocks.2.resnets.1.conv2", "up_blocks.2.attentions.1.proj_out"):
        assert grown.get_submodule(name).weight.grad.abs().max() > 0, name


def test_growth_adds_cross_attention_at_16_by_16():
    grown = networks.grow_unet(small_unet())
    layers = [name for name in grown.attn_processors if "attn2" in name]
    assert sum(name.startswith("down_blocks.0.") for name in layers) == 2
    assert sum(name.startswith("up_blocks.2.") for name in layers) == 3


def test_only_what_lacks_layers_is_grown():
    recipe = replace(TINY, layers_per_block=(2, 1, 1))
    assert networks.is_growable(small_unet(), recipe)
    assert not networks.is_growable(networks.grow_unet(small_unet()), recipe)
    assert not networks.is_growable(small_unet(), TINY)


def test_every_word_is_one_token_and_any_other_word_falls_apart():
    tokenizer = networks.build_tokenizer()
    assert [word for word in VOCABULARY if len(tokenizer(word).input_ids) != 3] == []
    assert len(tokenizer("zebra").input_ids) > 3
    assert tokenizer.get_vocab() == networks.build_tokenizer().get_vocab()


def test_merges_are_learned_in_order():
    assert networks.learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]


def test_a_saved_pipeline_loads_and_holds_no_path(tmp_path):
    text_encoder, tokenizer, unet = networks.build_denoiser(TINY)
    autoencoder = networks.build_autoencoder(AutoencoderRecipe(channels=(8, 8, 8)))
    networks.save_pipeline(tmp_path / "first", autoencoder, text_encoder, tokenizer, unet)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "first")
    networks.save_pipeline(tmp_path / "model", pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet)
    for path in (tmp_path / "model").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
        assert "_name_or_path" not in json.loads(path.read_text())
    for module in networks.load_denoiser(tmp_path / "model")[::2]:
        assert module.dtype == torch.float32
    saved = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}
    assert unet.dtype == torch.float32


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_weights_follow_the_seed(part):
    def build():
        torch.manual_seed(7)
        text_encoder, _, unet = networks.build_denoiser(TINY)
        return {"text_encoder": text_encoder, "unet": unet}[part].state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[key], second[key]) for key in first)
