from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from dagkit.concept import Plugin, load_concept
from dagkit.demo import world
from dagkit.errors import ConceptError, PluginError
from dagkit.judges import Judge, Judgement, build_judge
from dagkit.judges.combined import CombinedJudge


class _Fixed(Judge):
    concept_labels = ("thing",)

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        return [
            Judgement(score >= 0.5, score, {"thing": score, "cat": 1 - score}) for score in self.scores[: len(images)]
        ]


IMAGES = [Image.new("RGB", (8, 8))] * 3


def test_any_and_all() -> None:
    judges = {"a": _Fixed(0.9, 0.9, 0.1), "b": _Fixed(0.8, 0.2, 0.3)}
    for rule, present, scores in (
        ("any", [True, True, False], [0.9, 0.9, 0.3]),
        ("all", [True, False, False], [0.8, 0.2, 0.1]),
    ):
        said = CombinedJudge(judges, rule).judge(IMAGES)
        assert [one.is_present for one in said] == present
        assert [one.score for one in said] == scores
    assert said[1].labels == {"a/thing": 0.9, "b/thing": 0.2, "cat": 0.8}
    assert CombinedJudge(judges).concept_labels == ("a/thing", "b/thing")


def test_concept_file_builds_each_judge_with_its_own_options() -> None:
    pytest.importorskip("nudenet")
    plugin = Plugin.model_validate(
        {"name": "combined", "judges": ["demo", {"name": "nudenet", "threshold": 0.7}], "rule": "any"}
    )
    judge = build_judge(load_concept("weapon").model_copy(update={"judge": plugin}))
    assert judge.settings["nudenet"]["threshold"] == 0.7
    assert "demo/bomb" in judge.concept_labels
    scenes = [world.render_scene(np.random.default_rng(0), [name], "sand").image for name in ("cat", "bomb")]
    said = judge.judge([Image.fromarray(scene) for scene in scenes])
    assert [one.is_present for one in said] == [False, True]
    assert said[0].labels["cat"] > 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConceptError, "judge combined: the option judges is missing. Add it: Names, .*at least two"),
        ({"judges": ["demo"]}, ConceptError, "judges: list should have at least 2 items"),
        ({"judges": ["demo", "combined"]}, ConceptError, "judges: it cannot ask itself"),
        ({"judges": ["demo", {"name": "clip", "thresh": 1}]}, ConceptError, "judge clip: unknown option 'thresh'"),
        ({"judges": ["demo", "clip"], "rule": "most"}, ConceptError, "rule: expected one of any, all, but got 'most'"),
        ({"judges": ["demo", "nothing"]}, PluginError, "'nothing' is not a judge"),
        ({"judges": ["demo", "demo"]}, ConceptError, "at least two judges, but got 1"),
        ({"rules": "any"}, ConceptError, "unknown option 'rules'"),
    ],
)
def test_mistakes_are_named(options: dict, error: type[Exception], message: str) -> None:
    plugin = Plugin.model_validate({"name": "combined", **options})
    with pytest.raises(error, match=message):
        build_judge(load_concept("weapon").model_copy(update={"judge": plugin}))


def test_no_concept() -> None:
    with pytest.raises(ConceptError, match="it has no default"):
        CombinedJudge.from_concept()
