"""sample: tokens and prompts -> samples/. Images under guard, each with its detection maps and audit traces."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from dagkit.stages import base

if TYPE_CHECKING:
    from PIL.Image import Image

    from dagkit.guard import BoundGuard, Guard, Trace
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken
    from dagkit.workspace import StageFolder, Workspace

Form = Literal["drop", "subtract", "paper"]
Mode = Literal["guide", "monitor", "stop"]


def run(
    workspace: Workspace,
    token: GuidelineToken,
    base_model: BaseModel,
    prompts: Sequence[str],
    *,
    sampling: dict[str, Any],
    other_tokens: Sequence[GuidelineToken] = (),
    is_compared: bool = False,
    strength: float = 1.0,
    mode: Mode = "guide",
    form: Form | None = None,
    reuse_steps: int | None = None,
    allow_other_model: bool = False,
    seed: int = 0,
    context: Sequence[str] = (),
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Draws each prompt under guard into ``samples/<concept>/``; images that are there already are not drawn again.

    Args:
        workspace: where to write.
        token: guards; its concept names the folder.
        base_model: draws.
        prompts: texts.
        sampling: ``num_inference_steps``, ``guidance_scale``, ``width``, ``height``.
        other_tokens: guard at the same time, each with its own safety condition and trace.
        is_compared: also draw each prompt unguarded, with the same seed.
        strength: of the guidance, relative to the token's own; >= 0.
        mode: ``guide``, ``monitor`` to detect only, or ``stop`` to end an image as soon as a concept is found in it.
        form: of the guidance; each token's own where None.
        reuse_steps: denoiser calls for which a safety prediction is kept, >= 1; each token's own where None.
        allow_other_model: guard a model with other weights than the tokens were made for.
        seed: of the first prompt; the next ones count up.
        context: what the concepts are about, for the check of the prompts.
        progress: shows progress; None for silence.

    Returns:
        Its ``data`` has the rows of all ``images``; ``image`` is None where ``is_stopped``.

    Raises:
        PromptRefused: a prompt sexualises minors; nothing was drawn.
        GuardError: a token cannot guard this model or is given twice, or an option is out of range; nothing was drawn.
    """
    from dagkit.errors import GuardError
    from dagkit.evaluation import token_identity
    from dagkit.guard import Guard
    from dagkit.refusal import refuse_sexualised_minors
    from dagkit.workspace import lock, sha256_json

    for prompt in prompts:
        refuse_sexualised_minors(prompt, context)
    tokens = [token, *other_tokens]
    names = [one.name for one in tokens]
    if len(set(names)) < len(names):
        raise GuardError(f"expected each token once, but got {', '.join(names)}. Leave out the one that is repeated.")
    guards = [
        Guard(
            one,
            mode=mode,
            strength=strength,
            form=form,
            reuse_steps=reuse_steps,
            keep_maps=True,
            allow_other_model=allow_other_model,
        )
        for one in tokens
    ]
    identities = [
        {**token_identity(one.token), "strength": strength, "mode": mode, "form": one.form, "reuse": one.reuse_steps}
        for one in guards
    ]
    folder = workspace.stage("samples", token.concept)
    jobs: list[tuple[str, str, int, bool]] = []
    for index, prompt in enumerate(prompts):
        for is_guarded in (True, False) if is_compared else (True,):
            identity = {
                "prompt": prompt,
                "seed": seed + index,
                "model": base_model.fingerprint,
                "sampling": sampling,
                "guards": identities if is_guarded else [],
            }
            suffix = "-".join(one.version for one in tokens) if is_guarded else "unguarded"
            jobs.append((f"{sha256_json(identity)[7:19]}-{suffix}", prompt, seed + index, is_guarded))
    folder.claim("traces/*/*.json")
    with lock(folder.path):
        done = folder.keys()
        todo = [job for job in jobs if job[0] not in done]
        progress = progress or base.Progress(is_quiet=True)
        bound = [guard.bind(base_model.pipe) for guard in guards] if todo else []
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
            drawn, traces = _draw(base_model, bound if is_guarded else [], prompt, image_seed, sampling, context)
            if is_guarded:
                row |= {
                    "mode": mode,
                    "strength": strength,
                    "is_stopped": drawn is None,
                    "guards": _kept(folder, key, guards, traces),
                }
            if drawn is None:
                row["image"] = None
            else:
                folder.write_image(row["image"], drawn)
            folder.append(row)
    keys = {job[0] for job in jobs}
    rows = [row for row in folder.rows() if row["key"] in keys]
    fired = sum(any(one["is_firing"] for one in row.get("guards", ())) for row in rows)
    num_stopped = sum(row.get("is_stopped", False) for row in rows)
    message = f"{len(todo)} drawn, {len(jobs) - len(todo)} were there already; "
    message += f"the guard acted on {fired} of {len(prompts)} prompts"
    if num_stopped:
        message += f" and stopped {num_stopped}, of which there is no image"
    shown = [{**row, "image": row["image"] and str(folder.path / row["image"])} for row in rows]
    data = {"images": shown, "num_stopped": num_stopped}
    return base.StageResult("sample", len(todo), len(jobs) - len(todo), f"{message} -> {folder.path}", data)


def _draw(
    base_model: BaseModel,
    guards: Sequence[BoundGuard],
    prompt: str,
    seed: int,
    sampling: dict[str, Any],
    context: Sequence[str],
) -> tuple[Image | None, list[Trace]]:
    """The image, None where a guard stopped it, and one trace a guard."""
    from dagkit.generation import generate_images
    from dagkit.guard import ConceptFound

    traces: list[Trace] = []
    try:
        with ExitStack() as stack:
            traces += [stack.enter_context(guard.run()) for guard in guards]
            [image] = generate_images(base_model, [prompt], [seed], settings=sampling, context=context)
    except ConceptFound:
        return None, traces
    return image, traces


def _kept(folder: StageFolder, key: str, guards: Sequence[Guard], traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Writes each guard's trace and detection maps; what it did, for the row."""
    kept = []
    for guard, trace in zip(guards, traces, strict=True):
        name = guard.token.name
        one: dict[str, Any] = {
            "token": name,
            "form": guard.form,
            "reuse_steps": guard.reuse_steps,
            "trace": f"traces/{key}/{name}.json",
            "map": f"maps/{key}/{name}.png" if trace.maps else None,
            **(trace.summary(0) if trace.steps else {"is_firing": False, "num_steps": 0}),
        }
        folder.write_bytes(one["trace"], trace.to_json().encode())
        if trace.maps:
            folder.write_image(one["map"], trace.strip(0))
        kept.append(one)
    return kept
