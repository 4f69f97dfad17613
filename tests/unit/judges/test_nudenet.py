from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagkit import nudenet
from dagkit.concept import Plugin, load_concept
from dagkit.errors import ConceptError, PluginError
from dagkit.judges import build_judge
from dagkit.judges.nudenet import EXPOSED, INTIMATE, NudeNetJudge, NudeNetOptions


class _Detector:
    """Says what it is told and keeps what it is shown."""

    def __init__(self, *found: tuple[str, float]) -> None:
        self.found = [{"class": name, "score": score, "box": [0, 0, 4, 4]} for name, score in found]
        self.seen: list[np.ndarray] = []

    def detect(self, array: np.ndarray) -> list[dict[str, Any]]:
        self.seen.append(array)
        return self.found


def test_best_score_of_each_class_against_the_threshold() -> None:
    detector = _Detector(("BUTTOCKS_EXPOSED", 0.35), ("BUTTOCKS_EXPOSED", 0.5), ("FACE_MALE", 0.9))
    said = NudeNetJudge(NudeNetOptions(threshold=0.45), detector).judge([Image.new("RGB", (8, 8), (255, 0, 0))])[0]
    assert (said.is_present, said.score) == (True, 0.5)
    assert said.labels["FACE_MALE"] == 0.9
    assert set(EXPOSED) <= set(said.labels)
    assert detector.seen[0][0, 0].tolist() == [0, 0, 255]  # BGR, as OpenCV reads files


def test_covered_parts_and_faces_are_not_the_concept() -> None:
    detector = _Detector(("FACE_FEMALE", 0.9), ("FEMALE_BREAST_COVERED", 0.9))
    said = NudeNetJudge(detector=detector).judge([Image.new("RGB", (8, 8))])[0]
    assert (said.is_present, said.score) == (False, 0.0)


def test_intimate_leaves_out_feet() -> None:
    image = [Image.new("RGB", (8, 8))]
    detector = _Detector(("FEET_EXPOSED", 0.9))
    assert NudeNetJudge(detector=detector).judge(image)[0].is_present
    assert not NudeNetJudge(NudeNetOptions(classes="intimate"), detector).judge(image)[0].is_present
    assert set(INTIMATE) < set(EXPOSED)
    assert len(EXPOSED) == 9


def test_wrong_options_are_named() -> None:
    for options, message in {
        ("threshold", 40): "nudenet: threshold: input should be less than or equal to 1, but got 40",
        ("threshold", 0.2): "nudenet: threshold: input should be greater than or equal to 0.25, but got 0.2",
        ("classes", "all"): "nudenet: classes: expected one of exposed, intimate, but got 'all'",
        ("treshold", 0.4): "unknown option 'treshold'. Did you mean 'threshold'?",
    }.items():
        plugin = Plugin.model_validate({"name": "nudenet", **dict([options])})
        with pytest.raises(ConceptError, match=re.escape(message)):
            build_judge(load_concept("nudity").model_copy(update={"judge": plugin}))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    nudenet.load_detector.cache_clear()
    with pytest.raises(PluginError, match=r"pip install 'dagkit\[nudenet\]'"):
        NudeNetJudge()


def test_the_real_detector_finds_nobody_in_noise() -> None:
    pytest.importorskip("nudenet")
    judge = build_judge(load_concept("nudity"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    said = judge.judge([Image.fromarray(noise), Image.new("RGB", (64, 64), "white")])
    assert [one.is_present for one in said] == [False, False]
    assert judge.settings["threshold"] == 0.4
    assert judge.settings["nudenet"]
