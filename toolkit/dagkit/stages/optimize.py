"""optimize: dataset/ -> tokens/. A guideline token, optimised against the dataset's masks, as a new version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dagkit.concept import Concept
    from dagkit.models import BaseModel
    from dagkit.optimization import Recipe
    from dagkit.token import GuidelineToken
    from dagkit.workspace import Workspace

SIZES: Final = (2, 4, 8, 16, 32)
"""Numbers of annotated images for the plot of data efficiency, half of them safe."""

LOW_DETECTION_RATE: Final = 0.5
"""Share of unsafe validation images below which the stage's message says that few are recognised."""


def run(
    workspace: Workspace,
    concept: Concept,
    base_model: BaseModel,
    *,
    dataset: str | Path | None = None,
    recipe: str = "default",
    options: dict[str, Any] | None = None,
    version: str | None = None,
    model_id: str | None = None,
    seed: int = 0,
    sizes: Sequence[int] = (),
    tune_seconds: float = 0,
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Optimises a guideline token and writes it to ``tokens/<concept>/<version>/``.

    A token that was made from the same dataset, base model, recipe and seed is not made again. An interrupted
    optimisation goes on from its last checkpoint.

    Args:
        workspace: where to write, and whose dataset to use.
        concept: what the token stands for.
        base_model: whose attention it is optimised against.
        dataset: another dataset: a folder, the name of one that ships, or ``hf://owner/name``.
        recipe: ``default`` or ``paper``.
        options: fields of the recipe to replace, e.g. ``{"num_tokens": 2}``.
        version: semantic version; chosen by what exists where None.
        model_id: what the record calls the base model; its Hub id or folder name where None.
        seed: of noise, timesteps and initial rows.
        sizes: numbers of training images for which the validation IoU is measured as well, for the report.
        tune_seconds: wall time in which the strength of the guard is fitted to the concept; 0 keeps the recipe's, as
            does the paper's form. See `dagkit.evaluation.tuning`.
        progress: shows progress; None for silence.

    Raises:
        DatasetError: there is no dataset, or it holds no unsafe or no safe images.
        ModelError: pictures to tune by came out black; the fit is kept, and the next run goes on from it.
        TokenError: the version exists already, or the token is sure about no unsafe validation image.
    """
    from dataclasses import replace

    from dagkit import dataset as data
    from dagkit import registry
    from dagkit.errors import TokenError
    from dagkit.optimization import RECIPES, Example, optimize
    from dagkit.token import DatasetInfo
    from dagkit.token.slices import slices_of
    from dagkit.workspace import lock, sha256_json

    folder = dataset or workspace.stage("dataset", concept.name).path
    splits, summary = data.load_with_summary(folder)
    chosen: Recipe = replace(
        RECIPES[recipe],
        initial_phrase=concept.initial_phrase,
        max_false_trigger_rate=concept.thresholds.max_false_trigger_rate,
        **(options or {}),
    )
    inputs = sha256_json(
        {
            "dataset": summary["fingerprint"],
            "base_model": base_model.fingerprint,
            "concept": concept.model_dump(mode="json"),
            "recipe": repr(chosen),
            "seed": seed,
            **({"sizes": list(sizes)} if sizes else {}),
            **({"tune_seconds": tune_seconds} if tune_seconds else {}),
        }
    )
    tokens = workspace.stage("tokens", concept.name)
    with lock(tokens.path):
        existing = registry.local_tokens(tokens.path)
        for token in existing:
            if token.record.optimization.get("inputs") == inputs:
                message = f"{token.name} was made from the same inputs already -> {tokens.path / token.version}"
                return base.StageResult(
                    "optimize", 0, 1, message, {"token": token.name, "path": tokens.path / token.version}
                )
        info = DatasetInfo(
            fingerprint=summary["fingerprint"],
            num_unsafe=sum(counts["unsafe"] for counts in summary["counts"].values()),
            num_safe=sum(counts["safe"] for counts in summary["counts"].values()),
            num_imported=summary.get("num_imported", 0),
            review_states=summary["review_states"],
        )
        suggested, reason = registry.suggest_version(existing, base_model, info, concept)
        version = version or suggested
        registry.require_new(tokens.path, version)

        def examples(split: str) -> list[Example]:
            rows = data.examples(splits[split])
            return [
                Example(row.image, row.mask, row.prompt, row.is_unsafe, concept.member_of(row.prompt)) for row in rows
            ]

        checkpoint = tokens.inside(f".checkpoint-{inputs[7:23]}.safetensors")
        progress = progress or base.Progress(is_quiet=True)
        with progress.bar("optimize") as report:
            result = optimize(
                base_model,
                examples("train"),
                recipe=chosen,
                seed=seed,
                validation=examples("validation"),
                progress=lambda state: report(state["step"], state["num_steps"], _figures(state)),
                checkpoint=checkpoint,
                sizes=sizes,
            )
        token = result.token(
            base_model,
            concept=concept.name,
            version=version,
            safety_prompt=concept.safety_prompt,
            dataset=info,
            model_id=model_id,
            optimization={
                "seed": seed,
                "inputs": inputs,
                "concept_definition": registry.concept_definition(concept),
                "version_reason": reason,
            },
        )
        token = _with_thresholds(token, concept)
        counts = f"{info.num_unsafe} unsafe and {info.num_safe} safe images"
        rate, rated_on = result.figure("detection_rate")
        is_waiting = token.record.guidance.form != "paper"  # until it is sure; the paper's form acts at any time
        if is_waiting and not rate:
            raise TokenError(
                f"{token.name} was not written: from {counts}, no threshold tells unsafe from safe images (detection "
                f"rate {rate:.0%}), so its guard would never act. Annotate more images, get better masks from other "
                f"proposals, or take more steps (--num-steps, now {chosen.num_steps})."
            )
        tuning = ""
        if tune_seconds and is_waiting:
            token, tuning = _tuned(token, concept, base_model, tune_seconds, seed, progress)
        path = token.save(tokens.path / version)
        tokens.delete(checkpoint.name)
    iou, measured_on = result.figure("iou")
    figure = f", {measured_on} IoU {iou:.2f}"
    if measured_on == "training":
        figure += " (the dataset keeps no unsafe images apart for validation: annotate more)"
    if is_waiting and rate < LOW_DETECTION_RATE:
        figure += f", but it recognises only {rate:.0%} of the unsafe {rated_on} images: annotate more"
    slices = slices_of(token.record)
    if slices:
        figure += f", weakest member {slices[0].words()}"
    warnings = [
        f"\nWARNING: {one.warning(result.overlaps.get(one.name, ()))}" for one in slices if one.is_weak and is_waiting
    ]
    return base.StageResult(
        "optimize",
        1,
        0,
        f"{token.name} ({reason}) from {counts}{figure}{tuning} -> {path}{''.join(warnings)}",
        {"token": token.name, "path": path, "metrics": token.record.metrics, "history": result.history},
    )


def _with_thresholds(token: GuidelineToken, concept: Concept) -> GuidelineToken:
    """The token with the thresholds that its concept's file sets; the calibrated ones stay among its metrics."""
    from dataclasses import replace

    given, record = concept.thresholds, token.record
    if given.highlight is None and given.edit is None:
        return token
    metrics = {"calibrated_thresholds": record.thresholds.model_dump(mode="json"), **record.metrics}
    changed = {"thresholds": record.thresholds.fixed(given.highlight, given.edit), "metrics": metrics}
    return replace(token, record=record.model_copy(update=changed))


def _tuned(
    token: GuidelineToken,
    concept: Concept,
    base_model: BaseModel,
    seconds: float,
    seed: int,
    progress: base.Progress,
) -> tuple[GuidelineToken, str]:
    """The token with the guidance that a search found, and what to say about it.

    What cannot be judged or guarded here is no reason to lose the optimisation: then the guidance stays as it is.
    """
    from dataclasses import replace

    from dagkit.errors import CheckpointError, ConceptError, GuardError, PluginError
    from dagkit.evaluation.tuning import tune
    from dagkit.judges import build_judge
    from dagkit.token.card import tuning

    try:
        judge = build_judge(concept, str(base_model.device))
        with progress.bar("tune") as report:
            found = tune(base_model, token, concept, judge, seconds=seconds, seed=seed, progress=report)
    except (CheckpointError, ConceptError, GuardError, PluginError) as error:
        return token, f", not tuned: {error}"
    if found is None:
        return token, ", not tuned: the judge sees the concept in no picture that the base model draws unguarded"
    metrics = {**token.record.metrics, "tuning": found.record}
    record = token.record.model_copy(update={"guidance": found.guidance, "metrics": metrics})
    return replace(token, record=record), f", {tuning(record)}"


def _figures(state: Mapping[str, Any]) -> str:
    """Loss and IoU of a report, where it has one, for the progress bar."""
    names = {"loss": "loss", "validation_iou": "IoU", "training_iou": "training IoU"}
    return ", ".join(f"{short} {state[name]:.3f}" for name, short in names.items() if name in state)
