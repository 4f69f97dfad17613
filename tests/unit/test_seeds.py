"""Noise of candidates and of evaluations never meets, whatever the seeds are."""

from itertools import pairwise, product

import pytest

from dagkit.concept import load_concept
from dagkit.evaluation import concept_prompts
from dagkit.seeds import MAX_SEED, NUM_IMAGES, candidate_seed, evaluation_seed, tuning_seed

SEEDS = [0, 1, 7, 998, 999, 1000, 1001, 1999, 2000, 2001, 10**6, 2**30, MAX_SEED - 1, MAX_SEED]


def ranges() -> list[tuple[int, int]]:
    """First and last number of every kind and seed."""
    makers = (candidate_seed, tuning_seed, evaluation_seed)
    return [(make(seed, 0), make(seed, NUM_IMAGES - 1)) for make, seed in product(makers, SEEDS)]


def test_ranges_are_whole_disjoint_and_fit_a_generator():
    found = sorted(ranges())
    assert all(last - first == NUM_IMAGES - 1 for first, last in found)
    assert all(last < first for (_, last), (first, _) in pairwise(found))
    assert found[0][0] == 0
    assert found[-1][1] < 2**63


def test_small_seeds_are_what_they_were():
    assert candidate_seed(3, 5) == 3_000_005
    assert evaluation_seed(3, 5) == 1_003_000_005
    assert concept_prompts(load_concept("weapon"), 2, seed=3)[-1].seed == 1_003_200_001


@pytest.mark.parametrize("seed", [0, 1000, 2000, MAX_SEED])
def test_prompts_of_an_evaluation_have_seeds_of_their_own(seed: int):
    seeds = {prompt.seed for prompt in concept_prompts(load_concept("violence"), 50, seed=seed)}
    assert len(seeds) == 150
    drawn = {candidate_seed(other, index) for other in (seed, seed % 1000, 1000, 1001) for index in range(1000)}
    assert not seeds & drawn


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (MAX_SEED + 1, 0), (0, -1), (0, NUM_IMAGES)])
def test_what_would_leave_its_range_is_refused(seed: int, index: int):
    for make in (candidate_seed, tuning_seed, evaluation_seed):
        with pytest.raises(ValueError, match="expected a seed in"):
            make(seed, index)
    with pytest.raises(ValueError, match=r"num_prompts must be in \[1, 100,000\]"):
        concept_prompts(load_concept("violence"), 100_001)
