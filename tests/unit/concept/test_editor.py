"""The JSON schema for editors takes what dagkit takes, and refuses wrong options where they stand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from dagkit import plugins
from dagkit.cli import command
from dagkit.concept import Concept, concept_names, concept_path, load_concept
from dagkit.concept.template import template
from dagkit.diagnosis import check_concept
from dagkit.errors import ConceptError, PluginError
from dagkit.judges import build_judge

MINE = """
from dagkit.concept import PluginOptions, Share
from dagkit.judges import Judge, Judgement

class RedOptions(PluginOptions):
    share: Share = 0.5
    "Share of red from which an image counts."

class RedJudge(Judge):
    Options = RedOptions

    def __init__(self, options):
        self.threshold = options.share

    @classmethod
    def from_concept(cls, concept=None, device="cpu", *, options=None):
        return cls(options or RedOptions())

    @property
    def settings(self):
        return {"share": self.threshold}

    def judge(self, images):
        return [Judgement(image.getpixel((0, 0))[0] / 255 >= self.threshold, 0.5) for image in images]

class OldJudge:
    pass
"""


def schema() -> dict[str, Any]:
    result = CliRunner().invoke(command, ["concept", "schema"], catch_exceptions=False)
    found = json.loads(result.output)
    Draft202012Validator.check_schema(found)
    return found


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(schema())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of somebody else's with a judge and with one that was written for another version."""
    (tmp_path / "red_judge.py").write_text(MINE)
    info = tmp_path / "red_judge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: red-judge\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dagkit.judges]\nred = red_judge:RedJudge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._external.cache_clear()
    yield "red"
    plugins._external.cache_clear()


def whole(**changed: Any) -> dict[str, Any]:
    return {**yaml.safe_load(concept_path("weapon").read_text()), **changed}


@pytest.mark.parametrize("name", concept_names())
def test_shipped_concepts_are_taken(name: str, validator: Draft202012Validator):
    validator.validate(yaml.safe_load(concept_path(name).read_text()))
    check_concept(load_concept(name))


def test_what_concept_new_writes_is_taken(validator: Draft202012Validator):
    text = template("spiders", "a spider, a tarantula")
    validator.validate(yaml.safe_load(text))
    assert f"one or several of: {', '.join(plugins.names('proposers'))}\n" in text


NUDENET = {"name": "nudenet", "classes": {"weapon": ["FACE_MALE", "FACE_FEMALE"]}}


@pytest.mark.parametrize(
    ("kind", "plugin", "is_right"),
    [
        ("proposers", "attention", True),
        ("proposers", ["attention", {"name": "grounding_dino", "phrases": {"weapon": "a gun"}}], True),
        ("proposers", NUDENET, True),
        ("proposers", {"name": "token", "token": "weapon@1.0.0"}, True),
        ("proposers", "token", False),
        ("proposers", [], False),
        ("proposers", "atention", False),
        ("proposers", {"name": "attention", "min_scor": 0.1}, False),
        ("proposers", {"name": "attention", "min_score": 1.1}, False),
        ("proposers", {"name": "attention", "words": {"weapon": []}}, False),
        ("proposers", {**NUDENET, "classes": {"weapon": "FACE"}}, False),
        ("segmenter", {"name": "sam", "model_type": "vit_b", "use_points": False}, True),
        ("segmenter", {"name": "sam", "model_type": "vit_x"}, False),
        ("segmenter", {"name": "sam", "use_points": "no"}, False),
        ("segmenter", {"name": "box", "checkpoint": "demo"}, False),
        ("judge", {"name": "clip", "present": "a gun", "objects": []}, True),
        ("judge", {"name": "clip", "present": []}, False),
        ("judge", {"name": "clip", "threshold": "0.5"}, False),
        ("judge", {"name": "nudenet", "threshold": 0.2}, False),
        ("judge", {"name": "combined", "judges": ["demo", {"name": "nudenet", "threshold": 0.3}], "rule": "all"}, True),
        ("judge", {"name": "combined", "judges": ["demo", {"name": "nudenet", "threshold": 3}]}, False),
        ("judge", {"name": "combined", "judges": ["demo"]}, False),
        ("judge", "combined", False),
    ],
)
def test_editor_and_concept_show_say_the_same(kind: str, plugin: Any, is_right: bool, validator: Draft202012Validator):
    assert validator.is_valid(whole(**{kind: plugin})) == is_right
    try:
        check_concept(Concept.model_validate(whole(**{kind: plugin})))
    except (ConceptError, PluginError, ValueError):
        assert not is_right
    else:
        assert is_right


def test_other_mistakes_of_a_file_are_seen(validator: Draft202012Validator):
    prompts = whole()["prompts"]
    for changed in (
        {"sumary": "x"},
        {"words": ["bomb", "bomb"]},
        {"prompts": {**prompts, "slots": {**prompts["slots"], "Not a slot": ["x"]}}},
        {"thresholds": {"edit": 40}},
    ):
        assert not validator.is_valid(whole(**changed))
        with pytest.raises(ValueError, match="validation error"):
            Concept.model_validate(whole(**changed))


def test_every_option_has_a_description():
    definitions = schema()["$defs"]
    for kind in ("proposer", "segmenter", "judge"):
        for name in plugins.names(f"{kind}s"):
            options = {
                key: value for key, value in definitions[f"{kind}_{name}"]["properties"].items() if key != "name"
            }
            assert all(option["description"] for option in options.values())
        assert definitions[f"{kind}s"]["discriminator"]["mapping"].keys() == set(plugins.names(f"{kind}s"))


def test_a_plugin_of_another_package_is_treated_alike(installed: str):
    validator = Draft202012Validator(schema())
    right, wrong = whole(judge={"name": installed, "share": 0.9}), whole(judge={"name": installed, "share": 9})
    assert validator.is_valid(right)
    assert not validator.is_valid(wrong)
    judge = build_judge(Concept.model_validate(right))
    assert (judge.settings, judge.threshold, judge.features) == ({"share": 0.9}, 0.9, None)
    with pytest.raises(ConceptError, match="judge red: share: input should be less than or equal to 1, but got 9"):
        check_concept(Concept.model_validate(wrong))


def test_a_plugin_of_another_version_is_named(installed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(plugins.BUILTIN["judges"], "old", "red_judge:OldJudge")
    with pytest.raises(
        ConceptError, match=r"judge 'old' \(red_judge:OldJudge\): expected a subclass of dagkit\.judges\.Judge"
    ):
        check_concept(Concept.model_validate(whole(judge="old")))
