"""generate: a concept -> candidates/. Images that the base model draws, each with its prompt and seed."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from dagkit.concept import Concept, Prompt, PromptKind
    from dagkit.engines import Engine, Item, Made, Work
    from dagkit.engines.source import ModelSource
    from dagkit.models import BaseModel
    from dagkit.workspace import Row, Workspace


def run(
    workspace: Workspace,
    concept: Concept,
    base_model: BaseModel,
    *,
    num_images: int,
    safe_share: float = 0.4,
    hinted_share: float = 0.15,
    seed: int = 0,
    batch_size: int = 4,
    members: Sequence[str] = (),
    engine: Engine | None = None,
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Draws candidates into ``candidates/<concept>/``; images that are there already are not drawn again.

    Args:
        workspace: where to write.
        concept: whose prompts to draw; only prompts of the training split are used.
        base_model: what draws.
        num_images: how many candidates there shall be in all, in [1, 1e6]. A later run with a larger number adds to
            them.
        safe_share: share of safe prompts, in [0, 1].
        hinted_share: share of hinted prompts among the unsafe ones, in [0, 1]; 0 where the concept has none.
        seed: of prompts and images.
        batch_size: images drawn together.
        members: of the concept, e.g. from `weak_members`; unsafe candidates that are not there yet name one of them,
            by turns. Later runs count them, whatever they draw. Empty for all of the concept.
        engine: who draws; this process where None.
        progress: shows progress; None for silence.

    Raises:
        ConceptError: no unsafe prompt of the training split names one of ``members`` alone.
        EngineError: a worker of the engine ended; what it had finished is kept.
        PromptRefused: a prompt sexualises minors; nothing was drawn.
        WorkspaceError: the folder holds candidates of other settings, or cannot be written.
    """
    from dagkit.engines.serial import Serial
    from dagkit.engines.source import ModelSource
    from dagkit.errors import brief
    from dagkit.refusal import refuse_sexualised_minors
    from dagkit.seeds import candidate_seed
    from dagkit.workspace import lock, sha256_json

    settings = {
        **concept.sampling.model_dump(),
        "scheduler": type(base_model.pipe.scheduler).__name__,
    }
    rows: list[Row] = []
    for index, prompt in enumerate(plan_prompts(concept, num_images, safe_share, hinted_share, seed, members)):
        refuse_sexualised_minors(prompt.text, concept.context)
        image_seed = candidate_seed(seed, index)
        identity = {"prompt": prompt.text, "seed": image_seed, "model": base_model.fingerprint, "settings": settings}
        key = f"{index:05d}-{sha256_json(identity)[7:15]}"
        row = _row(key, prompt, image_seed, base_model, settings)
        member = concept.member_of(prompt.text) if members and prompt.kind == "unsafe" else None
        rows.append(row | ({"member": member} if member else {}))

    folder = workspace.stage("candidates", concept.name)
    folder.claim("settings.json")
    with lock(folder.path):
        there = folder.rows()
        done = {row["key"] for row in there}
        rows = _kept(rows, there if members else (row for row in there if "member" in row))
        folder.settings(
            {
                "model": base_model.source,
                "model_fingerprint": base_model.fingerprint,
                "seed": seed,
                "safe_share": safe_share,
                "hinted_share": hinted_share,
                "sampling": settings,
            }
        )
        items = list(plan(rows, done, batch_size))
        work = partial(_draw, base_model, settings, concept.context)
        build = partial(_elsewhere, ModelSource.of(base_model), settings, concept.context)
        progress = progress or base.Progress(is_quiet=True)
        with closing((engine or Serial()).results(items, work, build)) as results:
            for _, made in progress.track(results, total=len(items), description="generate"):
                for one in made:
                    folder.commit(one.row, one.files)
    todo = [row for row in rows if row["key"] not in done]
    skipped = len(rows) - len(todo)
    counts = {kind: sum(row.get("prompt_kind") == kind for row in rows) for kind in ("unsafe", "hinted", "safe")}
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    more = f". For more of {brief(', '.join(members))}, raise --num-images" if members and not todo else ""
    return base.StageResult(
        "generate",
        len(todo),
        skipped,
        f"{len(todo)} images drawn, {skipped} were there already ({shown}) -> {folder.path}{more}",
        {"counts": counts, "path": folder.path},
    )


def weak_members(workspace: Workspace, concept: Concept, token: str) -> list[str]:
    """The members of a concept that a token sees weakly, for `run`.

    Args:
        workspace: where tokens are looked for first.
        concept: whose members.
        token: its reference (name@version, folder or URL).

    Raises:
        ConceptError: the concept has no members.
        PublishError: the token's location cannot be read.
        TokenError: there is no such token, or it does not tell how it sees any of them.
    """
    from dagkit.registry import load_token
    from dagkit.token import slices

    return slices.weak_members(load_token(token, workspace=workspace.root).record, concept.members)


def plan_prompts(
    concept: Concept, num_images: int, safe_share: float, hinted_share: float, seed: int, members: Sequence[str] = ()
) -> list[Prompt]:
    """Prompts of the first ``num_images`` candidates: the kinds are interleaved, so that any beginning is balanced.

    Args:
        concept: whose templates to use.
        num_images: how many, >= 0.
        safe_share: share of safe prompts, in [0, 1].
        hinted_share: share of hinted ones among the others, in [0, 1].
        seed: same seed, same prompts.
        members: what the unsafe prompts name, by turns; empty for all of the concept.

    Raises:
        ConceptError: the concept has no prompts of a kind, or no unsafe one that names a member alone.
    """
    kinds: list[PromptKind] = []
    owed: dict[PromptKind, float] = {"unsafe": 0.0, "hinted": 0.0, "safe": 0.0}
    hinted = hinted_share if concept.prompts.hinted else 0.0
    shares: dict[PromptKind, float] = {
        "unsafe": (1 - safe_share) * (1 - hinted),
        "hinted": (1 - safe_share) * hinted,
        "safe": safe_share,
    }
    for _ in range(num_images):
        for kind in owed:
            owed[kind] += shares[kind]
        next_kind = max(owed, key=lambda kind: owed[kind])
        owed[next_kind] -= 1
        kinds.append(next_kind)
    pools = {
        kind: iter(concept.sample_prompts(kind, kinds.count(kind), seed=seed, split="train")) for kind in set(kinds)
    }
    if members:
        num_turns = -(-kinds.count("unsafe") // len(members))
        drawn = [concept.sample_prompts("unsafe", num_turns, seed=seed, split="train", member=one) for one in members]
        pools["unsafe"] = chain.from_iterable(zip(*drawn, strict=True))
    return [next(pools[kind]) for kind in kinds]


def plan(rows: Sequence[Row], done: Collection[str], batch_size: int) -> Iterator[Item]:
    """Batches in which something is missing. They are the same whatever is done: what is in a batch decides the bits.

    Args:
        rows: of all candidates.
        done: keys of those that are there.
        batch_size: images drawn together.
    """
    from dagkit.engines import Item

    for batch in base.batches(list(rows), batch_size):
        missing = {row["key"] for row in batch} - set(done)
        if missing:
            yield Item(batch[0]["key"], (batch, missing))


def _draw(
    base_model: BaseModel, settings: dict[str, Any], context: Sequence[str], batch: tuple[list[Row], set[str]]
) -> list[Made]:
    """The work: one image a row, and those that are missing."""
    from dagkit.engines import Made
    from dagkit.generation import generate_images
    from dagkit.png import picture_png

    rows, missing = batch
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    images = generate_images(base_model, prompts, seeds, settings=settings, context=context)
    return [
        Made(row, {row["image"]: picture_png(image)})
        for row, image in zip(rows, images, strict=True)
        if row["key"] in missing
    ]


def _elsewhere(source: ModelSource, settings: dict[str, Any], context: Sequence[str]) -> Work:
    return partial(_draw, source.load(), settings, context)


def _kept(rows: Sequence[Row], there: Iterable[Row]) -> list[Row]:
    """The rows, but where their place, the number that a key begins with, is taken, the row that took it."""
    places = {row["key"].partition("-")[0]: row for row in there}
    return [places.get(row["key"].partition("-")[0], row) for row in rows]


def _row(key: str, prompt: Prompt, seed: int, base_model: BaseModel, settings: dict[str, Any]) -> Row:
    return {
        "key": key,
        "image": f"images/{key}.png",
        "prompt": prompt.text,
        "kind": "safe" if prompt.kind == "safe" else "unsafe",
        "prompt_kind": prompt.kind,
        "values": prompt.values,
        "seed": seed,
        "model": base_model.source,
        "model_fingerprint": base_model.fingerprint,
        "settings": settings,
    }
