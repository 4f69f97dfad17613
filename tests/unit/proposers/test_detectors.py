"""Detectors: NudeNet's real weights on a photograph, Grounding DINO's architecture with random weights, a token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dagkit import demo, models
from dagkit.concept import Concept, load_concept
from dagkit.demo import world
from dagkit.errors import CheckpointError, ConceptError, PluginError, TokenError
from dagkit.optimization import Example, Recipe, optimize
from dagkit.proposers import Proposer, build_proposers, propose_all
from dagkit.proposers.attention import AttentionProposer
from dagkit.proposers.token import TokenProposer
from dagkit.segmenters import build_segmenter, combine, union_by_label
from dagkit.token import GuidelineToken


def change(concept: Concept, **fields: object) -> Concept:
    return Concept.model_validate({**concept.model_dump(), **fields})


# NudeNet


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """Eileen Collins, NASA, public domain, as it comes with scikit-image."""
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


@pytest.fixture(scope="module")
def nudity() -> Concept:
    pytest.importorskip("nudenet")
    return change(load_concept("nudity"), proposers="nudenet", segmenter="box")


def test_the_astronauts_face_is_found_and_cut_out(astronaut: Image.Image, nudity: Concept):
    (proposer,) = build_proposers(nudity)
    assert isinstance(proposer, Proposer)
    assert proposer.version == "3.4.2" or proposer.version > "3"
    (face,) = proposer.propose(astronaut, "", 0)

    assert (face.label, face.is_positive) == ("face", False)
    assert face.score > 0.5
    x0, y0, x1, y1 = face.box
    assert x0 < 225 < x1  # between her eyes
    assert y0 < 115 < y1
    assert x1 - x0 < 200

    body = np.ones((512, 512), bool)
    masks = union_by_label(build_segmenter(nudity).segment(astronaut, [face]))
    cut = combine({"exposed_body": body, "face": masks["face"][0]}, nudity.labels.negative, (512, 512))
    assert not cut[115, 225]
    assert cut[500, 10]


def test_classes_map_to_labels(astronaut: Image.Image, nudity: Concept):
    options = {"name": "nudenet", "classes": {"exposed_body": "FACE_FEMALE"}, "threshold": 0.3}
    (proposer,) = build_proposers(change(nudity, proposers=[options]))
    assert [(p.label, p.is_positive) for p in proposer.propose(astronaut, "", 0)] == [("exposed_body", True)]
    (blind,) = build_proposers(change(nudity, proposers=[{**options, "threshold": 1.0}]))
    assert blind.propose(astronaut, "", 0) == []


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"exposed_body": ["FACE"]},
            r"nudenet: classes.exposed_body.0: expected one of ANUS_.*got 'FACE'. Did you mean 'FACE_MALE'\?",
        ),
        ({"skin": ["FACE_MALE"]}, r"nudenet: classes.skin: 'skin' is not a label of the concept \(exposed_body, face"),
        ("FACE_MALE", r"nudenet: classes: input should be a valid dictionary, but got 'FACE_MALE'"),
        (
            {"exposed_body": ["FACE_MALE"], "face": ["FACE_MALE"]},
            r"FACE_MALE is mapped to 'exposed_body' and to 'face'",
        ),
    ],
)
def test_wrong_classes_are_named(classes: object, message: str, nudity: Concept):
    with pytest.raises(ConceptError, match=message):
        build_proposers(change(nudity, proposers=[{"name": "nudenet", "classes": classes}]))


def test_a_missing_package_says_how_to_install_it(nudity: Concept, monkeypatch: pytest.MonkeyPatch):
    import sys

    from dagkit import nudenet

    monkeypatch.setitem(sys.modules, "nudenet", None)
    nudenet.load_detector.cache_clear()
    with pytest.raises(PluginError, match=r"pip install 'dagkit\[nudenet\]'"):
        build_proposers(nudity)


# Grounding DINO


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exact architecture, small and with random weights, saved as a folder."""
    from transformers import (
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "bomb", "knife", "axe", "dynamite", "harmless"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config={
            "model_type": "bert", "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16,
        },
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=20, num_feature_levels=4,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192})
    GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def test_every_label_gets_boxes_inside_the_image(grounding_dino: Path):
    options = {"name": "grounding_dino", "model": str(grounding_dino), "threshold": 0.0}
    (proposer,) = build_proposers(change(load_concept("weapon"), proposers=[options]))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    found = proposer.propose(image, "", 0)

    assert {(p.label, p.is_positive) for p in found} == {("weapon", True), ("harmless", False)}
    assert all(0 <= p.box[0] < p.box[2] <= 90 and 0 <= p.box[1] < p.box[3] <= 60 for p in found)
    assert all(0 <= p.score <= 1 for p in found)
    assert found == proposer.propose(image, "another prompt", 1)


def test_missing_weights_say_where_to_get_them(tmp_path: Path):
    options = {"name": "grounding_dino", "model": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"(?s)Grounding DINO cannot be loaded .*hf download IDEA-Research/"):
        build_proposers(change(load_concept("weapon"), proposers=[options]))


# A token


@pytest.fixture(scope="module")
def base_model() -> models.BaseModel:
    return models.load(demo.model_path())


@pytest.fixture(scope="module")
def token(base_model: models.BaseModel) -> GuidelineToken:
    """Optimised for a few steps on rendered scenes."""
    rng = np.random.default_rng(0)
    examples = []
    for index in range(24):
        other, weapon = world.HARMLESS[index % 16], world.WEAPONS[index % 4]
        names = (other, weapon) if index % 2 else (other,)
        scene = world.render_scene(rng, names)
        text = world.caption(scene.classes, scene.background, rng)
        examples.append(Example(Image.fromarray(scene.image), scene.mask(*world.WEAPONS), text, index % 2 == 1))
    result = optimize(base_model, examples, recipe=Recipe(initial_phrase="a weapon", num_steps=60, num_draws=2))
    return result.token(base_model, concept="weapon", version="1.0.0", safety_prompt="a weapon", model_id="demo")


def test_a_token_proposes_where_its_map_is_high(base_model: models.BaseModel, token: GuidelineToken, tmp_path: Path):
    folder = token.save(tmp_path / "weapon" / "1.0.0")
    concept = change(load_concept("weapon"), proposers=[{"name": "token", "token": str(folder)}])
    (proposer,) = build_proposers(concept, base_model)
    assert proposer.version == "weapon@1.0.0-1"

    scene = world.render_scene(np.random.default_rng(1), ("cat", "bomb"), "sand")
    best, *_ = proposer.propose(Image.fromarray(scene.image), "a cat and a bomb on sand", 0)
    assert scene.mask("bomb")[int(best.point[1]), int(best.point[0])]
    assert (best.label, best.is_positive) == ("weapon", True)
    heat = proposer.heat_map(Image.fromarray(scene.image), "a cat and a bomb on sand", 0)
    assert heat.shape == (64, 64)
    x0, y0, x1, y1 = map(int, best.box)
    assert heat[y0:y1, x0].max() >= proposer.highlight > heat[y0:y1, max(x0 - 1, 0)].max()
    assert float(heat[y0:y1, x0:x1].max()) == pytest.approx(best.score)


def test_a_token_of_another_model_is_refused(base_model: models.BaseModel, token: GuidelineToken):
    from dataclasses import replace

    def with_keys(sketch: str) -> GuidelineToken:
        info = token.record.base_model.model_copy(update={"key_projections": sketch})
        return replace(token, record=token.record.model_copy(update={"base_model": info}))

    other = with_keys(token.record.base_model.text_encoder)
    with pytest.raises(TokenError, match=r"weapon@1.0.0 was made for demo, and its key_projections is not that of"):
        TokenProposer(base_model, other, "weapon")
    with pytest.raises(TokenError, match=r"weapon@1.0.0: base_model.key_projections of its record is no fingerprint"):
        TokenProposer(base_model, with_keys("sketch1:"), "weapon")


def test_what_a_token_proposer_needs(base_model: models.BaseModel):
    concept = change(load_concept("weapon"), proposers="token")
    with pytest.raises(ConceptError, match=r"proposer token: the option token is missing. Add it: A folder, ``name@"):
        build_proposers(concept, base_model)
    with pytest.raises(ConceptError, match=r"needs the option token, e.g. \{name: token, token: weapon@1.0.0\}"):
        TokenProposer.from_concept(concept, base_model)
    nowhere = change(concept, proposers=[{"name": "token", "token": "./nowhere"}])
    with pytest.raises(ConceptError, match=r"'token' needs the base model, but none was given"):
        build_proposers(nowhere)
    with pytest.raises(TokenError, match="nowhere"):
        build_proposers(nowhere, base_model)


def test_several_proposers_agree_on_one_box(base_model: models.BaseModel, token: GuidelineToken):
    proposers = [
        AttentionProposer.from_concept(
            load_concept("weapon"), base_model, options=AttentionProposer.Options(min_score=0.3)
        ),
        TokenProposer(base_model, token, "weapon"),
    ]
    scene = world.render_scene(np.random.default_rng(1), ("bomb",), "sand")
    image = Image.fromarray(scene.image)
    alone = [proposer.propose(image, "a bomb on sand", 0) for proposer in proposers]
    together = propose_all(proposers, image, "a bomb on sand", 0, iou_threshold=0.2)
    assert [len(found) for found in alone] == [1, 1]
    assert len(together) == 1
    assert together[0] in (alone[0][0], alone[1][0])
