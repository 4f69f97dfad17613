"""export: annotations/ -> dataset/. A Hugging Face dataset of what annotators said, with where every mask came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dagkit.stages import base

if TYPE_CHECKING:
    from dagkit.concept import Concept
    from dagkit.workspace import Workspace


def run(
    workspace: Workspace,
    concept: Concept,
    *,
    accept_unreviewed: bool = False,
    licence: str = "other",
    note: str = "",
    seed: int = 0,
) -> base.StageResult:
    """Builds ``dataset/<concept>/`` anew; rows keep the split that they had in the dataset before.

    Args:
        workspace: with candidates, and annotations or pre-masks.
        concept: whose labels to combine.
        accept_unreviewed: take pre-masks that nobody looked at, too; card and summary say so.
        licence: SPDX identifier for the card.
        note: for the card: who reviewed, and how.
        seed: of the split.

    Raises:
        DatasetError: nothing was annotated and ``accept_unreviewed`` is False, or no image shows the concept.
        WorkspaceError: an image or a mask is missing or unreadable; the message names it, the older dataset stays.
    """
    from dagkit import dataset
    from dagkit.dataset.reading import read_splits
    from dagkit.errors import DatasetError
    from dagkit.manifests import IMPORTED
    from dagkit.workspace import lock

    is_marked = workspace.stage("annotations", concept.name).rows() or any(
        row.get("source") for row in workspace.stage("premasks", concept.name).rows()
    )
    if not accept_unreviewed and not is_marked:
        raise DatasetError(
            f"concept {concept.name!r}: nothing was annotated yet. Annotate in Label Studio and run dagkit pull, "
            "bring masks that you have with dagkit dataset import, or accept pre-masks that nobody reviewed with "
            "--unreviewed."
        )
    target = workspace.stage("dataset", concept.name).path
    with lock(target.parent):
        collection = dataset.collect(workspace, concept, accept_unreviewed=accept_unreviewed)
        built = dataset.build(collection, concept, previous=read_splits(target), seed=seed)
        summary = dataset.summarise(
            built,
            concept,
            left_out=collection.left_out,
            agreement=collection.agreement,
            licence=licence,
            note=note,
        )
        dataset.save_dataset(built, target, summary)
    num_rows = len(collection.records)
    unreviewed = summary["review_states"].get("unreviewed", 0)
    imported = summary["review_states"].get(IMPORTED, 0)
    note = f", {imported} with masks as they were imported" if imported else ""
    note += f", {unreviewed} of them UNREVIEWED" if unreviewed else ""
    shown = ", ".join(f"{split} {sum(counts.values())}" for split, counts in summary["counts"].items())
    left_out = "; left out: " + ", ".join(f"{n} {why}" for why, n in collection.left_out.items())
    return base.StageResult(
        "export",
        num_rows,
        sum(collection.left_out.values()),
        f"{num_rows} images{note} ({shown}){left_out if collection.left_out else ''} -> {target}",
        {"path": target, **{key: summary[key] for key in ("fingerprint", "counts", "review_states", "left_out")}},
    )
