"""A concept file is checked as a whole: every mistake in one message, each with its line."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from dagkit.concept import MAX_PROMPTS, MIN_SPLIT, PROMPT_KINDS, Concept, concept_names, load_concept, parse_concept
from dagkit.concept.template import template
from dagkit.diagnosis import check_concept
from dagkit.errors import ConceptError, DagkitError, PromptRefused
from dagkit.evaluation import describe_prompts
from dagkit.segmenters import build_segmenter

GOOD = """\
name: gore
summary: Blood.
model: demo
labels: {positive: [blood]}
prompts:
  unsafe: ["a {thing} {place}", "two {thing} and {thing_2}"]
  safe: [a wall]
  slots: {thing: [cut, wound], place: [here, there]}
  keep: [place]
words: [blood]
initial_phrase: blood
safety_prompt: blood
"""


def mistakes(text: str) -> str:
    with pytest.raises(ConceptError) as error:
        parse_concept(text, source="gore.yaml")
    return str(error.value)


def test_shipped_concepts_load():
    assert concept_names() == ["nudity", "violence", "weapon"]
    for name in concept_names():
        assert load_concept(name).name == name


@pytest.mark.parametrize("name", ["nudity", "violence"])
def test_prompts_of_people_say_adult(name: str):
    concept = load_concept(name)
    prompts = [prompt.text for kind in ("unsafe", "hinted", "safe") for prompt in concept.all_prompts(kind)]
    people = [prompt for prompt in prompts if any(word in prompt.split() for word in ("man", "woman", "person"))]

    assert people
    assert [prompt for prompt in people if "adult" not in prompt] == []


def test_members_are_what_stands_for_the_concept():
    """Values of slots that hold one of its words, or that no safe prompt has; never of slots to be kept."""
    assert load_concept("weapon").members == ["bomb", "knife", "axe", "dynamite"]
    assert load_concept("violence").members == []  # person is in safe prompts as well, setting is kept
    assert parse_concept(GOOD, source="gore.yaml").members == ["cut", "wound"]
    shared = GOOD.replace("safe: [a wall]", 'safe: ["a {thing}"]')
    assert parse_concept(shared, source="gore.yaml").members == []
    named = shared.replace("words: [blood]", "words: [blood, Wound]")
    assert parse_concept(named, source="gore.yaml").members == ["cut", "wound"]


@pytest.mark.parametrize(
    ("prompt", "member"),
    [
        ("a cat and a Knife on sand", "knife"),
        ("a knife and a knife", "knife"),
        ("a knife and a bomb", None),
        ("a penknife and knives", None),
        ("a cat in danger", None),
    ],
)
def test_a_prompt_shows_the_one_member_that_it_names(prompt: str, member: str | None):
    assert load_concept("weapon").member_of(prompt) == member


def test_a_longer_member_is_not_taken_for_a_shorter_one():
    text = GOOD.replace("thing: [cut, wound]", "thing: [cut, paper cut]")
    concept = parse_concept(text, source="gore.yaml")
    assert [concept.member_of(prompt) for prompt in ("a paper cut here", "a cut here")] == ["paper cut", "cut"]
    assert concept.member_of("two cut and paper cut") is None


def test_templates_expand():
    concept = parse_concept(GOOD, source="gore.yaml")

    assert [prompt.text for prompt in concept.all_prompts("unsafe")] == [
        "a cut here",
        "a cut there",
        "a wound here",
        "a wound there",
        "two cut and wound",
        "two wound and cut",
    ]
    assert concept.all_prompts("unsafe")[0].keep == ["here"]
    assert concept.all_prompts("unsafe")[4].values == {"thing": "cut", "thing_2": "wound"}


def test_drawing_is_balanced_reproducible_and_split():
    concept = load_concept("weapon")
    train = concept.sample_prompts("unsafe", 40, seed=3, split="train")

    assert train == concept.sample_prompts("unsafe", 40, seed=3, split="train")
    assert train != concept.sample_prompts("unsafe", 40, seed=4, split="train")
    assert len({prompt.text for prompt in train}) == 40
    every_train = {prompt.text for prompt in concept.sample_prompts("unsafe", 5000, split="train")}
    every_test = {prompt.text for prompt in concept.sample_prompts("unsafe", 5000, split="test")}
    assert every_train.isdisjoint(every_test)
    assert 0.1 < len(every_test) / len(every_train | every_test) < 0.3


def test_more_prompts_than_there_are_repeat():
    concept = parse_concept(GOOD, source="gore.yaml")

    assert [prompt.text for prompt in concept.sample_prompts("safe", 3, split="test")] == ["a wall"] * 3
    with pytest.raises(ConceptError, match="'gore' has no hinted prompts"):
        concept.sample_prompts("hinted", 1)


def test_three_mistakes_come_at_once():
    text = GOOD.replace("summary:", "sumary:").replace("model: demo", "model: 7") + "thresholds:\n  highlight: 40\n"

    message = mistakes(text)
    assert message.splitlines()[0] == "gore.yaml: 4 mistakes:"
    assert "line 14: thresholds.highlight: input should be less than or equal to 1, but got 40. Write 0.4." in message
    assert "line 2: sumary: unknown key. Did you mean 'summary'?" in message
    assert "summary: missing." in message
    assert "line 3: model: input should be a valid string, but got 7." in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "{positive: [blood]}",
            "{positive: [blood], negative: [blood]}",
            "blood cannot be positive and negative at once",
        ),
        (
            "a {thing} {place}",
            "a {thong}",
            "uses the slot 'thong', which prompts.slots does not list. Did you mean 'thing'?",
        ),
        ("a {thing} {place}", "a {thing", "holds a brace that is no slot"),
        ("keep: [place]", "keep: [spot]", "prompts.keep: 'spot' is not one of the slots (thing, place)"),
        ("name: gore", "name: Gore!", "line 1: name: expected lower-case letters"),
        (
            "labels: {positive: [blood]}",
            "labels: &a {positive: [blood]}\nthresholds: *a",
            "aliases (*name) are not allowed",
        ),
        ("words: [blood]", "words: [blood", "not valid YAML"),
        (GOOD, "- a list", "expected 'key: value' lines, but got list"),
        (GOOD, "!!python/object/apply:os.system [id]", "not valid YAML"),
    ],
)
def test_mistake(old: str, new: str, expected: str):
    assert expected in mistakes(GOOD.replace(old, new))


def test_template_that_explodes_is_refused():
    values = ", ".join(f"v{index}" for index in range(400))
    text = GOOD.replace("[cut, wound]", f"[{values}]")

    assert f"makes 160,000 prompts, but at most {MAX_PROMPTS:,} are allowed" in mistakes(text)


def test_prompts_that_sexualise_minors_are_refused():
    with pytest.raises(PromptRefused, match=r"^gore\.yaml: this prompt is refused"):
        parse_concept(GOOD.replace("[cut, wound]", "[nude child]"), source="gore.yaml")


def test_unknown_concept_suggests_a_near_one():
    with pytest.raises(ConceptError, match=r"'wepon' is not a concept\. Did you mean 'weapon'\? Available: nudity, "):
        load_concept("wepon")
    with pytest.raises(ConceptError, match=r"nowhere\.yaml: no such concept file"):
        load_concept("nowhere.yaml")


def test_file_that_is_too_large_or_no_text(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConceptError, match=r"expected at most 1,000,000 bytes, but got 1,000,001"):
        load_concept(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConceptError, match="expected UTF-8 text"):
        load_concept(tmp_path / "b.yaml")


def concept_of(*places: str) -> Concept:
    text = GOOD.replace("[cut, wound]", "[cut]").replace(', "two {thing} and {thing_2}"', "")
    return parse_concept(text.replace("here, there", ", ".join(places)), source="gore.yaml")


def test_few_prompts_are_not_divided_and_more_are():
    few, enough = (concept_of(*(f"p{number}" for number in range(count))) for count in (MIN_SPLIT - 1, MIN_SPLIT))
    assert few.test_texts("unsafe") == frozenset()
    assert 0 < len(enough.test_texts("unsafe")) < MIN_SPLIT
    for split in ("train", "test"):
        assert len({prompt.text for prompt in few.sample_prompts("unsafe", 500, split=split)}) == MIN_SPLIT - 1
    train, test = (
        {prompt.text for prompt in enough.sample_prompts("unsafe", 500, split=split)} for split in ("train", "test")
    )
    assert test == enough.test_texts("unsafe")
    assert train | test == {prompt.text for prompt in enough.all_prompts("unsafe")}
    assert not train & test


@pytest.mark.parametrize("is_test", [True, False])
def test_no_part_of_the_split_is_empty(is_test: bool):
    """Whatever side the hashes of all texts are on."""
    places = (f"p{number}" for number in range(1000))
    chosen = [place for place in places if (sha256(f"a cut {place}".encode()).digest()[0] < 51) == is_test]
    concept = concept_of(*chosen[:MIN_SPLIT])
    assert len(concept.test_texts("unsafe")) == (MIN_SPLIT - 1 if is_test else 1)
    for split in ("train", "test"):
        assert len(concept.sample_prompts("unsafe", 50, split=split)) == 50


def test_what_is_said_of_the_split_is_true():
    concept = load_concept("weapon")
    apart = "the concept's own, kept apart from those of its candidates (weapon)"
    assert describe_prompts(concept) == apart
    train = [prompt.text for kind in PROMPT_KINDS for prompt in concept.sample_prompts(kind, 300, split="train")]
    assert describe_prompts(concept, train) == apart
    older = next(iter(concept.test_texts("hinted")))  # drawn when the concept had fewer prompts
    expected = "the concept's own (weapon); candidates were drawn from the same hinted prompts"
    assert describe_prompts(concept, [*train, older]) == expected
    few = concept_of("here", "there")
    expected = "the concept's own (gore); candidates were drawn from the same named and safe prompts"
    assert describe_prompts(few) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("null", None),
        ("yes", None),
        ("a-b_c9", None),
        ("spiders", "a spider"),
        ("spiders", "spider, 'tarantula'"),
        ("spiders", "a: b # c"),
        ("spiders", "[x"),
        ("spiders", '"quoted" \\ back'),
        ("spiders", "2020-01-01"),
        ("spiders", "araignée 🕷"),
        ("spiders", "two\nlines"),
        ("spiders", "x" * 300),
    ],
)
def test_what_concept_new_writes_is_taken_by_all_that_it_names(name: str, words: str | None):
    concept = parse_concept(template(name, words or name), source=name)
    assert concept.name == name
    assert concept.safety_prompt == " ".join((words or name).split())
    assert concept.words == [word.strip() for word in concept.safety_prompt.split(",")]
    check_concept(concept)
    assert describe_prompts(concept).startswith("the concept's own, kept apart")


@pytest.mark.parametrize(
    ("kind", "plugin", "expected"),
    [
        (
            "judge",
            {"name": "clip", "positive": "a"},
            "judge clip: unknown option 'positive'. It takes checkpoint",
        ),
        ("judge", {"name": "clip", "threshold": "high"}, "judge clip: threshold: input should be a valid number"),
        (
            "judge",
            {"name": "clip", "threshold": True},
            "judge clip: threshold: expected a number, but got true. Write a number.",
        ),
        ("judge", {"name": "clip", "present": []}, "judge clip: present: list should have at least 1 item"),
        ("judge", {"name": "clip", "present": "a photo of x"}, None),
        ("judge", {"name": "clip", "absent": [1]}, "judge clip: absent.0: input should be a valid string"),
        ("judge", {"name": "clip", "checkpoint": 7}, "judge clip: checkpoint: input should be a valid string"),
        (
            "judge",
            {"name": "demo", "threshold": 0.3},
            "judge demo: unknown option 'threshold'. It takes present, absent",
        ),
        (
            "judge",
            {"name": "demo", "present": ["cat", "dgo"]},
            "judge demo: present.1: 'dgo' is no object of the bundled",
        ),
        ("judge", {"name": "demo", "present": "cat", "absent": ["cat"]}, "judge demo: absent: 'cat' is present, too"),
        ("judge", {"name": "demo", "present": "cat", "absent": ["dog"]}, None),
        ("judge", {"name": "nudenet", "threshold": [1]}, "judge nudenet: threshold: input should be a valid number"),
        ("judge", {"name": "safety_checker", "checkpoint": {}}, "judge safety_checker: checkpoint: input should be"),
        ("judge", {"name": "combined", "judges": 5}, "judge combined: judges: input should be a valid list"),
        ("judge", {"name": "combined", "judges": ["demo", {}]}, "judge combined: judges.1.name: field required"),
        ("judge", {"name": "clap"}, "'clap' is not a judge. Did you mean 'clip'?"),
        ("judge", {"name": "clip", "k" * 5000: 1}, "judge clip: unknown option 'kkk"),
        (
            "segmenter",
            {"name": "sam", "modeltype": "vit_b"},
            "segmenter sam: unknown option 'modeltype'. Did you mean 'model_type'?",
        ),
        ("segmenter", {"name": "sma"}, "'sma' is not a segmenter. Did you mean 'sam'?"),
        (
            "proposers",
            [{"name": "attention", "min_scor": 1}],
            "proposer attention: unknown option 'min_scor'. Did you mean 'min_score'?",
        ),
        ("proposers", [{"name": "attention", "words": {"weapn": "gun"}}], "words.weapn: 'weapn' is not a label of the"),
        ("proposers", ["attention", "nudnet"], "'nudnet' is not a proposer. Did you mean 'nudenet'?"),
    ],
)
def test_plugins_and_options_are_checked_before_they_are_used(kind: str, plugin: Any, expected: str | None):
    concept = Concept.model_validate({**load_concept("weapon").model_dump(), kind: plugin})
    if expected is None:
        check_concept(concept)
        return
    with pytest.raises(ConceptError) as caught:
        check_concept(concept)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"model_type": ["vit_b"]},
            "sam: model_type: expected one of vit_b, vit_l, vit_h, vit_tiny, but got ['vit_b']",
        ),
        ({"model_type": "v" * 5000}, "sam: model_type: expected one of vit_b, vit_l"),
        ({"checkpoint": 7}, "sam: checkpoint: input should be a valid string"),
        ({"checkpoint": "x" * 5000}, "sam: checkpoint: string should have at most 1000 characters"),
        ({"checkpoint": "a\0b"}, "no such SAM checkpoint"),
        ({"use_points": "no"}, "sam: use_points: input should be a valid boolean, but got 'no'"),
    ],
)
def test_wrong_values_of_a_segmenter_are_named(options: dict[str, Any], expected: str):
    given = {"name": "sam", "model_type": "vit_tiny", **options}
    concept = Concept.model_validate({**load_concept("weapon").model_dump(), "segmenter": given})
    with pytest.raises(DagkitError) as caught:
        build_segmenter(concept)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 800
