"""optimize: the command of `dagkit.stages.optimize`."""

from __future__ import annotations

from pathlib import Path

import click

from dagkit.commands import _common as common
from dagkit.stages import base, optimize


@click.command("optimize")
@common.concept_option
@common.workspace_option
@common.model_option
@click.option("--dataset", metavar="FOLDER", help="Another than the workspace's: a folder, or hf://owner/name.")
@click.option("--recipe", type=click.Choice(["default", "paper"]), default="default", show_default=True)
@click.option("--num-tokens", type=click.IntRange(1, 64), help="Guideline rows n. Default: the recipe's.")
@click.option("--num-steps", type=click.IntRange(1, 100_000), help="Optimiser steps. Default: the recipe's.")
@click.option(
    "--data-efficiency",
    "is_measuring_sizes",
    is_flag=True,
    help="Measure as well what 2, 4, 8, 16 and 32 images would have given; the report plots it.",
)
@click.option(
    "--tune",
    "tune_seconds",
    type=click.FloatRange(0, 86_400),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Time in which the strength of the guard is fitted to the concept; 0 keeps the recipe's.",
)
@click.option("--version", metavar="X.Y.Z", help="Version to write. Default: the next one, by what changed.")
@common.device_option
@common.seed_option
@common.output_options
def command(
    concept_name: str,
    workspace_path: Path,
    model: str | None,
    dataset: str | None,
    recipe: str,
    num_tokens: int | None,
    num_steps: int | None,
    is_measuring_sizes: bool,
    tune_seconds: float,
    version: str | None,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Optimise a guideline token and write it as a new version.

    The base model is frozen: only the token's few rows are learned, against the masks of the dataset.
    """
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    concept = load_concept(concept_name)
    options = {"num_tokens": num_tokens, "num_steps": num_steps}
    common.show(
        optimize.run(
            Workspace(workspace_path),
            concept,
            common.load_base_model(concept, model, device),
            dataset=dataset,
            recipe=recipe,
            options={name: value for name, value in options.items() if value is not None},
            version=version,
            model_id=model or concept.model,
            seed=seed,
            sizes=optimize.SIZES if is_measuring_sizes else (),
            tune_seconds=tune_seconds,
            progress=base.Progress(is_quiet),
        ),
        as_json,
    )
