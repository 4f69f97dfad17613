"""Proposals: overlaps, regions of heat maps, options, and the proposer that proposes nothing."""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagkit import plugins
from dagkit.concept import Concept, Plugin, find_plugin, load_concept
from dagkit.errors import ConceptError
from dagkit.judges import Judge
from dagkit.proposers import (
    Proposal,
    Proposer,
    build_proposers,
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


def test_the_better_of_two_overlapping_boxes_of_one_label_stays():
    weak = Proposal((0, 0, 10, 10), 0.4, "weapon")
    strong = Proposal((1, 0, 10, 10), 0.9, "weapon")
    elsewhere = Proposal((20, 20, 30, 30), 0.1, "weapon")
    other_label = Proposal((0, 0, 10, 10), 0.3, "harmless", is_positive=False)

    assert suppress_overlaps([weak, elsewhere, strong, other_label]) == [strong, other_label, elsewhere]
    assert suppress_overlaps([weak, strong], iou_threshold=0.95) == [strong, weak]
    assert suppress_overlaps([]) == []


def test_boxes_are_one_thing_from_the_threshold_on_or_where_one_holds_the_other():
    first, second = Proposal((0, 0, 2, 2), 0.9, "weapon"), Proposal((1, 1, 3, 3), 0.8, "weapon")
    assert suppress_overlaps([first, second], 1 / 7) == [first, second]  # an IoU of exactly 1/7
    assert suppress_overlaps([first, second], 0.14) == [first]
    small, empty = Proposal((0, 0, 1, 1), 0.3, "weapon"), Proposal((9, 9, 9, 9), 0.2, "weapon")
    assert suppress_overlaps([first, small, empty]) == [first, empty]
    assert suppress_overlaps([small, replace(first, score=0.1)]) == [small, replace(first, score=0.1)]


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


def options(concept: Concept, name: str, **given: object) -> Any:
    return find_plugin("proposers", Plugin(name=name, **given), concept)[1]


def test_options_are_checked(concept: Concept):
    with pytest.raises(ConceptError, match=r"'weapon': proposer none: unknown option 'threshold'. It takes none\."):
        build_proposers(with_proposers(concept, {"name": "none", "threshold": 0.5}))
    with pytest.raises(ConceptError, match=r"attention' needs the base model, but none was given"):
        build_proposers(with_proposers(concept, "attention"))
    for value in (2, -0.1, "high", "0.5", True):
        with pytest.raises(ConceptError, match=r"proposer nudenet: threshold: .*, but got"):
            options(concept, "nudenet", threshold=value)
    assert options(concept, "nudenet").threshold == 0.25


def test_labels_and_words_in_options_are_checked(concept: Concept):
    words = {"weapon": "gun", "harmless": ["cat", "dog"]}
    assert options(concept, "attention", words=words).words == {"weapon": ["gun"], "harmless": ["cat", "dog"]}
    assert options(concept, "attention").words == {}
    with pytest.raises(ConceptError, match=r"words.face: 'face' is not a label of the concept \(weapon, harmless\)"):
        options(concept, "attention", words={"face": "face"})
    with pytest.raises(ConceptError, match=r"attention: words: input should be a valid dictionary, but got 'gun'"):
        options(concept, "attention", words="gun")
    with pytest.raises(ConceptError) as caught:
        options(concept, "attention", words={"weapon": [3], "harmless": []}, min_scor=1)
    assert [line.partition("attention: ")[2].partition(",")[0] for line in str(caught.value).splitlines()] == [
        "words.weapon.0: input should be a valid string",
        "words.harmless: list should have at least 1 item after validation",
        "unknown option 'min_scor'. Did you mean 'min_score'? It takes words",
    ]


@pytest.mark.parametrize(("kind", "base"), [("proposers", Proposer), ("segmenters", Segmenter), ("judges", Judge)])
def test_every_registered_plugin_keeps_the_contract(kind: plugins.Kind, base: type):
    """Its own signatures are its base class's, and it says what it does."""
    for name in plugins.names(kind):
        plugin = plugins.load(kind, name)
        assert issubclass(plugin, base)
        assert not inspect.isabstract(plugin), name
        assert kind == "judges" or plugin.name == name
        for attribute, member in vars(base).items():
            if inspect.isroutine(member) and not attribute.startswith("_"):
                expected = inspect.signature(getattr(base, attribute)).parameters
                assert list(inspect.signature(getattr(plugin, attribute)).parameters) == list(expected), name
                assert inspect.getdoc(getattr(plugin, attribute))
        assert plugin.__doc__ != base.__doc__
        if kind == "judges" and plugin.Options.model_fields:
            assert plugin.settings is not Judge.settings, f"a figure made with {name} must state its options"
