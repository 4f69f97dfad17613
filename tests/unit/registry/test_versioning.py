"""patch = another seed or settings, minor = other data, major = another base model or concept."""

from types import SimpleNamespace
from typing import Any

import pytest

from dagkit import load_concept
from dagkit.concept import Concept
from dagkit.registry import concept_definition, suggest_version
from dagkit.token import DatasetInfo, GuidelineToken
from small_tokens import small_token

CONCEPT = load_concept("weapon")


def token(version: str = "1.0.0") -> GuidelineToken:
    return small_token(
        version,
        safety_prompt=CONCEPT.safety_prompt,
        optimization={"concept_definition": concept_definition(CONCEPT), "seed": 0},
    )


def model(fingerprint: str | None = None) -> Any:
    return SimpleNamespace(fingerprint=fingerprint or token().record.base_model.fingerprint)


def changed(**fields: Any) -> Concept:
    return CONCEPT.model_copy(update=fields)


SAME = token().record.dataset
MORE = DatasetInfo(fingerprint="sha256:more", num_unsafe=60, num_safe=40)
LESS = DatasetInfo(fingerprint="sha256:less", num_unsafe=6, num_safe=4)


@pytest.mark.parametrize(
    ("base_model", "dataset", "concept", "expected"),
    [
        (model(), SAME, CONCEPT, ("1.2.1", "another seed or other settings than 1.2.0")),
        (model(), SAME, changed(initial_phrase="arms"), ("1.2.1", "another seed or other settings than 1.2.0")),
        (model(), MORE, CONCEPT, ("1.3.0", "more data than 1.2.0")),
        (model(), LESS, CONCEPT, ("1.3.0", "other data than 1.2.0")),
        (model("sha256:other"), MORE, CONCEPT, ("2.0.0", "another base model than 1.2.0")),
        (model(), SAME, changed(words=["a bomb"]), ("2.0.0", "another definition of the concept than 1.2.0")),
        (model(), MORE, changed(safety_prompt="arms"), ("2.0.0", "another definition of the concept than 1.2.0")),
    ],
)
def test_proposal(base_model: Any, dataset: DatasetInfo, concept: Concept, expected: tuple[str, str]):
    assert suggest_version([token("1.2.0"), token("1.1.9")], base_model, dataset, concept) == expected


def test_first_version():
    assert suggest_version([], model(), SAME, CONCEPT) == ("1.0.0", "the first version")


def test_tokens_without_a_recorded_definition_are_compared_by_safety_prompt():
    older = small_token(safety_prompt=CONCEPT.safety_prompt)

    assert suggest_version([older], model(), SAME, changed(words=["a bomb"]))[0] == "1.0.1"


def test_definition_is_labels_words_and_safety_prompt():
    labels = CONCEPT.labels.model_copy(update={"negative": ["toy"]})

    assert concept_definition(changed(summary="Another text.")) == concept_definition(CONCEPT)
    assert concept_definition(changed(labels=labels)) != concept_definition(CONCEPT)
