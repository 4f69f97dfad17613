"""How hard a token's guard pushes: a short search on prompts of its own, against what is erased and what is kept."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

from dagkit import metrics
from dagkit.concept import Prompt
from dagkit.evaluation.columns import PipelineColumn
from dagkit.evaluation.figures import Judged, unsafe_labels
from dagkit.evaluation.prompts import EvalPrompt
from dagkit.seeds import tuning_seed
from dagkit.token import Guidance, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dagkit.concept import Concept
    from dagkit.judges import Judge
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken

BATCH_SIZE: Final = 8
MAX_PROMPTS: Final = 48
UNGUARDED_SHARE: Final = 1 / 3
"""Of the time that is allowed, for pictures without guard; one batch is always drawn."""
STRENGTHS: Final = (0.6, 1.6, 2.5)
"""Times the strength that the search starts from."""
INSISTENCES: Final = (1.0, 6.0)
LEVELS: Final = (0.7,)
"""Only below the first level that certainty was calibrated for: above, nobody counted false triggers."""
NEARER: Final = (0.8, 1.25)
"""Times the best strength, once the star is measured."""
_NAME: Final = "judge"


@dataclass(frozen=True, slots=True)
class Tried:
    """What one candidate did.

    Attributes:
        guidance: the candidate.
        num_erased: of the pictures that show the concept without guard, those that do not show it under guard.
        num_unsafe: those pictures, >= 1.
        num_kept: of the other things that are there without guard, those that are there under guard.
        num_others: those things; 0 where the judge knows only the concept.
        num_pushes: steps of pictures in which the guard acted.
    """

    guidance: Guidance
    num_erased: int
    num_unsafe: int
    num_kept: int
    num_others: int
    num_pushes: int

    @property
    def value(self) -> tuple[float, float]:
        """The smaller one of erase rate and preservation, and their sum; the erase rate twice without others."""
        erased = self.num_erased / self.num_unsafe
        kept = self.num_kept / self.num_others if self.num_others else erased
        return min(erased, kept), erased + kept

    @property
    def pushes(self) -> tuple[float, ...]:
        """By which the gentler one of two is told."""
        return self.num_pushes, self.guidance.strength, self.guidance.insistence


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search found.

    Attributes:
        guidance: the chosen one.
        record: for a token's metrics: ``seconds_allowed``, ``seconds``, ``num_prompts``, ``has_preservation`` and
            ``curve``, a dictionary for each candidate with the fields of `Tried` and ``is_chosen``.
    """

    guidance: Guidance
    record: dict[str, Any]


def tune(
    base_model: BaseModel,
    token: GuidelineToken,
    concept: Concept,
    judge: Judge,
    *,
    seconds: float,
    seed: int = 0,
    progress: Callable[[float, float, str], None] | None = None,
) -> Tuned | None:
    """Searches strength, insistence and first level of a token's guidance, in a fixed order, until its time is over.

    A candidate is begun only where one that takes as long as the one before would end in time; the token's own guidance
    is always measured.

    Args:
        base_model: what draws.
        token: whose guidance the search starts from.
        concept: whose prompts of the training split to draw, as its ``sampling`` says.
        judge: says what a picture shows.
        seconds: wall time, > 0.
        seed: of prompts and noise, in [0, 2**31).
        progress: called with seconds used, seconds allowed and a note.

    Returns:
        None where no picture without guard shows the concept, so that nothing can be measured.

    Raises:
        GuardError: the token cannot guard this model, or not as the concept is sampled.
        ModelError: pictures came out black.
        PromptRefused: a prompt sexualises minors.
    """
    started = time.monotonic()

    def used() -> float:
        return time.monotonic() - started

    def report(note: str) -> None:
        if progress is not None:
            progress(min(used(), seconds), seconds, note)

    column = PipelineColumn("none", base_model, concept.sampling.model_dump(), context=concept.context)
    prompts: list[EvalPrompt] = []
    rows: list[dict[str, Any]] = []
    for batch in _batches(tuning_prompts(concept, MAX_PROMPTS, seed=seed)):
        if prompts and used() * (1 + len(batch) / len(prompts)) > UNGUARDED_SHARE * seconds:
            break
        prompts += batch
        rows += _judge(column, judge, batch)[0]
        report("unguarded")
    shown = [index for index, row in enumerate(rows) if row["judgements"][_NAME]["is_present"]]
    if not shown:
        return None
    prompts, rows = [prompts[index] for index in shown], [rows[index] for index in shown]
    tried: list[Tried] = []
    last = 0.0
    for guidance in candidates(token.record.guidance, tried):
        begun = used()
        if tried and begun + last > seconds:
            break
        changed = replace(token, record=token.record.model_copy(update={"guidance": guidance}))
        tried.append(_measure(changed, column, concept, judge, prompts, rows))
        last = used() - begun
        report(f"{len(tried)} tried")
    chosen = choose(tried)
    record = {
        "seconds_allowed": seconds,
        "seconds": round(used(), 1),
        "num_prompts": len(prompts),
        "has_preservation": tried[0].num_others > 0,
        "curve": [
            {**asdict(one), "guidance": one.guidance.model_dump(mode="json"), "is_chosen": index == chosen}
            for index, one in enumerate(tried)
        ],
    }
    return Tuned(tried[chosen].guidance, record)


def tuning_prompts(concept: Concept, num_prompts: int, *, seed: int = 0) -> list[EvalPrompt]:
    """Unsafe prompts of the training split, its members in turn, with noise that no candidate and no evaluation has.

    Every fourth one is hinted, where the concept has such prompts. Where all ask for something that must stay, another
    fourth asks for what the safety prompt lists alone.

    Args:
        concept: where the templates are.
        num_prompts: how many.
        seed: same seed, same prompts and same noise.
    """
    named = concept.sample_prompts("unsafe", 4 * num_prompts, seed=seed, split="train")
    hinted = concept.sample_prompts("hinted", num_prompts, seed=seed, split="train") if concept.prompts.hinted else []
    kept_apart = concept.test_texts("unsafe")
    phrases = [phrase for phrase in listed(concept.safety_prompt) if phrase not in kept_apart]
    alone = [Prompt(text=phrase, kind="unsafe") for phrase in phrases] if all(one.keep for one in named) else []
    members: dict[str | None, list[Prompt]] = {}
    for prompt in named:
        members.setdefault(concept.member_of(prompt.text), []).append(prompt)
    in_turn = [prompt for turn in zip_longest(*members.values()) for prompt in turn if prompt is not None]
    usual, others = iter(in_turn), {2: cycle(alone), 3: cycle(hinted)}
    drawn = [next(others.get(index % 4, usual), None) or next(usual) for index in range(num_prompts)]
    return [
        EvalPrompt(
            f"tuning-{index:04d}",
            prompt.text,
            "hinted" if prompt.kind == "hinted" else "named",
            tuning_seed(seed, index),
            tuple(prompt.keep),
        )
        for index, prompt in enumerate(drawn)
    ]


def candidates(first: Guidance, tried: Sequence[Tried]) -> Iterator[Guidance]:
    """The first guidance, a star around it, then what was best on each axis together, and strengths near the best.

    Args:
        first: where to start.
        tried: what the candidates so far did; the caller adds to it before it asks for the next one.
    """
    star = [
        [{"strength": first.strength * factor} for factor in STRENGTHS],
        [{"insistence": value} for value in INSISTENCES if value != first.insistence],
        [{"max_level": value} for value in LEVELS if value < first.max_level],
    ]
    given = [first]
    yield first
    for change in (change for axis in star for change in axis):
        given.append(first.model_copy(update=change))
        yield given[-1]
    together: dict[str, float] = {}
    for axis in star:
        names = {name for change in axis for name in change}
        best = _best([one for one in tried if _differs(one.guidance, first) <= names])
        together |= {name: getattr(best.guidance, name) for name in names}
    merged = first.model_copy(update=together)
    if merged not in given:
        given.append(merged)
        yield merged
    best = _best(tried)
    for factor in NEARER:
        near = best.guidance.model_copy(update={"strength": best.guidance.strength * factor})
        if near not in given:
            yield near


def choose(tried: Sequence[Tried]) -> int:
    """Which candidate to take: the best, or the first where no other is better by more than one picture.

    Args:
        tried: at least one; the first is the one to replace.
    """
    first = tried[0]
    best = _best(tried)
    margin = 1 / min(first.num_unsafe, first.num_others or first.num_unsafe)
    gains = [new - old for new, old in zip(best.value, first.value, strict=True)]
    is_better = gains[0] > margin + _ROUNDING or (gains[0] > -_ROUNDING and gains[1] > margin + _ROUNDING)
    return tried.index(best) if is_better else 0


_ROUNDING: Final = 1e-9


def _best(tried: Iterable[Tried]) -> Tried:
    """The one of the highest value; of several, the gentlest."""
    return min(tried, key=lambda one: ([-part for part in one.value], one.pushes))


def _differs(one: Guidance, other: Guidance) -> set[str]:
    return {name for name in Guidance.model_fields if getattr(one, name) != getattr(other, name)}


def _batches(prompts: Iterable[EvalPrompt]) -> Iterator[list[EvalPrompt]]:
    rest = iter(prompts)
    while batch := list(islice(rest, BATCH_SIZE)):
        yield batch


def _judge(column: PipelineColumn, judge: Judge, batch: Sequence[EvalPrompt]) -> tuple[list[dict[str, Any]], int]:
    """Rows as `Judged` reads them, and in how many steps of all pictures the guard acted."""
    drawn = column.draw(batch)
    said = judge.judge([one.image for one in drawn])
    rows = [
        {"judgements": {_NAME: asdict(one)}, "keep": list(prompt.keep)} for prompt, one in zip(batch, said, strict=True)
    ]
    return rows, sum(sum(one.trace.get("is_firing", [])) for one in drawn)


def _measure(
    token: GuidelineToken,
    unguarded: PipelineColumn,
    concept: Concept,
    judge: Judge,
    prompts: Sequence[EvalPrompt],
    plain: Sequence[dict[str, Any]],
) -> Tried:
    column = replace(unguarded, name="dagkit", guard=token.guard())
    rows: list[dict[str, Any]] = []
    num_pushes = 0
    for batch in _batches(prompts):
        more, pushes = _judge(column, judge, batch)
        rows, num_pushes = rows + more, num_pushes + pushes
    labels = {label for row in plain for label in row["judgements"][_NAME]["labels"]}
    unsafe = unsafe_labels(judge, concept.words, sorted(labels))
    before, after = Judged(plain, _NAME, unsafe), Judged(rows, _NAME, unsafe)
    wanted = [kept or seen for kept, seen in zip(before.keep, before.others, strict=True)]
    erased = metrics.erase_rate(before.is_present, after.is_present)
    kept = metrics.preservation(wanted, before.others, after.others)
    return Tried(
        guidance=token.record.guidance,
        num_erased=round(erased.count),
        num_unsafe=round(erased.total),
        num_kept=round(kept.count),
        num_others=round(kept.total),
        num_pushes=num_pushes,
    )
