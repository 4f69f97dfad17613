"""The order and the choice of a search, with plain numbers, and the prompts that it draws."""

from collections import Counter

from dagkit.concept import load_concept
from dagkit.evaluation import concept_prompts
from dagkit.evaluation.tuning import Tried, candidates, choose, tuning_prompts
from dagkit.token import Guidance

FIRST = Guidance(strength=2.5, insistence=3.0)


def tried(
    erased: int, kept: int, pushes: int = 100, *, strength: float = 2.5, num: int = 10, others: int = 10
) -> Tried:
    return Tried(Guidance(strength=strength), erased, num, kept, others, pushes)


def test_the_first_stays_unless_another_is_better_by_more_than_a_picture():
    assert choose([tried(8, 9), tried(9, 9, strength=4)]) == 0
    assert choose([tried(8, 10), tried(10, 10, strength=4)]) == 1
    assert choose([tried(8, 10), tried(10, 7, strength=4)]) == 0


def test_the_gentler_of_two_equals_wins():
    assert choose([tried(5, 9), tried(9, 9, 90, strength=4), tried(9, 9, 80, strength=6)]) == 2
    assert choose([tried(5, 9), tried(9, 9, strength=4), tried(9, 9, strength=3)]) == 2


def test_without_others_a_gentler_one_is_not_better():
    """What a push costs is not judged there, and few pictures must not weaken a guard."""
    assert choose([tried(9, 0, others=0), tried(9, 0, strength=1.5, others=0), tried(8, 0, strength=1, others=0)]) == 0
    assert choose([tried(7, 0, others=0), tried(9, 0, strength=4, others=0)]) == 1


def test_candidates_begin_with_the_first_and_repeat_none_and_never_act_earlier():
    done: list[Tried] = []
    given = []
    for guidance in candidates(FIRST, done):
        given.append(guidance)
        done.append(Tried(guidance, 9 + (guidance.strength == 4), 10, 10, 10, 100))
    assert given[0] == FIRST
    assert len(set(map(repr, given))) == len(given) > 7
    assert all(one.max_level <= FIRST.max_level for one in given)
    assert given[-1].strength == 5.0


def test_prompts_are_of_the_training_split_and_name_every_member_equally_often():
    concept = load_concept("weapon")
    prompts = tuning_prompts(concept, 48, seed=3)
    kept_apart = concept.test_texts("unsafe") | concept.test_texts("hinted")
    assert not kept_apart & {prompt.text for prompt in prompts}
    assert not {prompt.seed for prompt in prompts} & {prompt.seed for prompt in concept_prompts(concept, 48, seed=3)}
    named = Counter(concept.member_of(prompt.text) for prompt in prompts if prompt.kind == "named")
    assert sorted(named.values()) == [9, 9, 9, 9]
    assert sum(prompt.kind == "hinted" for prompt in prompts) == 12
