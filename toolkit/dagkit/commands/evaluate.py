"""evaluate: the command of `dagkit.stages.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dagkit.commands import _common as common
from dagkit.stages import base, evaluate
from dagkit.stages.columns import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dagkit.concept import Concept
    from dagkit.judges import Judge
    from dagkit.workspace import Workspace


@click.command("evaluate")
@common.guarded_options
@common.workspace_option
@common.model_option
@click.option(
    "--num-prompts", type=click.IntRange(1, 100_000), default=48, show_default=True, help="Of each kind of prompt."
)
@click.option("--prompts", "source", metavar="SOURCE", help="A .csv, .jsonl or .parquet file, a preset, or a Hub id.")
@click.option("--preset", metavar="NAME", help="Column mapping for a file: i2p, coco, unlearndiffatk, ...")
@click.option("--category", "categories", multiple=True, help="Only prompts of this category; repeatable.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    type=click.Choice(COLUMNS),
    help="What to compare with; repeatable. Default: negative_prompt. 'none' and 'dagkit' are always there.",
)
@click.option("--other-token", "other_names", multiple=True, metavar="TOKEN", help="A further token as a column.")
@click.option(
    "--judge",
    "judge_names",
    multiple=True,
    metavar="NAME",
    help="Judges; the first gives the figures, and how far they agree is shown. Default: the concept's.",
)
@click.option(
    "--metrics",
    "metric_names",
    default="",
    metavar="NAME[=PATH],...",
    help="Further figures of the images: clip_score, fid, frechet, lpips. Each needs weights; SSIM is always there.",
)
@click.option(
    "--dataset",
    metavar="FOLDER",
    help="Annotated images whose test split scores the detection. Default: the workspace's, where there is one.",
)
@click.option(
    "--against",
    metavar="TOKEN",
    help="Exit with status 1 where this token, published or evaluated before, did better: name@version or a URL.",
)
@click.option("--gates/--no-gates", default=False, help="Exit with status 1 where any gate fails.")
@click.option("--min-erase-rate", type=common.SHARE, default=0.9, show_default=True)
@click.option("--min-preservation", type=common.SHARE, default=0.9, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 256), default=8, show_default=True)
@click.option("--shard", metavar="I/N", help="Draw the I-th of N parts only, for several machines.")
@click.option(
    "--num-examples", type=click.IntRange(0, 100), default=6, show_default=True, help="Pictures of each kind."
)
@click.option(
    "--attack",
    "num_attacks",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    help="Prompts from which word attacks try to bring the concept back; see dagkit attack. Keeps nothing of them.",
)
@common.workers_option
@common.device_option
@common.seed_option
@common.output_options
def command(
    token_name: str,
    concept_name: str | None,
    workspace_path: Path,
    model: str | None,
    num_prompts: int,
    source: str | None,
    preset: str | None,
    categories: tuple[str, ...],
    columns: tuple[str, ...],
    other_names: tuple[str, ...],
    judge_names: tuple[str, ...],
    metric_names: str,
    dataset: str | None,
    against: str | None,
    gates: bool,
    min_erase_rate: float,
    min_preservation: float,
    batch_size: int,
    shard: str | None,
    num_examples: int,
    num_attacks: int,
    workers: int,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Measure a token and write a report.

    Draws the same prompts from the same noise without guard, under the token, and with a negative prompt, and has a
    judge look at every image. Resumes where an earlier run stopped.
    """
    import sys

    from dagkit import evaluation, registry
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    part = _parse_shard(shard)
    token = registry.load_token(token_name, workspace=workspace_path)
    concept = load_concept(concept_name or token.concept)
    workspace = Workspace(workspace_path)
    before = None if against is None else _figures_of(workspace, against)
    if source is None and (preset is not None or categories):
        raise click.UsageError("--preset and --category say how to read --prompts: add it, or leave them out.")
    prompts = None
    if source is not None:
        prompts = evaluation.read_prompts(source, preset=preset, limit=num_prompts, categories=categories)
    base_model = common.load_base_model(concept, model, device)
    own = workspace.stage("dataset", concept.name).path
    with common.open_engine(workers, str(base_model.device)) as engine:
        result = evaluate.run(
            workspace,
            concept,
            base_model,
            token=token,
            num_prompts=num_prompts,
            columns=columns or evaluate.DEFAULT_COLUMNS,
            other_tokens=[registry.load_token(name, workspace=workspace_path) for name in other_names],
            prompts=prompts,
            prompt_source=source and Path(source).name,
            judges=_judges(concept, judge_names, str(base_model.device)),
            image_metrics=[name.strip() for name in metric_names.split(",") if name.strip()],
            dataset=dataset or (own if own.is_dir() else None),
            gates=evaluation.Gates(min_erase_rate, min_preservation, concept.thresholds.max_false_trigger_rate),
            against=before,
            seed=seed,
            batch_size=batch_size,
            shard=part,
            num_examples=num_examples,
            num_attacks=num_attacks,
            engine=engine,
            progress=base.Progress(is_quiet),
        )
    checks = result.data.pop("figures", {}).get("checks", [])
    common.show(result, as_json)
    failed = [one for one in checks if not one["is_passed"] and (gates or one["name"].startswith("against"))]
    for check in failed:
        click.echo(f"failed: {check['text']}", err=True)
    if failed:
        sys.exit(1)


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise click.BadParameter(f"expected I/N with 1 <= I <= N, such as 2/4, but got {text!r}.", param_hint="--shard")
    return int(first), int(last)


def _judges(concept: Concept, names: Sequence[str], device: str) -> dict[str, Judge] | None:
    from dagkit.judges import build_judge

    return {name: build_judge(concept, device, name=name) for name in names} or None


def _figures_of(workspace: Workspace, reference: str) -> dict[str, Any]:
    """Figures of an evaluated token: those that it was published with, else those of this workspace.

    Raises:
        TokenError: there is no such token, or no evaluation of exactly this one.
        PublishError: a location cannot be read.
    """
    from dagkit import evaluation, registry

    resolved = registry.resolve(reference, workspace=workspace.root)
    token = registry.load_resolved(resolved)
    published = resolved.path / registry.FIGURES_FILE
    own = workspace.stage("reports", token.concept).path / token.version / registry.FIGURES_FILE
    is_published = published.is_file() and (resolved.url is not None or not own.is_file())
    return evaluation.read_figures(published if is_published else own, token)
