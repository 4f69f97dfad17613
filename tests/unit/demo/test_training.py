from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dagkit.demo import networks
from dagkit.demo.base import Denoiser, DenoisingLoss, SceneBatches, draw_example, draw_timesteps
from dagkit.demo.recipe import AutoencoderRecipe, BaseRecipe, Recipe, Schedule
from dagkit.demo.train import with_steps
from dagkit.demo.training import CHECKPOINT_NAME, Training, learning_rate
from dagkit.demo.world import WEAPONS
from dagkit.errors import CheckpointError

SHORT = Schedule(6, 3, 1e-3, num_warmup_steps=2, seed=4)
TINY = BaseRecipe(
    channels=(16, 16, 16), layers_per_block=(2, 1, 1), num_heads=2, norm_num_groups=8, text_width=16, schedule=SHORT
)


def base_training(folder, is_resumed=True):
    torch.manual_seed(0)
    text_encoder, tokenizer, unet = networks.build_denoiser(TINY)
    denoiser = Denoiser(text_encoder.train(), unet.train().to(memory_format=torch.channels_last))
    autoencoder = networks.build_autoencoder(AutoencoderRecipe(channels=(8, 8, 8))).eval()
    autoencoder.requires_grad_(False)
    training = Training(denoiser, SHORT, folder, is_resumed)
    return training, DenoisingLoss(denoiser, autoencoder, TINY), SceneBatches(tokenizer, TINY)


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    undisturbed, loss, draw = base_training(tmp_path / "a")
    undisturbed.run(loss, draw=draw)
    broken, loss, draw = base_training(tmp_path / "b")
    broken.run(loss, draw=draw, stop_after=3)
    resumed, loss, draw = base_training(tmp_path / "b")
    assert resumed.step == 3
    resumed.run(loss, draw=draw, num_workers=1)  # who draws the scenes makes no difference
    first, second = (load_file(tmp_path / folder / CHECKPOINT_NAME) for folder in "ab")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_training_without_resume_starts_again(tmp_path):
    training, loss, draw = base_training(tmp_path)
    training.run(loss, draw=draw, stop_after=1)
    assert base_training(tmp_path, is_resumed=False)[0].step == 0


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    Training(nn.Linear(2, 2), SHORT, tmp_path).save()
    with pytest.raises(
        CheckpointError, match=r"(?s)checkpoint.safetensors: expected a checkpoint of this network, but .* Remove"
    ):
        Training(nn.Linear(3, 2), SHORT, tmp_path)


def test_a_torn_checkpoint_is_named(tmp_path):
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"Remove the file to start again\."):
        Training(nn.Linear(2, 2), SHORT, tmp_path)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    network = nn.Linear(2, 2)
    training = Training(network, SHORT, tmp_path)
    training.save()
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    training.step = 5
    with pytest.raises(OSError, match="No space left"):
        training.save()
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_NAME]


def test_exports_hold_the_average_and_training_goes_on_with_its_own_weights(tmp_path):
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 5.0)
    schedule = replace(SHORT, learning_rate=0.1, weight_decay=0.0, ema_decay=0.9)
    seen = []
    training = Training(network, schedule, tmp_path)
    training.run(
        lambda _: network.weight.square().sum(), export=lambda: seen.append(network.weight.item()), export_every_s=1e9
    )
    assert len(seen) == 1
    assert 5.0 > seen[0] > network.weight.item()


def test_learning_rate_rises_stays_and_falls():
    schedule = Schedule(100, 1, 1.0, num_warmup_steps=10, flat_share=0.5, final_share=0.01)
    rates = [learning_rate(step, schedule) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[20] == rates[50] == 1.0
    assert np.all(np.diff(rates[50:]) < 0)
    assert rates[-1] == pytest.approx(0.01, abs=0.002)


def test_examples_are_as_the_recipe_says():
    rng = np.random.default_rng(0)
    recipe = BaseRecipe()
    examples = [draw_example(rng, recipe) for _ in range(1500)]
    empty = [scene for scene, text in examples if not text]
    named = [(scene, text) for scene, text in examples if text]
    repeats = [len(set(scene.classes)) < len(scene.classes) for scene in empty]
    assert len(empty) / len(examples) == pytest.approx(recipe.caption_dropout, abs=0.03)
    assert np.mean(repeats) == pytest.approx(recipe.repeat_share, abs=0.1)
    assert all(len(set(scene.classes)) == len(scene.classes) for scene, _ in named)
    armed = [set(scene.classes) & set(WEAPONS) for scene, _ in named]
    assert np.mean([bool(a) for a in armed]) == pytest.approx(recipe.weapon_probability, abs=0.04)
    hinted = [("danger" in text) for (_, text), a in zip(named, armed, strict=True) if a]
    assert 0.1 < np.mean(hinted) < recipe.caption_weights[2]
    assert not any("danger" in text or "weapon" in text for (_, text), a in zip(named, armed, strict=True) if not a)


def test_objects_weigh_more_only_where_little_noise_hides_them():
    _, loss = base_training_loss()
    covered = torch.zeros(2, 1, 16, 16)
    covered[..., :8] = 1
    weights = loss._weights(torch.tensor([0, 999]), covered)
    ratio = weights[..., 0] / weights[..., -1]
    assert ratio[0].min() == pytest.approx(TINY.object_weight, rel=0.01)
    assert ratio[1].max() == pytest.approx(1.0, abs=0.05)


def base_training_loss():
    text_encoder, _, unet = networks.build_denoiser(TINY)
    denoiser = Denoiser(text_encoder, unet)
    return denoiser, DenoisingLoss(denoiser, None, TINY)


def test_one_number_of_steps_for_all():
    recipe = with_steps(Recipe(), 7)
    schedules = [recipe.autoencoder.schedule, recipe.autoencoder.decoder_schedule, recipe.base.schedule]
    assert {s.num_steps for s in (*schedules, recipe.judge.schedule, recipe.sam.schedule)} == {7}


def test_half_of_the_timesteps_are_noisy_ones():
    draws = np.array([draw_timesteps(np.random.default_rng(seed), 16, 0.5, 1000) for seed in range(200)])
    assert draws.min() >= 0
    assert draws.max() <= 999
    assert np.mean(draws >= 600) == pytest.approx(0.5 + 0.5 * 0.4, abs=0.02)
    assert np.mean(draws[:, 0] >= 600) == pytest.approx(0.7, abs=0.1)  # no place in the batch is special
    assert (
        draw_timesteps(np.random.default_rng(0), 4, 0.0, 8).tolist()
        != draw_timesteps(np.random.default_rng(1), 4, 0.0, 8).tolist()
    )
    assert sorted(draw_timesteps(np.random.default_rng(0), 4, 0.0, 8) // 2) == [0, 1, 2, 3]
