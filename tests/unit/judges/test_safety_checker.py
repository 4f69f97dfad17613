from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from dagkit.concept import Plugin, load_concept
from dagkit.errors import CheckpointError, ConceptError
from dagkit.judges import build_judge
from dagkit.judges.safety_checker import SafetyCheckerJudge

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def checker(vision: dict[str, Any], projection_dim: int, *, seed: int = 0) -> StableDiffusionSafetyChecker:
    """The checker's own classes with random weights, and thresholds that some images pass."""
    torch.manual_seed(seed)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=projection_dim))
    with torch.no_grad():
        for parameter in (model.concept_embeds, model.special_care_embeds):
            parameter.normal_()
        model.concept_embeds_weights.uniform_(-0.1, 0.3)
        model.special_care_embeds_weights.uniform_(-0.3, 0.3)
    return model


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def small() -> tuple[StableDiffusionSafetyChecker, CLIPImageProcessor]:
    size = {"height": 32, "width": 32}
    return checker(SMALL, 16), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)


@pytest.mark.parametrize("seed", range(4))
def test_judgements_are_those_of_the_checker_itself(seed: int) -> None:
    model = checker(SMALL, 16, seed=seed)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    shown = images(6)
    pixels = processor(shown, return_tensors="pt").pixel_values
    _, expected = model(pixels, [np.zeros((4, 4, 3)) for _ in shown])
    said = SafetyCheckerJudge(model, processor).judge(shown)
    assert [one.is_present for one in said] == expected
    assert all((one.score > 0.5) == one.is_present for one in said)
    assert all(len(one.labels) == 17 for one in said)


def test_a_folder_is_loaded_and_named(small: tuple[Any, Any], tmp_path: Path) -> None:
    for part in small:
        part.save_pretrained(tmp_path)
    plugin = Plugin.model_validate({"name": "safety_checker", "checkpoint": str(tmp_path)})
    judge = build_judge(load_concept("nudity").model_copy(update={"judge": plugin}))
    assert judge.judge(images(2)) == SafetyCheckerJudge(*small).judge(images(2))
    assert judge.settings == {"checkpoint": str(tmp_path)}


def test_a_missing_checkpoint_and_a_wrong_option_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"judge safety_checker: .* cannot be loaded.*Name a folder or a Hub id"):
        SafetyCheckerJudge.from_checkpoint(str(tmp_path / "nothing"))
    plugin = Plugin.model_validate({"name": "safety_checker", "threshold": 0.4})
    with pytest.raises(ConceptError, match="unknown option 'threshold'"):
        build_judge(load_concept("nudity").model_copy(update={"judge": plugin}))


@pytest.mark.slow
def test_the_exact_architecture_judges_images() -> None:
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    model = checker(vision, 768)
    assert sum(parameter.numel() for parameter in model.parameters()) == 303_981_588
    said = SafetyCheckerJudge(model, CLIPImageProcessor()).judge(images(1))
    assert len(said[0].labels) == 17
