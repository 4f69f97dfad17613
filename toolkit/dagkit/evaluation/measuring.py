"""From what columns have drawn to the figures of a report: what is recorded, counted, compared and checked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import DatasetError, TokenError
from dagkit.evaluation import attacks
from dagkit.evaluation.detection import score_detection
from dagkit.evaluation.figures import SCHEMA, by_member, compute, concordance, prompt_table, unsafe_labels
from dagkit.evaluation.gates import comparable, compare, regressions
from dagkit.evaluation.prompts import describe_prompts
from dagkit.provenance import public, public_name
from dagkit.token import now, software
from dagkit.token.card import measured_on
from dagkit.token.slices import slices_of
from dagkit.workspace import sha256_json

NUM_QUERIES: Final = 24
"""Pictures that each attack of ``dagkit evaluate --attack`` may ask for."""

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dagkit.concept import Concept
    from dagkit.dataset import AnnotatedImage
    from dagkit.evaluation.columns import Column
    from dagkit.evaluation.drawing import EvaluationRun
    from dagkit.evaluation.gates import Gates
    from dagkit.evaluation.image_metrics import ImageMetric
    from dagkit.evaluation.prompts import EvalPrompt
    from dagkit.judges import Judge
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken


def run_settings(
    concept: Concept,
    base_model: BaseModel,
    prompts: Sequence[EvalPrompt],
    prompt_source: str | None,
    judges: Mapping[str, Judge],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """All that decides how any column comes out, the columns' own settings aside."""
    return {
        "model": public_name(base_model.source),
        "model_fingerprint": base_model.fingerprint,
        "scheduler": type(base_model.pipe.scheduler).__name__,
        "sampling": concept.sampling.model_dump(),
        "prompt_source": prompt_source or describe_prompts(concept),
        "prompts": [prompt.to_json() for prompt in prompts],
        "judges": [{"name": name, "options": public(judge.settings)} for name, judge in judges.items()],
        "seed": seed,
        "batch_size": batch_size,
        "device": base_model.device.type,
    }


def known_before(settings: Mapping[str, Any], judges: Mapping[str, Judge], column: str) -> dict[str, Any]:
    """What is known of the figures before anything is drawn, as far as it decides with what they may be compared."""
    threshold = next(iter(judges.values())).threshold
    judge = {
        **settings["judges"][0],
        "threshold": threshold,
        "label_threshold": 0.5 if threshold is None else threshold,
    }
    known = {**settings, "prompts": sha256_json(settings["prompts"]), "judge": judge}
    return {"schema": SCHEMA, "column": column, "settings": known}


def measure(
    concept: Concept,
    token: GuidelineToken,
    run: EvaluationRun,
    columns: Mapping[str, Column],
    judges: Mapping[str, Judge],
    metrics: Sequence[ImageMetric],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """All figures of a finished run, as they stand in ``figures.json`` before anything is compared or checked.

    Args:
        concept: whose prompts were drawn.
        token: what is measured.
        run: finished.
        columns: by the label that a reader sees; the baseline comes first.
        judges: by name; the first one gives the figures.
        metrics: further figures of the images.
        known: as from `known_before`.
    """
    name, judge = next(iter(judges.items()))
    drawn, settings = list(columns.values()), dict(known["settings"])
    rows = run.result(drawn[0]).rows.values()
    labels = {label for row in rows for label in row["judgements"][name]["labels"]}
    unsafe = unsafe_labels(judge, concept.words, sorted(labels))
    settings["judge"] = {**settings["judge"], "unsafe_labels": unsafe}
    label_threshold = settings["judge"]["label_threshold"]
    figures = compute(run, drawn, judge=name, unsafe=unsafe, threshold=label_threshold, image_metrics=metrics)
    members = {prompt.key: concept.member_of(prompt.text) for prompt in run.prompts if prompt.kind != "safe"}
    table = prompt_table(run, drawn, judge=name, unsafe=unsafe, threshold=label_threshold, members=members)
    kinds = [prompt.kind for prompt in run.prompts]
    shown = {
        **{key: value for key, value in settings.items() if key != "judges"},
        "num_prompts": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "image_metrics": [{"name": one.name, "title": one.title, "settings": public(one.settings)} for one in metrics],
        "columns": [
            {"name": column.name, "label": label, "settings": column.settings} for label, column in columns.items()
        ],
    }
    return {
        "schema": known["schema"],
        "title": f"{token.concept} {token.version} on {Path(settings['model']).name}",
        "created": now(),
        "concept": {"name": concept.name, "summary": concept.summary},
        "column": known["column"],
        "token": {
            "name": token.name,
            "made_for": public_name(token.record.base_model.id),
            "created": token.record.created or None,
            "data_efficiency": token.record.metrics.get("data_efficiency"),
            "calibration_curve": token.record.metrics.get("calibration_curve"),
            "measured_on": measured_on(token.record.metrics),
            "slices": [asdict(one) for one in slices_of(token.record)],
        },
        "settings": shown,
        **figures,
        "agreement": concordance(run, drawn, list(judges)),
        "members": by_member(table),
        "prompts": table,
        "versions": software(),
    }


def annotated_images(path: str | Path) -> tuple[list[AnnotatedImage], dict[str, Any]]:
    """Images of a dataset's test split, and its summary.

    Raises:
        DatasetError: there is no such dataset, it is damaged, or its images have several sizes.
    """
    from dagkit import dataset as data

    splits, summary = data.load_with_summary(path)
    images = data.examples(splits["test"])
    sizes = sorted({one.image.size for one in images})
    if len(sizes) > 1:
        raise DatasetError(
            f"{path}: expected test images of one size, but got {sizes[:4]} (width, height). Resize them first."
        )
    return images, summary


def detect(
    base_model: BaseModel,
    token: GuidelineToken,
    annotated: tuple[list[AnnotatedImage], dict[str, Any]] | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any] | None:
    """The token's maps against the masks of the dataset's test split."""
    images, summary = annotated or ([], {})
    if not images:
        return None
    rows = score_detection(base_model, token, images, seed=seed, batch_size=batch_size)
    num_unsafe = sum(one.is_unsafe for one in images)
    states = ", ".join(f"{count} {state}" for state, count in sorted(summary["review_states"].items()))
    words = (
        f"{num_unsafe} unsafe and {len(images) - num_unsafe} safe images of the dataset's test split, noised to each "
        f"level of noise; images are found or triggered where the guard itself would act. Masks of the whole dataset: "
        f"{states}."
    )
    return {"words": words, "dataset": summary["fingerprint"], "rows": rows}


def attack(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    run: EvaluationRun,
    unguarded: Column,
    guarded: Column,
    judges: Mapping[str, Judge],
    num: int,
    progress: Callable[..., None],
) -> dict[str, Any] | None:
    """What word attacks achieve against the guard, from the first ``num`` prompts whose unguarded image shows it."""
    name, judge = next(iter(judges.items()))
    drawn = run.result(unguarded)
    shown = [prompt for prompt in run.prompts if prompt.kind != "safe"]
    chosen = [one for one in shown if drawn.rows[one.key]["judgements"][name]["is_present"]][:num]
    if not chosen:
        return None
    trails = attacks.climb(
        attacks.Defence(guarded, judge, {attacks.SECOND_LOOK: attacks.SecondLook(base_model, token)}),
        [attacks.Target(one.text, one.seed) for one in chosen],
        attacks.vocabulary(base_model, concept),
        num_queries=NUM_QUERIES,
        context=concept.context,
        progress=progress,
    )
    return attacks.AttackResult("words", guarded.name, NUM_QUERIES, trails).to_json()


def comparison(figures: dict[str, Any], against: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The token beside the version that it would replace."""
    require_comparable(figures, against)
    if against is None:
        return None
    return {"token": against["token"]["name"], "rows": compare(figures, against, figures["column"])}


def require_comparable(figures: Mapping[str, Any], against: Mapping[str, Any] | None) -> None:
    """Makes sure that two versions were measured alike, as far as it is known.

    Raises:
        TokenError: they were not.
    """
    if against is None:
        return
    before, different = against["token"]["name"], comparable(figures, against)
    if different:
        raise TokenError(
            f"{before} was evaluated with other settings ({', '.join(different)}), so the two cannot be compared. "
            "Evaluate both with the same prompts, seed, model and judge."
        )


def checks(figures: dict[str, Any], gates: Gates) -> list[dict[str, Any]]:
    """Gates, and what got worse since the older version."""
    gated, against = gates.checks(figures, figures["column"]), figures["against"]
    if against is None:
        return gated
    before, worse = against["token"], regressions(against["rows"])
    if not worse:
        text = f"no worse than {before}, as far as {len(figures['prompts'])} prompts can show"
        return [*gated, {"name": "against", "text": text, "is_passed": True}]
    return [*gated, *({**one, "text": f"worse than {before}: {one['text']}", "is_passed": False} for one in worse)]
