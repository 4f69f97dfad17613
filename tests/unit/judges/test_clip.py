from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dagkit.concept import Plugin, load_concept
from dagkit.errors import CheckpointError, ConceptError
from dagkit.judges import build_judge
from dagkit.judges.clip import ClipJudge
from tiny_clip import tiny_clip


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return tiny_clip()


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)) for _ in range(count)]


def test_scores_are_clips_own_softmax(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    texts = ["a bomb on grass", "a cat on grass", "a dog on sand"]
    inputs = processor(text=texts, images=images(3), return_tensors="pt", padding=True)
    with torch.no_grad():
        shares = model(**inputs).logits_per_image.softmax(1)
    judge = ClipJudge(model, processor, present=texts[:1], absent=texts[1:], objects=["cat", "dog"])
    said = judge.judge(images(3))
    assert [one.score for one in said] == pytest.approx(shares[:, 0].tolist(), abs=1e-5)
    assert [one.is_present for one in said] == [share >= 0.5 for share in shares[:, 0].tolist()]
    assert all(set(one.labels) == {"concept", "cat", "dog"} for one in said)
    assert all(0 < value < 1 for one in said for value in one.labels.values())


def test_the_concept_gives_texts_and_objects(parts: tuple[Any, Any], tmp_path: Path) -> None:
    for part in parts:
        part.save_pretrained(tmp_path)
    plugin = Plugin.model_validate({"name": "clip", "checkpoint": str(tmp_path), "threshold": 0.0})
    judge = build_judge(load_concept("weapon").model_copy(update={"judge": plugin}))
    assert judge.present == ("a weapon",)
    assert "cat" in judge.objects
    assert judge.judge(images(1))[0].is_present
    assert judge.settings["checkpoint"] == str(tmp_path)


def test_mistakes_are_named(parts: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="present and absent need at least one text"):
        ClipJudge(*parts, present=[])
    with pytest.raises(CheckpointError, match=r"judge clip: .* cannot be loaded"):
        ClipJudge.from_checkpoint(str(tmp_path / "nothing"), present=["a"])
    plugin = Plugin.model_validate({"name": "clip", "texts": ["a"]})
    with pytest.raises(ConceptError, match="unknown option 'texts'"):
        build_judge(load_concept("weapon").model_copy(update={"judge": plugin}))
