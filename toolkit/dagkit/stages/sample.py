"""sample: a token and prompts -> samples/. Images under guard, each with its detection map and audit trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dagkit.stages import _common as common

if TYPE_CHECKING:
    from dagkit.families import BaseModel
    from dagkit.token import GuidelineToken
    from dagkit.workspace import Workspace


def run(
    workspace: Workspace,
    token: GuidelineToken,
    base_model: BaseModel,
    prompts: Sequence[str],
    *,
    sampling: dict[str, Any],
    is_compared: bool = False,
    strength: float = 1.0,
    mode: str = "guide",
    seed: int = 0,
    context: Sequence[str] = (),
    progress: common.Progress | None = None,
) -> common.StageResult:
    """Draws each prompt under guard into ``samples/<concept>/``; images that are there already are not drawn again.

    Args:
        workspace: where to write.
        token: guards.
        base_model: draws.
        prompts: texts.
        sampling: ``num_inference_steps``, ``guidance_scale``, ``width``, ``height``.
        is_compared: also draw each prompt unguarded, with the same seed.
        strength: of the guidance, relative to the token's own; >= 0.
        mode: ``guide``, or ``monitor`` to detect only.
        seed: of the first prompt; the next ones count up.
        context: what the concept is about, for the check of the prompts.
        progress: shows progress; None for silence.

    Raises:
        PromptRefused: a prompt sexualises minors; nothing was drawn.
        GuardError: the token cannot guard this model; nothing was drawn.
    """
    from dagkit.generation import generate_images
    from dagkit.guard import Guard
    from dagkit.prompts import refuse_sexualised_minors
    from dagkit.workspace import lock, sha256_json

    for prompt in prompts:
        refuse_sexualised_minors(prompt, context)
    folder = workspace.stage("samples", token.concept)
    jobs: list[tuple[str, str, int, bool]] = []
    for index, prompt in enumerate(prompts):
        for is_guarded in (True, False) if is_compared else (True,):
            identity = {
                "prompt": prompt,
                "seed": seed + index,
                "model": base_model.fingerprint,
                "sampling": sampling,
                "guard": [token.name, strength, mode] if is_guarded else None,
            }
            suffix = token.version if is_guarded else "unguarded"
            jobs.append((f"{sha256_json(identity)[7:19]}-{suffix}", prompt, seed + index, is_guarded))
    with lock(folder.path):
        done = folder.keys()
        todo = [job for job in jobs if job[0] not in done]
        progress = progress or common.Progress(is_quiet=True)
        for key, prompt, image_seed, is_guarded in progress.track(todo, total=len(todo), description="sample"):
            row: dict[str, Any] = {
                "key": key,
                "image": f"images/{key}.png",
                "prompt": prompt,
                "seed": image_seed,
                "column": "guarded" if is_guarded else "unguarded",
                "model": base_model.source,
                "model_fingerprint": base_model.fingerprint,
                "settings": sampling,
            }
            draw = {"settings": sampling, "context": context}
            if is_guarded:
                guard = Guard(token, mode=mode, strength=strength, keep_maps=True)  # type: ignore[arg-type]
                with guard.attach(base_model.pipe) as trace:
                    [image] = generate_images(base_model, [prompt], [image_seed], **draw)  # type: ignore[arg-type]
                folder.write_bytes(f"traces/{key}.json", trace.to_json().encode())
                folder.write_image(f"maps/{key}.png", trace.strip(0))
                row |= {"token": token.name, "strength": strength, "mode": mode, "guard": trace.summary(0)}
                row |= {"trace": f"traces/{key}.json", "map": f"maps/{key}.png"}
            else:
                [image] = generate_images(base_model, [prompt], [image_seed], **draw)  # type: ignore[arg-type]
            folder.write_image(row["image"], image)
            folder.append(row)
    keys = {job[0] for job in jobs}
    rows = [row for row in folder.rows() if row["key"] in keys]
    fired = sum(row["guard"]["is_firing"] for row in rows if "guard" in row)
    message = f"{len(todo)} images drawn, {len(jobs) - len(todo)} were there already"
    return common.StageResult(
        "sample",
        len(todo),
        len(jobs) - len(todo),
        f"{message}; the guard acted on {fired} of {len(prompts)} prompts -> {folder.path}",
        {"images": [{**row, "image": str(folder.path / row["image"])} for row in rows]},
    )


@click.command("sample")
@click.argument("prompts", nargs=-1)
@click.option("--guard", "reference", required=True, metavar="TOKEN", help="Token: name@version, a folder or a URL.")
@click.option(
    "--prompts-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="More prompts, one a line.",
)
@click.option("--compare", "is_compared", is_flag=True, help="Also draw each prompt unguarded, with the same seed.")
@click.option("--strength", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Of the guidance.")
@click.option("--mode", type=click.Choice(["guide", "monitor"]), default="guide", show_default=True)
@click.option("--num-inference-steps", type=click.IntRange(1, 1000), help="Default: the concept's.")
@click.option("--guidance-scale", type=click.FloatRange(min=1, min_open=True), help="Default: the concept's.")
@common.workspace_option
@common.model_option
@common.device_option
@common.seed_option
@common.output_options
def command(
    prompts: tuple[str, ...],
    reference: str,
    prompts_file: Path | None,
    is_compared: bool,
    strength: float,
    mode: str,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    workspace_path: Path,
    model: str | None,
    device: str,
    seed: int,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Draw PROMPTS under guard, with detection maps and an audit trace of each image."""
    from dagkit import registry
    from dagkit.concept import load_concept
    from dagkit.workspace import Workspace

    texts = [*prompts]
    if prompts_file:
        texts += [line.strip() for line in prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise click.UsageError("no prompt given: write one behind the options, or use --prompts-file")
    workspace = Workspace(workspace_path)
    token = registry.load_token(reference, workspace=workspace.root)
    concept = load_concept(token.concept)
    changes = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    run(
        workspace,
        token,
        common.load_base_model(concept, model, device),
        texts,
        sampling=concept.sampling.model_dump() | {key: value for key, value in changes.items() if value is not None},
        is_compared=is_compared,
        strength=strength,
        mode=mode,
        seed=seed,
        context=concept.context,
        progress=common.Progress(is_quiet),
    ).show(as_json)
