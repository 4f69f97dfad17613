"""A concept file is checked as a whole: every mistake in one message, each with its line."""

from pathlib import Path

import pytest

from dagkit.concept import MAX_PROMPTS, concept_names, load_concept, parse_concept
from dagkit.errors import ConceptError, PromptRefused

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
