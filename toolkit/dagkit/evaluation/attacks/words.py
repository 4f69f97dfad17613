"""Black-box attacks: they see pictures only, and send prompts and seeds as any user can."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

from dagkit.demo import unknown_words
from dagkit.errors import ConceptError, PromptRefused
from dagkit.evaluation.attacks.defence import Target, Trail
from dagkit.refusal import refuse_sexualised_minors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dagkit.concept import Concept
    from dagkit.evaluation.attacks.defence import Defence
    from dagkit.models import BaseModel

MAX_VOCABULARY: Final = 1000
"""Whole words of a tokenizer up to which all of them are used; of more, few queries would find the right ones."""

SALAD_SHARE: Final = 0.3
"""Share of the queries that are random word salads, before the climb begins."""

MAX_WORDS: Final = 12
"""Words of a prompt at most."""

_MAX_TRIES: Final = 50
"""Candidates in a row that may be refused or known already, before a climb gives up."""


def vocabulary(base_model: BaseModel, concept: Concept) -> list[str]:
    """Words that a black-box attack may use: those of a small tokenizer, else those of the concept's file.

    Raises:
        ConceptError: there are none.
    """
    tokenizer = getattr(base_model.pipe, "tokenizer", None)
    known = [] if tokenizer is None else sorted(tokenizer.get_vocab())
    whole = [token.removesuffix("</w>") for token in known if token.endswith("</w>")]
    words = [word for word in whole if word.isalpha() and not unknown_words(tokenizer, word)]
    if not 0 < len(words) <= MAX_VOCABULARY:
        kinds: tuple[Any, ...] = ("unsafe", "hinted", "safe")
        texts = [prompt.text for kind in kinds for prompt in concept.all_prompts(kind)]
        words = sorted({word for text in [*texts, *concept.context] for word in split(text)})
    if not words:
        raise ConceptError(f"concept {concept.name!r} has no words to attack with. Name some: --words FILE.")
    return words


def split(text: str) -> list[str]:
    """The words of a prompt, without its punctuation."""
    return [word for word in (part.strip(".,;:!?()\"'") for part in text.split()) if word]


def repeat(
    defence: Defence,
    targets: Sequence[Target],
    *,
    num_queries: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Trail]:
    """Asks again and again for the same, each time from other noise: what patience alone achieves.

    Arguments and errors as of `climb`.
    """
    trails = [Trail(target) for target in targets]
    for number in range(num_queries):
        going = [one for one in trails if not one.is_over]
        _ask(defence, going, [Target(one.target.prompt, one.target.seed + number) for one in going])
        progress(number + 1, num_queries)
    return trails


def climb(
    defence: Defence,
    targets: Sequence[Target],
    words: Sequence[str],
    *,
    num_queries: int,
    seed: int = 0,
    context: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Trail]:
    """Word salads, then hill climbing: one word changed at a time, kept where the value falls no lower.

    A climb ends when a picture got through the guard and everything behind it.

    All pictures of a target begin with the same noise. Candidates that sexualise minors are not drawn, and counted.

    Args:
        defence: answers.
        targets: where to start; a climb each.
        words: to make prompts of.
        num_queries: pictures a target at most, the unchanged prompt's included; >= 1.
        seed: of the choices.
        context: what the images are for, for the check of the prompts.
        progress: told the query and the number of queries.

    Raises:
        PromptRefused: a target's own prompt sexualises minors; nothing was drawn.
    """
    for target in targets:
        refuse_sexualised_minors(target.prompt, context)
    trails = [Trail(target) for target in targets]
    choices = [random.Random(f"{seed}-{number}") for number in range(len(targets))]  # noqa: S311 - no secret
    for number in range(num_queries):
        asked: list[tuple[Trail, Target]] = []
        for trail, rng in zip(trails, choices, strict=True):
            if trail.is_over:
                continue
            prompt = _candidate(trail, words, rng, num_queries, context)
            if prompt is not None:
                asked.append((trail, Target(prompt, trail.target.seed)))
        _ask(defence, [trail for trail, _ in asked], [target for _, target in asked])
        progress(number + 1, num_queries)
    return trails


def _ask(defence: Defence, trails: Sequence[Trail], targets: Sequence[Target]) -> None:
    if targets:
        for trail, query in zip(trails, defence.ask(targets), strict=True):
            trail.queries.append(query)


def _candidate(
    trail: Trail, words: Sequence[str], rng: random.Random, num_queries: int, context: Sequence[str]
) -> str | None:
    """The next prompt of a climb that was not asked yet; None where there is none."""
    if not trail.queries:
        return trail.target.prompt
    known = {one.prompt for one in trail.queries}
    is_salad = len(trail.queries) < SALAD_SHARE * num_queries
    for _ in range(_MAX_TRIES):
        made = _salad(words, rng) if is_salad else _changed(split(trail.best.prompt), words, rng)
        prompt = " ".join(made)
        if prompt in known:
            continue
        try:
            refuse_sexualised_minors(prompt, context)
        except PromptRefused:
            trail.num_refused += 1
            continue
        return prompt
    return None


def _salad(words: Sequence[str], rng: random.Random) -> list[str]:
    return [rng.choice(words) for _ in range(rng.randint(3, MAX_WORDS))]


def _changed(prompt: list[str], words: Sequence[str], rng: random.Random) -> list[str]:
    """One word replaced, inserted or taken out, or two exchanged."""
    made = list(prompt)
    place, how = rng.randrange(len(made)), rng.random()
    if how < 0.5:
        made[place] = rng.choice(words)
    elif how < 0.75 and len(made) < MAX_WORDS:
        made.insert(place, rng.choice(words))
    elif how < 0.9 and len(made) > 1:
        del made[place]
    else:
        other = rng.randrange(len(made))
        made[place], made[other] = made[other], made[place]
    return made
