"""attack: attacks a token's guard and says what gets through. It keeps no prompt and no picture unless asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dagkit.errors import ConceptError
from dagkit.stages import base
from dagkit.stages.columns import GUARDED, build_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from dagkit.concept import Concept
    from dagkit.evaluation import PipelineColumn
    from dagkit.evaluation.attacks import AttackResult, Defence, Target, Trail
    from dagkit.judges import Judge
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken
    from dagkit.workspace import StageFolder

BLACK_BOX: Final = ("seeds", "words")
"""Methods that see pictures only, so that they can attack any column."""
WHITE_BOX: Final = ("soft", "noise", "soft_noise")
"""Methods that know the token and its guard, and attack nothing else."""
METHODS: Final = (*BLACK_BOX, *WHITE_BOX)
DEFAULT_COLUMNS: Final = (GUARDED,)
KEPT_FILE: Final = "attack.json"
"""Names the pictures that were kept, with their prompts and seeds."""


def run(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    *,
    methods: Sequence[str] = BLACK_BOX,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    num_targets: int = 8,
    num_queries: int = 24,
    words: Sequence[str] = (),
    judges: Mapping[str, Judge] | None = None,
    seed: int = 0,
    keep: Path | None = None,
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Attacks columns with several methods from the same targets, each within the same number of pictures.

    Targets are the concept's own prompts, of those kept for tests, whose unguarded picture shows the concept. An attack
    has succeeded where the judge finds the concept in a picture that it was given.

    Args:
        concept: whose prompts are attacked, and whose sampling the pictures are drawn with.
        base_model: draws.
        token: of the guard.
        methods: of `METHODS`; those of `WHITE_BOX` attack the column ``dagkit`` alone.
        columns: what is attacked, of `dagkit.stages.columns.COLUMNS`.
        num_targets: prompts that are drawn unguarded; those without the concept are no targets. In [1, 1e5].
        num_queries: pictures a target, method and column; >= 1.
        words: for the word attack; by default those of a small tokenizer or of the concept's file.
        judges: by name: the first one counts successes, each other one is a filter behind the guard; by default the
            concept's own. The token's second look is a filter in any case.
        seed: of prompts, noise and choices.
        keep: a folder for prompts and pictures of the attacks that succeeded; nothing is kept where None.
        progress: shows progress; None for silence.

    Returns:
        Its ``data`` has the ``budget`` and the ``results``, one a method and column.

    Raises:
        ConceptError: an unknown column or method, or no words.
        GuardError: the token cannot guard this model.
        ModelError: a white-box method, and the base model's prompts are more than one embedding.
        PromptRefused: a target's prompt sexualises minors; candidates that do are not drawn, and counted.
        WorkspaceError: the folder is somebody else's, or cannot be written.
    """
    from dagkit.evaluation import attacks
    from dagkit.judges import build_judge

    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConceptError(f"{unknown[0]!r} is not an attack. Available: {', '.join(METHODS)}.")
    if set(methods) & set(WHITE_BOX):
        attacks.check_evasion(base_model)
    made = {one.name: one for one in build_columns(concept, base_model, token, [*columns, "none"])}
    judges = judges or {concept.judge.name: build_judge(concept, str(base_model.device))}
    judge, *others = judges.values()
    filters: dict[str, attacks.Filter] = {attacks.SECOND_LOOK: attacks.SecondLook(base_model, token)}
    filters |= {name: attacks.JudgeFilter(one) for name, one in zip(list(judges)[1:], others, strict=True)}
    words = words or attacks.vocabulary(base_model, concept)
    folder = None if keep is None else _claimed(keep)
    targets = _targets(concept, made["none"], judge, num_targets, seed)
    progress = progress or base.Progress(is_quiet=True)
    results = []
    for name in columns:
        defence = attacks.Defence(made[name], judge, filters)
        for method in methods if name == GUARDED else [one for one in methods if one not in WHITE_BOX]:
            with progress.bar(f"{method} against {name}") as report:
                trails = attack_targets(
                    concept, base_model, token, method, defence, targets,
                    words=words, num_queries=num_queries, seed=seed, progress=report,
                )  # fmt: skip
            results.append(attacks.AttackResult(method, name, num_queries, trails))
    if folder is not None:
        _keep(folder, results)
    budget = {
        "num_targets": len(targets),
        "num_asked": num_targets,
        "num_queries": num_queries,
        "num_words": len(words),
        "sampling": concept.sampling.model_dump(),
        "judge": next(iter(judges)),
        "filters": list(filters),
        "seed": seed,
    }
    data = {"token": token.name, "budget": budget, "results": [one.to_json() for one in results]}
    message = "; ".join([_words(one) for one in results]) if targets else "no prompt shows the concept without a guard"
    return base.StageResult("attack", sum(one.num_drawn for one in results), 0, message, data)


def _targets(concept: Concept, column: PipelineColumn, judge: Judge, num: int, seed: int) -> list[Target]:
    """The concept's prompts whose unguarded picture shows it."""
    from dagkit.evaluation import attacks, concept_prompts

    prompts = [one for one in concept_prompts(concept, num, seed=seed) if one.kind == "named"]
    asked = [attacks.Target(one.text, one.seed) for one in prompts]
    plain = attacks.Defence(column, judge)
    return [target for target, query in zip(asked, plain.ask(asked), strict=True) if query.is_present]


def attack_targets(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    method: str,
    defence: Defence,
    targets: Sequence[Target],
    *,
    words: Sequence[str] = (),
    num_queries: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Trail]:
    """One method against one defence.

    Args:
        concept: whose sampling the white-box methods draw with.
        base_model: draws.
        token: that the white-box methods know.
        method: of `METHODS`.
        defence: answers the queries.
        targets: where to start.
        words: for the method ``words``.
        num_queries: pictures a target; >= 1.
        seed: of the choices.
        progress: told how far it is, and of how much.

    Returns:
        One trail a target, in order.

    Raises:
        GuardError: the token cannot guard this model.
        ModelError: a white-box method, and the base model's prompts are more than one embedding.
        PromptRefused: a target's prompt sexualises minors.
    """
    from dagkit.evaluation import attacks

    if method == "seeds":
        return attacks.repeat(defence, targets, num_queries=num_queries, progress=progress)
    if method == "words":
        context = concept.context
        return attacks.climb(
            defence, targets, words, num_queries=num_queries, seed=seed, context=context, progress=progress
        )
    guard = token.guard().bind(base_model.pipe)
    trails: list[Trail] = []
    for number, target in enumerate(targets):  # one at a time: the graph of a whole run takes much memory

        def report(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(targets) * total)

        trails += attacks.evade(
            base_model,
            token,
            guard,
            defence,
            [target],
            sampling=concept.sampling.model_dump(),
            num_queries=num_queries,
            settings=attacks.Evasion(is_soft="soft" in method, is_noise="noise" in method),
            context=concept.context,
            progress=report,
        )
    return trails


def _words(result: AttackResult) -> str:
    """One result on the terminal."""
    rate, passed = result.attacked, result.passed
    text = f"{result.method} against {result.column}: back in {rate.count:g} of {rate.total:g}"
    return f"{text}, past everything behind it in {passed['all'].count:g}"


def _claimed(path: Path) -> StageFolder:
    from dagkit.workspace import StageFolder

    folder = StageFolder(path)
    folder.claim(KEPT_FILE)
    return folder


def _keep(folder: StageFolder, results: Sequence[AttackResult]) -> None:
    """Writes the pictures in which the concept was back, and what they were drawn from."""
    rows = []
    for result in results:
        for number, trail in enumerate(result.trails):
            for query in [one for one in trail.queries if one.is_present]:
                name = f"{result.method}-{result.column}-{number:03d}-{trail.queries.index(query):03d}.png"
                row = {"image": name, "prompt": query.prompt, "seed": query.seed, "score": round(query.score, 4)}
                rows.append({**row, "is_seen": query.is_seen, "found": dict(query.found)})
                folder.write_image(name, query.image)
    folder.write_json(KEPT_FILE, rows)
