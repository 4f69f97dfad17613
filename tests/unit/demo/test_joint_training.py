from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from dagkit import demo, models
from dagkit.demo import networks, world
from dagkit.demo.joint import JointDenoiser, VelocityLoss, class_weight, load_bank
from dagkit.demo.recipe import AutoencoderRecipe, BaseRecipe, JointRecipe, Schedule
from dagkit.demo.training import CHECKPOINT_NAME, Training

SHORT = Schedule(6, 3, 1e-3, num_warmup_steps=2, seed=4)
TINY = JointRecipe(
    num_layers=3, width=16, num_heads=2, text_width=16, second_width=8, num_scenes=70, schedule=SHORT, class_layer=1
)


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return networks.build_autoencoder(AutoencoderRecipe(channels=(8, 8, 8))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bank(autoencoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    return load_bank(path, TINY, BaseRecipe(), autoencoder, networks.build_tokenizer())


def denoiser():
    torch.manual_seed(1)
    *encoders, transformer = networks.build_joint(TINY, len(networks.build_tokenizer()))
    return JointDenoiser(*encoders, transformer, TINY.class_layer).train()


def training(folder: Path, bank):
    network = denoiser()
    made = Training(network, SHORT, folder)
    return made, VelocityLoss(network, bank, TINY, lambda: made.step)


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, bank):
    undisturbed, loss = training(tmp_path / "a", bank)
    undisturbed.run(loss)
    broken, loss = training(tmp_path / "b", bank)
    broken.run(loss, stop_after=3)
    resumed, loss = training(tmp_path / "b", bank)
    assert resumed.step == 3
    resumed.run(loss)
    first, second = (load_file(tmp_path / folder / CHECKPOINT_NAME) for folder in "ab")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_the_bank_is_drawn_once(tmp_path, autoencoder):
    path = tmp_path / "bank.safetensors"
    bank = load_bank(path, TINY, BaseRecipe(), autoencoder, networks.build_tokenizer())
    written = path.stat().st_mtime_ns
    again = load_bank(path, TINY, BaseRecipe(), None, None)
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(one, other) for one, other in zip(bank, again, strict=True))
    assert [tuple(part.shape) for part in bank] == [(70, 4, 16, 16), (70, 16, 16), (70, 16, 16), (70, 16)]
    covered = bank.classes > 0
    assert bool((bank.covered[covered] > 0).all())
    assert int(bank.classes.max()) <= len(world.CLASSES)
    assert 0.05 < float(covered.float().mean()) < 0.5


def test_the_class_loss_fades():
    weights = [class_weight(step, SHORT, 0.5) for step in range(6)]
    assert weights == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])


@pytest.mark.parametrize("step", [0, 5])
def test_the_loss_is_the_weighted_error_of_the_velocity(bank, step):
    """Early steps look at half of the cells, later ones at all, as the pipeline does."""
    recipe = replace(TINY, class_weight=0.0, kept_share=0.5 if step == 0 else 1.0)
    network = denoiser()
    loss = VelocityLoss(network, bank, recipe, lambda: step)(np.random.default_rng(3)).detach()

    rng, size = np.random.default_rng(3), SHORT.batch_size
    chosen = rng.integers(len(bank.latents), size=size)
    levels = 1 / (1 + np.exp(-(TINY.noise_mean + TINY.noise_deviation * rng.standard_normal(size, np.float32))))
    noise = torch.from_numpy(rng.standard_normal((size, 4, 16, 16), np.float32))
    count = 128 if step == 0 else 256
    kept = torch.from_numpy(rng.random((size, 256)).argsort(1)[:, :count])
    expected = []
    with torch.no_grad():
        for i, index in enumerate(chosen):
            clean, level = bank.latents[index].float(), float(levels[i])
            noisy, now = ((1 - level) * clean + level * noise[i])[None], torch.tensor([level])
            if step:  # all cells: the transformer's own forward pass
                hidden, pooled = network.condition(bank.ids[index].long()[None])
                whole = network.transformer(noisy, hidden, pooled, 1000 * now).sample[0].flatten(1).T
            else:
                whole = torch.zeros(256, 4)
                whole[kept[i].sort().values] = network(
                    noisy, now, bank.ids[index].long()[None], kept[i].sort().values[None]
                )[0][0]
            weights = (1 + (TINY.object_weight - 1) * bank.covered[index].float() * (1 - level)).flatten()[kept[i]]
            error = (whole - (noise[i] - clean).flatten(1).T)[kept[i]] ** 2
            expected.append(float((error * (weights / weights.mean())[:, None]).mean()))
    assert float(loss) == pytest.approx(np.mean(expected), rel=2e-2)  # trained in bfloat16


def test_the_text_encoder_starts_from_the_known_one():
    known, tokenizer, _ = networks.load_denoiser(demo.model_path())
    first, _, _ = networks.build_joint(JointRecipe(num_layers=1), len(tokenizer), known)
    ids = torch.tensor(tokenizer(["a cat and a bomb on grass"], padding="max_length").input_ids)
    with torch.no_grad():
        hidden = first.eval()(ids, output_hidden_states=True).hidden_states[-2]
        expected = known.eval()(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected)


def test_a_text_encoder_of_another_size_is_named():
    known, tokenizer, _ = networks.load_denoiser(demo.model_path())
    with pytest.raises(ValueError, match="does not fit"):
        networks.build_joint(JointRecipe(num_layers=1, num_text_layers=4), len(tokenizer), known)


def test_what_is_written_is_a_pipeline_of_stable_diffusion_3(tmp_path, autoencoder):
    torch.manual_seed(2)
    tokenizer = networks.build_tokenizer()
    first, second, transformer = networks.build_joint(TINY, len(tokenizer))
    networks.save_joint_pipeline(tmp_path / "sd3", autoencoder, (first, second), tokenizer, transformer)
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "sd3", text_encoder_3=None, tokenizer_3=None)
    assert (
        next(iter(load_file(next((tmp_path / "sd3" / "transformer").glob("*.safetensors"))).values())).dtype
        == torch.float16
    )
    assert plain.vae.config.shift_factor == 0
    base = models.load(tmp_path / "sd3")
    assert base.family.name == "sd3"
    image = base.pipe("a cat", num_inference_steps=2, height=64, width=64, max_sequence_length=1).images[0]
    assert image.size == (64, 64)
    assert "/" not in (tmp_path / "sd3" / "transformer" / "config.json").read_text()
