"""Proposals: overlaps, regions of heat maps, options, and the proposer that proposes nothing."""

import inspect

import numpy as np
import pytest
from PIL import Image

from dagkit import plugins
from dagkit.concept import Concept, load_concept
from dagkit.errors import ConceptError
from dagkit.proposers import (
    Proposal,
    Proposer,
    box_iou,
    build_proposers,
    checked_number,
    label_phrases,
    propose_all,
    suppress_overlaps,
)
from dagkit.proposers.regions import find_regions
from dagkit.segmenters import Segmenter


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("weapon")


def with_proposers(concept: Concept, *proposers: object) -> Concept:
    return Concept.model_validate({**concept.model_dump(), "proposers": list(proposers)})


def test_iou_of_boxes_by_hand():
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_the_better_of_two_overlapping_boxes_of_one_label_stays():
    weak = Proposal((0, 0, 10, 10), 0.4, "weapon")
    strong = Proposal((1, 0, 10, 10), 0.9, "weapon")
    elsewhere = Proposal((20, 20, 30, 30), 0.1, "weapon")
    other_label = Proposal((0, 0, 10, 10), 0.3, "harmless", is_positive=False)

    assert suppress_overlaps([weak, elsewhere, strong, other_label]) == [strong, other_label, elsewhere]
    assert suppress_overlaps([weak, strong], iou_threshold=0.95) == [strong, weak]
    assert suppress_overlaps([]) == []


def test_a_kept_box_takes_the_point_of_the_box_that_it_suppresses():
    detector = Proposal((1, 0, 10, 10), 0.9, "weapon")
    attention = Proposal((0, 0, 10, 10), 0.4, "weapon", point=(5.0, 6.0))
    outside = Proposal((0, 0, 10, 10), 0.5, "weapon", point=(0.5, 6.0))

    assert suppress_overlaps([attention, detector])[0].point == (5.0, 6.0)
    assert suppress_overlaps([outside, attention, detector])[0].point == (5.0, 6.0)


def test_regions_are_found_where_they_were_drawn():
    heat = np.zeros((40, 60), np.float32)
    heat[5:15, 10:20] = 0.8
    heat[9, 12] = 1.0
    heat[30:36, 40:58] = 0.75
    heat[0, 0] = 1.0  # one pixel is noise
    heat[20:22, 20:22] = 0.5  # too weak a peak

    regions = find_regions(heat, threshold=0.4, min_peak=0.7, min_area=0.001)
    assert [region.box for region in regions] == [(10, 5, 20, 15), (40, 30, 58, 36)]
    assert regions[0].point == (12.5, 9.5)
    assert [region.peak for region in regions] == pytest.approx([1.0, 0.75])
    assert regions[0].area == 100 / 2400


def test_regions_of_nothing_and_of_everything():
    assert find_regions(np.zeros((8, 8)), threshold=0.5, min_peak=0.5) == []
    assert [r.box for r in find_regions(np.ones((8, 9)), threshold=0.5, min_peak=0.5)] == [(0, 0, 9, 8)]
    spots = np.zeros((40, 40))
    spots[::4, ::4] = 1
    assert len(find_regions(spots, threshold=0.5, min_peak=0.5, max_regions=3)) == 3


def test_none_proposes_nothing(concept: Concept):
    proposers = build_proposers(with_proposers(concept, "none", "none"))
    assert [isinstance(proposer, Proposer) for proposer in proposers] == [True, True]
    assert propose_all(proposers, Image.new("RGB", (8, 8)), "a cat", 0) == []


def test_options_are_checked(concept: Concept):
    with pytest.raises(ConceptError, match=r"'none' has no option 'threshold'. Available: none\."):
        build_proposers(with_proposers(concept, {"name": "none", "threshold": 0.5}))
    with pytest.raises(ConceptError, match=r"attention' needs the base model, but none was given"):
        build_proposers(with_proposers(concept, "attention"))
    for value in (2, -0.1, "high", True):
        with pytest.raises(ConceptError, match=r"nudenet.threshold must be a number in \[0, 1\], but got"):
            checked_number(concept, "nudenet", {"threshold": value}, "threshold", 0.5)
    assert checked_number(concept, "nudenet", {}, "threshold", 0.5) == 0.5


def test_labels_and_words_in_options_are_checked(concept: Concept):
    assert label_phrases(concept, "x", {"words": {"weapon": "gun", "harmless": ["cat", "dog"]}}, "words") == {
        "weapon": ["gun"],
        "harmless": ["cat", "dog"],
    }
    assert label_phrases(concept, "x", {}, "words") == {}
    with pytest.raises(ConceptError, match=r"x.words: 'face' is not a label of the concept \(weapon, harmless\)"):
        label_phrases(concept, "x", {"words": {"face": "face"}}, "words")
    with pytest.raises(
        ConceptError, match=r"x.words must map labels to words, like \{weapon: \[word\]\}, but got 'gun'"
    ):
        label_phrases(concept, "x", {"words": "gun"}, "words")
    with pytest.raises(ConceptError, match=r"x.words.weapon must be a word or a list of words, but got \[3\]"):
        label_phrases(concept, "x", {"words": {"weapon": [3]}}, "words")


@pytest.mark.parametrize("kind", ["proposers", "segmenters"])
def test_every_registered_plugin_keeps_the_contract(kind: plugins.Kind):
    protocol = {"proposers": Proposer, "segmenters": Segmenter}[kind]
    method = {"proposers": "propose", "segmenters": "segment"}[kind]
    for name in plugins.names(kind):
        plugin = plugins.load(kind, name)
        assert plugin.name == name
        for attribute in ("from_concept", method):
            expected = inspect.signature(getattr(protocol, attribute)).parameters
            assert list(inspect.signature(getattr(plugin, attribute)).parameters) == list(expected), name
        assert plugin.__doc__
        assert inspect.getdoc(plugin.from_concept) != inspect.getdoc(protocol.from_concept)
