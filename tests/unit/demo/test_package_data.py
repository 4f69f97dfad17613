import json

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer

from dagkit import demo
from dagkit.demo import atlas, world
from dagkit.demo.vocabulary import VOCABULARY

MB = 2**20


def test_all_weights_together_are_at_most_25_mb():
    folder = demo.model_path().parent
    weights = [path for path in folder.rglob("*") if path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}]
    assert all(path.suffix == ".safetensors" for path in weights)
    assert 5 * MB < sum(path.stat().st_size for path in weights) <= 25 * MB


def test_the_data_hold_no_path_of_the_machine_that_made_them():
    for path in demo.model_path().rglob("*.json"):
        content = json.loads(path.read_text())
        assert "_name_or_path" not in content, path
        assert "/tmp" not in path.read_text(), path


def test_the_atlas_has_a_sprite_for_every_class():
    assert tuple(atlas.GLYPHS) == world.CLASSES
    data = demo.model_path().parent
    index = json.loads((data / "sprites.json").read_text())
    assert tuple(index["cells"]) == world.CLASSES
    with Image.open(data / "sprites.png") as image:
        assert image.mode == "RGBA"
        alpha = np.asarray(image)[..., 3]
    for x, y in index["cells"].values():
        assert (alpha[y : y + 64, x : x + 64] > 127).mean() > 0.2
    assert (data / "sprites.png").stat().st_size < 150_000


def test_a_cached_sprite_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        world.sprite("cat", 24)[0, 0] = 0


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(demo.model_path() / "tokenizer")


def test_every_word_is_one_token_of_the_bundled_tokenizer(tokenizer):
    assert [word for word in VOCABULARY if len(tokenizer(word).input_ids) != 3] == []


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat, a dog and a bomb in danger on night", []),
        ("A Cat on GRASS", []),
        ("a zebra and a cat with a zebra", ["zebra", "with"]),
        ("er 5 cats!", ["er", "5", "cats", "!"]),
        ("", []),
    ],
)
def test_unknown_words(tokenizer, prompt, unknown):
    assert demo.unknown_words(tokenizer, prompt) == unknown


def test_other_tokenizers_know_every_word():
    class Large:
        def get_vocab(self):
            return {f"word{i}</w>": i for i in range(49_408)} | {f"{word}</w>": 0 for word in VOCABULARY}

    assert demo.unknown_words(Large(), "a zebra") == []
    assert demo.unknown_words(None, "a zebra") == []


def test_the_model_card_states_every_bar_and_whether_it_was_reached():
    text = (demo.model_path().parent / "MODEL_CARD.md").read_text()
    for words in ("## Data", "## Training", "not from scratch", "## Measured quality", "## Limits"):
        assert words in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    bars = [row for row in rows if len(row) == 7 and row[4].startswith(".")]
    assert len(bars) == 5
    for _, what, _, shipped, bar, verdict, _ in bars:
        reached = float(shipped.split()[0])
        is_reached = reached <= float(bar) if "surplus" in what else reached >= float(bar)
        assert verdict == ("reached" if is_reached else "**missed**"), what
    assert f"{len(VOCABULARY)} words" in text
