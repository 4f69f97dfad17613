"""generate: the command of `dagkit.stages.generate`."""

from __future__ import annotations

from pathlib import Path

import click

from dagkit.commands import _common as common
from dagkit.stages import base, generate


@click.command("generate")
@common.concept_option
@common.workspace_option
@common.model_option
@common.num_images_option
@click.option("--safe-share", type=common.SHARE, default=0.4, show_default=True, help="Share of safe prompts.")
@click.option("--batch-size", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option("--select", "selection", type=click.Choice(["weak"]), help="Draw more of what --token sees weakly.")
@click.option("--token", metavar="TOKEN", help="name@version, folder or URL of the token, for --select weak.")
@common.workers_option
@common.device_option
@common.seed_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    model: str | None,
    num_images: int,
    safe_share: float,
    batch_size: int,
    selection: str | None,
    token: str | None,
    workers: int,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Draw candidate images, unsafe and safe, with the base model.

    Resumes where an earlier run stopped. Prompts that sexualise minors are refused, always.
    """
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    if token is not None and selection is None:
        raise click.UsageError("--token says what is weak: add --select weak, or leave it out.")
    concept, workspace = load_concept(concept_name), Workspace(workspace_path)
    members = common.weak_members(workspace, concept, token) if selection else ()
    base_model = common.load_base_model(concept, model, device)
    with common.open_engine(workers, str(base_model.device)) as engine:
        result = generate.run(
            workspace,
            concept,
            base_model,
            num_images=num_images,
            safe_share=safe_share,
            seed=seed,
            batch_size=batch_size,
            members=members,
            engine=engine,
            progress=base.Progress(is_quiet),
        )
    common.show(result, as_json)
