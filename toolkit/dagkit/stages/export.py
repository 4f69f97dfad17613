"""export: annotations/ -> dataset/. A Hugging Face dataset of what annotators said, with where every mask came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dagkit.stages import _common as common

if TYPE_CHECKING:
    from pathlib import Path

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
) -> common.StageResult:
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
    from dagkit.dataset.storage import read_splits
    from dagkit.errors import DatasetError
    from dagkit.workspace import lock

    if not accept_unreviewed and not workspace.stage("annotations", concept.name).rows():
        raise DatasetError(
            f"concept {concept.name!r}: nothing was annotated yet. Annotate in Label Studio and run dagkit pull, "
            "or accept pre-masks that nobody reviewed with --unreviewed."
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
    note = f", {unreviewed} of them UNREVIEWED" if unreviewed else ""
    shown = ", ".join(f"{split} {sum(counts.values())}" for split, counts in summary["counts"].items())
    left_out = "; left out: " + ", ".join(f"{n} {why}" for why, n in collection.left_out.items())
    return common.StageResult(
        "export",
        num_rows,
        sum(collection.left_out.values()),
        f"{num_rows} images{note} ({shown}){left_out if collection.left_out else ''} -> {target}",
        {"path": target, **{key: summary[key] for key in ("fingerprint", "counts", "review_states", "left_out")}},
    )


@click.command("export")
@common.concept_option
@common.workspace_option
@click.option(
    "--unreviewed",
    "accept_unreviewed",
    is_flag=True,
    help="Take pre-masks that nobody reviewed, too. The card says so.",
)
@click.option("--no-pull", "is_pulled", flag_value=False, default=True, help="Use the answers fetched before.")
@click.option(
    "--label-studio",
    "url",
    metavar="URL",
    envvar="DAGKIT_LABEL_STUDIO",
    help="Where to pull from. Default: the server to which the tasks were pushed.",
)
@click.option("--licence", default="other", show_default=True, help="SPDX identifier for the card.")
@click.option("--note", metavar="TEXT", default="", help="For the card: who reviewed, and how.")
@common.seed_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    accept_unreviewed: bool,
    is_pulled: bool,
    url: str | None,
    licence: str,
    note: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Pull what annotators said, if tasks were pushed, and build the dataset of a concept from it.

    Rows are split into train, validation and test so that images of one prompt or seed stay together; a row keeps its
    split when the dataset grows.
    """
    from datasets import disable_progress_bars

    from dagkit.concept import load_concept
    from dagkit.stages import pull
    from dagkit.workspace import Workspace

    workspace, concept = Workspace(workspace_path), load_concept(concept_name)
    if common.Progress(is_quiet).is_quiet:
        disable_progress_bars()
    if is_pulled and workspace.stage("labeling", concept.name).has("project.json"):
        pull.run(workspace, concept, url=url, progress=common.Progress(is_quiet)).show(as_json)
    result = run(
        workspace,
        concept,
        accept_unreviewed=accept_unreviewed,
        licence=licence,
        note=note,
        seed=seed,
    )
    result.show(as_json)
