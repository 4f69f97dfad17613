"""premask: candidates/ -> premasks/. Proposers say where the concept may be, a segmenter outlines it."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from dagkit.concept import Concept
    from dagkit.engines import Build, Engine, Item, Made, Work
    from dagkit.engines.source import ModelSource
    from dagkit.models import BaseModel
    from dagkit.proposers import Proposer
    from dagkit.segmenters import Segmenter
    from dagkit.workspace import Row, StageFolder, Workspace


def run(
    workspace: Workspace,
    concept: Concept,
    proposers: Sequence[Proposer],
    segmenter: Segmenter,
    *,
    engine: Engine | None = None,
    build: Build | None = None,
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Outlines the concept in every candidate that has no pre-mask yet. Candidates of safe prompts get none.

    Args:
        workspace: with candidates of the concept.
        concept: whose labels to use.
        proposers: as from `dagkit.proposers.build_proposers`.
        segmenter: as from `dagkit.segmenters.build_segmenter`.
        engine: who looks; this process where None.
        build: as from `elsewhere`, for engines with workers of their own.
        progress: shows progress; None for silence.

    Raises:
        EngineError: a worker of the engine ended; what it had finished is kept.
        WorkspaceError: there are no candidates, or some cannot be read; all others were finished.
    """
    from dagkit.engines.serial import Serial
    from dagkit.errors import WorkspaceError
    from dagkit.workspace import lock

    candidates = workspace.stage("candidates", concept.name)
    rows = candidates.present_rows()
    if not rows:
        raise WorkspaceError(f"{candidates.path}: no candidates. Run: dagkit generate --concept {concept.name}")
    folder = workspace.stage("premasks", concept.name)
    unreadable: list[str] = []
    folder.claim("settings.json")
    with lock(folder.path):
        done = folder.keys()
        folder.settings(
            {
                "labels": concept.labels.model_dump(),
                "proposers": [
                    {"name": proposer.name, "version": proposer.version, "options": plugin.options}
                    for proposer, plugin in zip(proposers, concept.proposers, strict=True)
                ],
                "segmenter": {
                    "name": segmenter.name,
                    "version": segmenter.version,
                    "options": concept.segmenter.options,
                },
            }
        )
        todo = [row for row in rows if row["key"] not in done]
        progress = progress or base.Progress(is_quiet=True)
        items, work = plan(candidates, todo, unreadable), partial(_outline, proposers, segmenter)
        with closing((engine or Serial()).results(items, work, build)) as results:
            for _, made in progress.track(results, total=len(todo), description="premask"):
                folder.commit(made.row, made.files)
    if unreadable:
        num_done = len(todo) - len(unreadable)
        more = [f"{len(unreadable) - 3} more cannot be read."] if len(unreadable) > 3 else []
        raise WorkspaceError(
            " ".join([*unreadable[:3], *more, f"{num_done} other images were pre-masked and are kept."])
        )

    finished = [row for row in folder.rows() if row["key"] in {row["key"] for row in rows}]
    wanted = {row["key"] for row in rows if row["kind"] != "safe"}
    found = sum(1 for row in finished if row["key"] in wanted and row["masks"])
    return base.StageResult(
        "premask",
        len(todo),
        len(rows) - len(todo),
        f"{len(todo)} images pre-masked, {len(rows) - len(todo)} were done already; the concept was found in {found} "
        f"of {len(wanted)} images of unsafe prompts -> {folder.path}",
        {"found": found, "expected": len(wanted), "path": folder.path},
    )


def plan(candidates: StageFolder, rows: Iterable[Row], unreadable: list[str]) -> Iterator[Item]:
    """Candidates with their images, read as they are needed.

    Args:
        candidates: their folder.
        rows: those to outline.
        unreadable: the errors of those that cannot be read are added here.
    """
    from dagkit.engines import Item
    from dagkit.errors import WorkspaceError

    for row in rows:
        try:
            yield Item(row["key"], (row, candidates.read_image(row["image"])))
        except WorkspaceError as error:
            unreadable.append(str(error))


def elsewhere(
    concept: Concept, base_model: BaseModel | None = None, device: str = "cpu", checkpoint: Path | None = None
) -> Build:
    """How other processes come to the same proposers and segmenter; arguments as for those who build them."""
    from dagkit.engines.source import ModelSource

    source = None if base_model is None else ModelSource.of(base_model)
    return partial(_elsewhere, concept, source, device, checkpoint)


def _elsewhere(concept: Concept, source: ModelSource | None, device: str, checkpoint: Path | None) -> Work:
    from dagkit.proposers import build_proposers
    from dagkit.segmenters import build_segmenter

    proposers = build_proposers(concept, None if source is None else source.load(), device)
    return partial(_outline, proposers, build_segmenter(concept, device, checkpoint))


def _outline(proposers: Sequence[Proposer], segmenter: Segmenter, candidate: tuple[Row, Image]) -> Made:
    """The work: one candidate's masks."""
    from dagkit.engines import Made
    from dagkit.png import mask_png
    from dagkit.proposers import propose_all
    from dagkit.segmenters import union_by_label

    row, image = candidate
    proposals = [] if row["kind"] == "safe" else propose_all(proposers, image, row["prompt"], row["seed"])
    outlines = segmenter.segment(image, proposals) if proposals else []
    masks: dict[str, dict[str, Any]] = {}
    files: dict[str, bytes] = {}
    for label, (mask, score) in union_by_label(outlines).items():
        path = f"masks/{row['key']}-{label}.png"
        files[path] = mask_png(mask)
        boxes = [[round(side, 2) for side in outline.box] for outline in outlines if outline.label == label]
        proposal_score = max(proposal.score for proposal in proposals if proposal.label == label)
        masks[label] = {
            "path": path,
            "score": round(score, 4),
            "proposal_score": round(proposal_score, 4),
            "is_positive": any(outline.is_positive for outline in outlines if outline.label == label),
            "boxes": boxes,
        }
    positive = [mask["score"] for mask in masks.values() if mask["is_positive"]]
    outlined = {
        "key": row["key"],
        "masks": masks,
        "proposers": [{"name": proposer.name, "version": proposer.version} for proposer in proposers],
        "segmenter": {"name": segmenter.name, "version": segmenter.version},
        "score": round(sum(positive) / len(positive), 4) if positive else 0.0,
    }
    return Made(outlined, files)
