import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dagkit import plugins
from dagkit.demo import judge as training
from dagkit.demo import load_judge, world
from dagkit.demo.measure import measure_judge
from dagkit.errors import CheckpointError
from dagkit.judges import Judge
from dagkit.judges import demo as judges


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def image_of(*names, seed=0, background="grass"):
    return Image.fromarray(world.render_scene(np.random.default_rng(seed), names, background).image)


def test_the_bundled_judge_reaches_its_bars_on_held_out_renderings(judge):
    figures = measure_judge(judge, num_scenes=150)
    assert figures["worst_object"]["value"] >= 0.99
    assert figures["background"]["value"] >= 0.99
    assert figures["counts"]["value"] >= 0.97


def test_judgement_names_what_is_there(judge):
    safe, armed = judge.judge([image_of("cat", "rocket"), image_of("cat", "bomb")])
    assert not safe.is_present
    assert safe.score < 0.5
    assert armed.is_present
    assert armed.score == armed.labels["bomb"] == max(armed.labels[name] for name in world.WEAPONS)
    assert {name for name, p in armed.labels.items() if p >= 0.5} == {"cat", "bomb"}
    assert tuple(armed.labels) == world.CLASSES


def test_any_group_of_objects_is_a_concept(judge):
    cls = judges.DemoJudge
    animal = cls.from_concept(options=judges.DemoOptions(present=["cat", "dog"], absent=["bomb"]))
    scenes = [image_of("cat", "bomb"), image_of("bomb", "apple")]
    first, second = animal.judge(scenes)
    assert (first.is_present, second.is_present) == (True, False)
    assert first.score == first.labels["cat"]
    assert list(first.labels) == ["cat", "dog", "bomb"]
    assert animal.concept_labels == ("cat", "dog")
    assert animal.settings == {"present": ["cat", "dog"], "absent": ["bomb"]}
    same = cls.from_concept(options=judges.DemoOptions(present=list(world.WEAPONS)))
    assert (judge.settings, same.settings, same.concept_labels) == ({}, {}, None)  # older figures are still its own
    assert same.judge(scenes) == judge.judge(scenes)


def test_counts_repeats(judge):
    counts = judge.count([image_of("duck", "duck", "axe"), image_of()])
    assert counts.shape == (2, 20)
    assert counts[0, world.CLASSES.index("duck")] == 2
    assert counts[0].sum() == 3
    assert counts[1].sum() == 0


def test_other_sizes_and_modes_are_resized(judge):
    scene = image_of("knife", "dog")
    variants = [scene.resize((256, 256), Image.Resampling.NEAREST), scene.convert("RGBA")]
    for judgement in judge.judge(variants):
        assert {name for name, p in judgement.labels.items() if p >= 0.5} == {"knife", "dog"}


def test_no_images_no_judgements(judge):
    assert judge.judge([]) == []


def test_it_is_a_plugin_whatever_the_concept():
    cls = plugins.load("judges", "demo")
    assert cls is judges.DemoJudge
    assert isinstance(cls.from_concept(object()), Judge)


@pytest.mark.parametrize("damage", ["missing", "torn", "other"])
def test_damaged_weights_are_named(tmp_path, damage):
    path = tmp_path / "judge.safetensors"
    if damage == "torn":
        path.write_bytes(b"x" * 20)
    if damage == "other":
        save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"(?s)judge.safetensors: expected the weights of the demo judge, but "):
        judges.DemoJudge.from_checkpoint(path)


def test_peaks_are_the_largest_of_their_neighbourhood():
    heat = torch.zeros(1, 1, 16, 16)
    heat[0, 0, 3, 3], heat[0, 0, 3, 5], heat[0, 0, 10, 10], heat[0, 0, 15, 0] = 0.9, 0.8, 0.6, 0.4
    assert judges.peaks(heat).nonzero()[:, 2:].tolist() == [[3, 3], [10, 10]]


def test_targets_stand_at_the_centres():
    scene = world.render_scene(np.random.default_rng(0), ("fish", "fish", "bomb"))
    target = training.heat_target(scene, 16)
    assert target.shape == (20, 16, 16)
    centres = {((y0 + y1) // 8, (x0 + x1) // 8) for x0, y0, x1, y1 in scene.boxes[:2]}
    assert {tuple(cell) for cell in target[world.CLASSES.index("fish")].eq(1).nonzero().tolist()} == centres
    assert target.amax((1, 2)).eq(1).sum() == 2


def test_focal_loss_falls_with_better_heat_maps():
    target = training.heat_target(world.render_scene(np.random.default_rng(0), ("fish", "bomb")), 16)[None]
    good = torch.where(target.eq(1), 6.0, -6.0)
    assert training.focal_loss(good, target) < 0.05 < 1 < training.focal_loss(-good, target)


def test_bundled_names_are_the_worlds():
    assert judges.OBJECTS == world.CLASSES
    assert judges.WEAPONS == world.WEAPONS
    assert judges.BACKGROUNDS == world.BACKGROUNDS
