"""annotate: generate + premask + push in one resumable command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dagkit.commands import _common as common
from dagkit.stages import base, push

if TYPE_CHECKING:
    from dagkit.dataset.selection import Selection


@click.command("annotate")
@common.concept_option
@common.workspace_option
@common.model_option
@common.num_images_option
@click.option("--batch-size", type=click.IntRange(1, 256), default=4, show_default=True, help="Images drawn together.")
@common.checkpoint_option
@common.label_studio_option("the embedded server")
@common.annotators_option
@common.selection_options(is_drawing=True)
@common.storage_options
@common.workers_option
@common.device_option
@common.seed_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    model: str | None,
    num_images: int,
    batch_size: int,
    checkpoint: Path | None,
    url: str | None,
    num_annotators: int | None,
    selection: Selection | Literal["weak"] | None,
    num_tasks: int | None,
    token: str | None,
    storage: str,
    s3_endpoint: str | None,
    workers: int,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Draw candidates, outline the concept in them, and send both to Label Studio.

    Run it again after any interruption: what is done is not done twice.
    """
    from dagkit.concept import load_concept
    from dagkit.labelstudio.access import connect
    from dagkit.labelstudio.storage import parse_storage
    from dagkit.proposers import build_proposers
    from dagkit.segmenters import build_segmenter
    from dagkit.stages import generate, premask
    from dagkit.workspace import Workspace

    if selection == "weak" and num_tasks is not None:
        raise click.UsageError("--select weak sends all that is drawn: leave out --num-tasks, or draw fewer images.")
    concept, workspace = load_concept(concept_name), Workspace(workspace_path)
    members: list[str] = []
    if selection == "weak":
        members, selection, token = common.weak_members(workspace, concept, token), None, None
    common.check_selection(selection, token)
    progress = base.Progress(is_quiet)
    device = common.resolve_device(device)
    # What would fail at the end is tried first.
    place = parse_storage(storage, s3_endpoint)
    push.page(concept)
    segmenter = build_segmenter(concept, device, checkpoint)
    with (
        connect(url, lambda line: click.echo(line, err=True)) as client,
        common.open_engine(workers, device) as engine,
    ):
        base_model = common.load_base_model(concept, model, device)
        push.token_proposer(workspace, concept, selection, token, base_model)
        proposers = build_proposers(concept, base_model, device)
        common.show(
            generate.run(
                workspace,
                concept,
                base_model,
                num_images=num_images,
                seed=seed,
                batch_size=batch_size,
                members=members,
                engine=engine,
                progress=progress,
            ),
            as_json,
        )
        build = premask.elsewhere(concept, base_model, device, checkpoint)
        common.show(
            premask.run(workspace, concept, proposers, segmenter, engine=engine, build=build, progress=progress),
            as_json,
        )
        keys = push.choose(workspace, concept, selection, num_tasks, base_model=base_model, token=token)
        common.show(
            push.run(
                workspace,
                concept,
                client=client,
                keys=keys,
                storage=place,
                num_annotators=num_annotators,
                progress=progress,
            ),
            as_json,
        )
