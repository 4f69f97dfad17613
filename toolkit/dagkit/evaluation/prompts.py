"""Prompts that an evaluation draws, each with a seed of its own and with what must stay in the picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from dagkit.seeds import evaluation_seed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dagkit.concept import Concept, PromptKind

EvalKind = Literal["named", "hinted", "safe"]
KINDS: Final[tuple[EvalKind, ...]] = ("named", "hinted", "safe")
_SOURCE: Final[dict[EvalKind, PromptKind]] = {"named": "unsafe", "hinted": "hinted", "safe": "safe"}
MAX_PROMPTS: Final = 100_000
"""Prompts of each kind that have noise of their own."""


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """One prompt of an evaluation.

    Attributes:
        key: unique name, e.g. ``named-0003``; also the name of its images.
        text: what the model is asked for.
        kind: ``named`` (the concept is asked for by name), ``hinted`` (it is meant but not named) or ``safe``.
        seed: of the initial noise, the same for all columns.
        keep: what the prompt asks for besides the concept; empty where that is not known.
    """

    key: str
    text: str
    kind: EvalKind
    seed: int
    keep: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**asdict(self), "keep": list(self.keep)}


def concept_prompts(
    concept: Concept, num_prompts: int, *, num_safe: int | None = None, seed: int = 0
) -> list[EvalPrompt]:
    """The concept's own prompts: up to ``num_prompts`` of each kind that it has.

    They come from the part of its prompts that is kept for tests (`Concept.test_texts`), and their seeds are those of
    evaluations (`dagkit.seeds`): neither text nor noise was seen by candidates or by the optimisation. The texts of a
    kind that has too few to be divided were: see `describe_prompts`.

    Args:
        concept: where the templates are.
        num_prompts: of each kind, in [1, `MAX_PROMPTS`].
        num_safe: of safe ones, likewise; as many as of the others where None.
        seed: same seed, same prompts and same noise; in [0, 2**31).
    """
    counts = {"named": num_prompts, "hinted": num_prompts, "safe": num_prompts if num_safe is None else num_safe}
    for name, count in (("num_prompts", num_prompts), ("num_safe", counts["safe"])):
        if not 1 <= count <= MAX_PROMPTS:
            raise ValueError(f"{name} must be in [1, {MAX_PROMPTS:,}], but is {count}.")
    prompts: list[EvalPrompt] = []
    for offset, kind in enumerate(KINDS):
        if not getattr(concept.prompts, _SOURCE[kind]):
            continue
        drawn = concept.sample_prompts(_SOURCE[kind], counts[kind], seed=seed, split="test")
        prompts += [
            EvalPrompt(
                f"{kind}-{index:04d}",
                prompt.text,
                kind,
                evaluation_seed(seed, offset * MAX_PROMPTS + index),
                tuple(prompt.keep),
            )
            for index, prompt in enumerate(drawn)
        ]
    return prompts


def describe_prompts(concept: Concept, drawn: Iterable[str] = ()) -> str:
    """Where a concept's own prompts are from, in words: whether they are apart from those of its candidates.

    Args:
        concept: whose prompts `concept_prompts` draws.
        drawn: texts of candidates that are there; some of them may be older than the concept's file.
    """
    seen = set(drawn)
    shared = []
    for kind in KINDS:
        source = _SOURCE[kind]
        if getattr(concept.prompts, source):
            kept = concept.test_texts(source)
            if not kept or kept & seen:
                shared.append(kind)
    if not shared:
        return f"the concept's own, kept apart from those of its candidates ({concept.name})"
    return f"the concept's own ({concept.name}); candidates were drawn from the same {' and '.join(shared)} prompts"
