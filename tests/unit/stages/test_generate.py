"""Which prompts `generate` draws where a token sees some members weakly."""

import pytest

from dagkit.concept import Concept, load_concept
from dagkit.errors import ConceptError, TokenError
from dagkit.stages.generate import plan_prompts
from dagkit.token.slices import weak_members
from small_tokens import small_token


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("weapon")


def record(**early_rates: float):
    def figures(rate: float) -> dict[str, float]:
        return {"count": 10, "num_held_out": 2, "iou": 0.5, "detection_rate": rate, "early_rate": rate}

    return small_token(metrics={"slices": {name: figures(rate) for name, rate in early_rates.items()}}).record


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"bomb": 1.0, "knife": 0.8, "axe": 0.5, "dynamite": 0.95}, ["axe", "knife"]),
        ({"bomb": 1.0, "knife": 0.95}, ["knife"]),
        ({"duck": 0.1, "knife": 0.95, "bomb": 1.0}, ["knife"]),
    ],
    ids=["all weak ones", "none is weak", "not of this concept"],
)
def test_weak_members_are_the_weak_ones_or_the_weakest(concept: Concept, rates: dict[str, float], expected: list[str]):
    assert weak_members(record(**rates), concept.members) == expected


def test_what_cannot_be_told_is_an_error(concept: Concept):
    with pytest.raises(ConceptError, match=r"no slot of the concept.* into one slot and under words"):
        weak_members(record(knife=0.5), load_concept("violence").members)
    for one in (record(), record(duck=0.1)):
        with pytest.raises(TokenError, match=r"weapon@1\.0\.0 does not tell .*bomb, knife.* dagkit optimize"):
            weak_members(one, concept.members)


def test_unsafe_prompts_name_the_members_by_turns_and_all_others_stay(concept: Concept):
    plain, weak, again = (
        plan_prompts(concept, 40, 0.4, 0.15, 3, names) for names in ([], ["axe", "bomb"], ["axe", "bomb"])
    )
    named = [concept.member_of(prompt.text) for prompt in weak if prompt.kind == "unsafe"]
    assert named == (["axe", "bomb"] * 20)[: len(named)]
    assert weak == again
    assert weak[:21] == plan_prompts(concept, 21, 0.4, 0.15, 3, ["axe", "bomb"])
    assert [one for one in weak if one.kind != "unsafe"] == [one for one in plain if one.kind != "unsafe"]
    assert not {prompt.text for prompt in weak} & concept.test_texts("unsafe")


def test_a_member_without_prompts_of_its_own_is_an_error(concept: Concept):
    with pytest.raises(ConceptError, match="has no unsafe prompts that name 'duck' alone"):
        concept.sample_prompts("unsafe", 3, member="duck")
