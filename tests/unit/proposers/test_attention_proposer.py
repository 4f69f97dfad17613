"""The attention proposer's arithmetic, and that it finds things on the bundled model."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dagkit import demo, models
from dagkit.concept import Concept, load_concept
from dagkit.demo import world
from dagkit.proposers.attention import AttentionProposer, contrast_map, word_shares


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("weapon")


@pytest.fixture(scope="module")
def base_model() -> models.BaseModel:
    return models.load(demo.model_path())


def test_contrast_map_by_hand():
    sharp = torch.zeros(4, 4)
    sharp[1, 2] = 0.8
    flat = torch.full((4, 4), 0.3)
    share = torch.stack([sharp, flat])[None]  # one word, two heads

    # the flat head never rises above its median, so only the sharp one counts: 0.8 * 0.8 / 0.8
    assert torch.allclose(contrast_map([share], (4, 4))[0], sharp)
    weak = torch.zeros(4, 4)
    weak[0, 0] = 0.2
    mixed = contrast_map([torch.stack([sharp, weak])[None]], (4, 4))[0]
    assert float(mixed[1, 2]) == pytest.approx(0.8 * 0.8 / 1.0)
    assert float(mixed[0, 0]) == pytest.approx(0.2 * 0.2 / 1.0)
    assert not contrast_map([torch.full((1, 2, 4, 4), 0.5)], (8, 8)).any()


def test_word_shares_are_a_softmax(base_model: models.BaseModel):
    sites = base_model.sites
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    queries = base_model.features(latents, torch.tensor([0.01, 0.02]), base_model.encode(["a cat", "a dog"]), seed=0)
    sequence = base_model.encode(["a cat on grass"]).hidden_states[0]

    shares = word_shares(sites, queries, sequence, len(sequence) - 1)
    name, layer = next((name, site.layer) for name, site in sites.items())
    query = queries[name].view(2, -1, layer.heads, queries[name].shape[-1] // layer.heads).transpose(1, 2)
    key = layer.to_k(sequence).view(len(sequence), layer.heads, -1).transpose(0, 1)
    expected = (query @ key.transpose(1, 2) * layer.scale).softmax(-1)
    assert torch.allclose(shares[0], expected[..., 1:].movedim(-1, 0), atol=1e-6)


def test_competitors_are_the_prompts_other_words(base_model: models.BaseModel, concept: Concept):
    proposer = AttentionProposer.from_concept(concept, base_model)
    sequence = proposer.word_sequence(["bomb"], "a Cat and a bomb on the grass, cat")

    rows = {word: base_model.encode([f"a {word}"]).hidden_states[0, 2] for word in ("bomb", "cat", "grass")}
    assert torch.allclose(sequence[0], base_model.encode([""]).hidden_states[0, 0])
    assert torch.allclose(sequence[1:], torch.stack([rows["bomb"], rows["cat"], rows["grass"]]), atol=1e-5)


def box_iou(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    return torchvision.ops.box_iou(torch.tensor([first]), torch.tensor([second])).item()


def test_words_that_a_prompt_names_are_looked_up_alone(base_model: models.BaseModel, concept: Concept):
    proposer = AttentionProposer.from_concept(concept, base_model)
    looked_up = []
    proposer.word_sequence = lambda words, prompt, seen=None: (
        looked_up.append(list(words)) or type(proposer).word_sequence(proposer, words, prompt)
    )
    image = Image.new("RGB", (64, 64))
    for prompt in ("a cat and a Knife on sand", "a penknife on sand", "a cat in danger"):
        proposer.heat_maps(image, prompt, 0)
    assert looked_up == [["knife"], concept.words, concept.words]


def test_weapons_are_found_in_renderings(base_model: models.BaseModel, concept: Concept):
    proposer = AttentionProposer.from_concept(concept, base_model)
    rng = np.random.default_rng(5)
    ious, hits = [], []
    for index in range(12):
        scene = world.render_scene(rng, ("cat", world.WEAPONS[index % 4]))
        prompt = world.caption(scene.classes, scene.background, rng, ("named", "class", "hinted")[index % 3])
        best = proposer.propose(Image.fromarray(scene.image), prompt, seed=index)[0]
        ious.append(box_iou(best.box, scene.boxes[1]))
        hits.append(bool(scene.mask(*world.WEAPONS)[int(best.point[1]), int(best.point[0])]))
        assert (best.label, best.is_positive) == ("weapon", True)
        assert 0 < best.score <= 1

    assert np.mean(ious) > 0.6
    assert np.mean(hits) > 0.75


def test_same_seed_same_proposals_at_any_size(base_model: models.BaseModel, concept: Concept):
    proposer = AttentionProposer.from_concept(concept, base_model)
    scene = world.render_scene(np.random.default_rng(3), ("bomb",), "sand")
    image = Image.fromarray(scene.image)

    first = proposer.propose(image, "a bomb on sand", 1)
    assert first == proposer.propose(image, "a bomb on sand", 1)
    wide = image.resize((150, 100))  # no multiple of what the model needs
    assert proposer.heat_maps(wide, "", 1)["weapon"].shape == (100, 150)
    assert all(
        0 <= p.box[0] < p.box[2] <= 150 and 0 <= p.box[1] < p.box[3] <= 100 for p in proposer.propose(wide, "", 1)
    )


def test_negative_labels_get_words_of_their_own(base_model: models.BaseModel, concept: Concept):
    options = {"words": {"harmless": ["cat"]}, "min_score": 0.3}
    proposer = AttentionProposer.from_concept(concept, base_model, options=AttentionProposer.Options(**options))
    scene = world.render_scene(np.random.default_rng(4), ("cat", "bomb"), "sand")

    found = proposer.propose(Image.fromarray(scene.image), "a cat and a bomb on sand", 0)
    by_label = {label: [p for p in found if p.label == label] for label in ("weapon", "harmless")}
    assert box_iou(by_label["harmless"][0].box, scene.boxes[0]) > 0.5
    assert box_iou(by_label["weapon"][0].box, scene.boxes[1]) > 0.5
    assert [p.is_positive for p in by_label["harmless"]] == [False] * len(by_label["harmless"])
