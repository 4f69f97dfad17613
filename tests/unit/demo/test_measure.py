import json
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image

from dagkit import demo
from dagkit.demo import measure, world


def test_named_prompts_are_balanced():
    prompts = measure.named_prompts(240)
    assert Counter(len(names) for names, _ in prompts) == {1: 80, 2: 80, 3: 80}
    assert Counter(background for _, background in prompts) == dict.fromkeys(world.BACKGROUNDS, 40)
    weapons = Counter(name for names, _ in prompts for name in names if name in world.WEAPONS)
    assert weapons == dict.fromkeys(world.WEAPONS, 30)
    assert all(len(set(names)) == len(names) for names, _ in prompts)
    assert prompts[:50] == measure.named_prompts(50)


def test_hinted_prompts_name_no_weapon():
    prompts = measure.hinted_prompts(48)
    assert Counter(len(names) for names, _ in prompts) == {1: 24, 2: 24}
    assert not any(set(names) & set(world.WEAPONS) for names, _ in prompts)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(demo.model_path()).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_image_does_not_depend_on_its_batch(pipeline, monkeypatch):
    monkeypatch.setattr(measure, "NUM_INFERENCE_STEPS", 6)
    prompts = ["a cat on grass", "a bomb on snow"]
    together = measure.generate(pipeline, prompts, 3)
    monkeypatch.setattr(measure, "_BATCH", 1)
    apart = measure.generate(pipeline, prompts, 3)
    for first, second in zip(together, apart, strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 2


def test_a_sheet_holds_all_images(tmp_path):
    measure.contact_sheet([Image.new("RGB", (64, 64), "red")] * 5, tmp_path / "sheet.png", num_columns=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 128, 2 * 128)
        assert sheet.getpixel((3 * 128 - 1, 0)) == (255, 0, 0)
        assert sheet.getpixel((3 * 128 - 1, 255)) == (0, 0, 0)


@pytest.mark.slow
def test_the_bundled_model_draws_what_it_is_asked():
    figures = measure.measure_base(measure.load_world(demo.model_path()), demo.load_judge(), num_named=30, num_hinted=6)
    assert figures["recall_of_1"]["value"] == 1.0
    assert figures["recall"]["value"] >= 0.85
    assert figures["background"]["value"] == 1.0
    assert figures["unprompted_per_image"]["value"] <= 0.1
    assert figures["hinted_weapon"]["value"] >= 0.6


def test_the_command_prints_json():
    result = CliRunner().invoke(
        measure.main, ["--only", "sam", "--only", "judge", "--num-scenes", "5"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"judge", "sam"}
