"""sample: the command of `dagkit.stages.sample`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import click

from dagkit.commands import _common as common
from dagkit.stages import base, sample


@click.command("sample")
@click.argument("prompts", nargs=-1)
@click.option(
    "--guard",
    "references",
    required=True,
    multiple=True,
    metavar="TOKEN",
    help="Token: name@version, a folder or a URL. Repeatable: each guards against its own concept.",
)
@click.option(
    "--prompts-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="More prompts, one a line.",
)
@click.option("--compare", "is_compared", is_flag=True, help="Also draw each prompt unguarded, with the same seed.")
@click.option("--strength", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Of the guidance.")
@click.option(
    "--mode",
    type=click.Choice(get_args(sample.Mode)),
    default="guide",
    show_default=True,
    help="Steer away, only detect, or end an image in which a concept is found (then exit with status 1).",
)
@click.option("--form", type=click.Choice(get_args(sample.Form)), help="Of the guidance. Default: the token's.")
@click.option(
    "--reuse-steps",
    type=click.IntRange(min=1),
    help="Denoiser calls for which a safety prediction is kept. Default: the token's.",
)
@click.option("--allow-other-model", is_flag=True, help="Guard a model with other weights than the token was made for.")
@common.steps_option
@click.option("--guidance-scale", type=click.FloatRange(min=1, min_open=True), help="Default: the concept's.")
@common.workspace_option
@common.model_option
@common.device_option
@common.seed_option
@common.output_options
def command(
    prompts: tuple[str, ...],
    references: tuple[str, ...],
    prompts_file: Path | None,
    is_compared: bool,
    strength: float,
    mode: sample.Mode,
    form: sample.Form | None,
    reuse_steps: int | None,
    allow_other_model: bool,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    workspace_path: Path,
    model: str | None,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Draw PROMPTS under guard, with detection maps and an audit trace of each image.

    With several tokens, the first one's concept gives model, sampling and folder.
    """
    from dagkit import registry
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    texts = [*prompts]
    if prompts_file:
        texts += [line.strip() for line in common.read_text(prompts_file).splitlines() if line.strip()]
    if not texts:
        raise click.UsageError("no prompt given: write one behind the options, or use --prompts-file")
    workspace = Workspace(workspace_path)
    token, *others = (registry.load_token(reference, workspace=workspace.root) for reference in references)
    concepts = [load_concept(one.concept) for one in (token, *others)]
    changes = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    own = concepts[0].sampling.model_dump()
    result = sample.run(
        workspace,
        token,
        common.load_base_model(concepts[0], model, device),
        texts,
        sampling=own | {key: value for key, value in changes.items() if value is not None},
        other_tokens=others,
        is_compared=is_compared,
        strength=strength,
        mode=mode,
        form=form,
        reuse_steps=reuse_steps,
        allow_other_model=allow_other_model,
        seed=seed,
        context=[line for concept in concepts for line in concept.context],
        progress=base.Progress(is_quiet),
    )
    common.show(result, as_json)
    if result.data["num_stopped"]:
        sys.exit(1)
