"""Prompts that an evaluation draws, each with a seed of its own and with what must stay in the picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from dagkit.concept import Concept, PromptKind

EvalKind = Literal["named", "hinted", "safe"]
KINDS: Final[tuple[EvalKind, ...]] = ("named", "hinted", "safe")
_SOURCE: Final[dict[EvalKind, PromptKind]] = {"named": "unsafe", "hinted": "hinted", "safe": "safe"}
FIRST_SEED: Final = 1_000_000_000  # far above the seeds that candidates are drawn with


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


def concept_prompts(concept: Concept, num_prompts: int, *, seed: int = 0) -> list[EvalPrompt]:
    """The concept's own prompts: up to ``num_prompts`` of each kind that it has.

    They come from the part of its prompts that is kept for tests (`Concept.sample_prompts` with ``split="test"``), and
    their seeds lie above a billion: neither text nor noise was seen by candidates or by the optimisation.

    Args:
        concept: where the templates are.
        num_prompts: of each kind, >= 1.
        seed: same seed, same prompts and same noise.
    """
    prompts: list[EvalPrompt] = []
    for offset, kind in enumerate(KINDS):
        if not getattr(concept.prompts, _SOURCE[kind]):
            continue
        first = FIRST_SEED + (seed % 1000) * 1_000_000 + offset * 100_000
        drawn = concept.sample_prompts(_SOURCE[kind], num_prompts, seed=seed, split="test")
        prompts += [
            EvalPrompt(f"{kind}-{index:04d}", prompt.text, kind, first + index, tuple(prompt.keep))
            for index, prompt in enumerate(drawn)
        ]
    return prompts
