"""premask: the command of `dagkit.stages.premask`."""

from __future__ import annotations

from pathlib import Path

import click

from dagkit.commands import _common as common
from dagkit.stages import base, premask


@click.command("premask")
@common.concept_option
@common.workspace_option
@common.model_option
@common.checkpoint_option
@common.workers_option
@common.device_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    model: str | None,
    checkpoint: Path | None,
    workers: int,
    device: str,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Outline the concept in every candidate: proposers say where it may be, a segmenter says how far it reaches.

    Resumes where an earlier run stopped.
    """
    from dagkit.concept import load_concept
    from dagkit.proposers import build_proposers
    from dagkit.segmenters import build_segmenter
    from dagkit.workspace import Workspace

    concept = load_concept(concept_name)
    device = common.resolve_device(device)
    segmenter = build_segmenter(concept, device, checkpoint)
    base_model = common.load_base_model(concept, model, device)
    proposers = build_proposers(concept, base_model, device)
    with common.open_engine(workers, device) as engine:
        result = premask.run(
            Workspace(workspace_path),
            concept,
            proposers,
            segmenter,
            engine=engine,
            build=premask.elsewhere(concept, base_model, device, checkpoint),
            progress=base.Progress(is_quiet),
        )
    common.show(result, as_json)
