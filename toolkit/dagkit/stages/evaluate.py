"""evaluate: a token -> reports/. The same prompts and noise with and without guard, judged, and a report about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import ConceptError
from dagkit.provenance import public, public_name
from dagkit.stages import base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dagkit.concept import Concept
    from dagkit.dataset import AnnotatedImage
    from dagkit.evaluation import Column, EvalPrompt, EvaluationRun, Gates, ImageMetric, PipelineColumn
    from dagkit.judges import Judge
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken
    from dagkit.workspace import StageFolder, Workspace

GUARDED: Final = "dagkit"
DEFAULT_COLUMNS: Final = ("none", GUARDED, "negative_prompt")
REPORT_PATIENCE_S: Final = 3600.0
"""How long a run whose images are all there waits while another one writes the report: both then write the same."""

SLD_PRESETS: Final = ("weak", "medium", "strong", "max")
COLUMNS: Final = ("none", GUARDED, "negative_prompt", *(f"sld_{preset}" for preset in SLD_PRESETS), "sega")
_LABELS: Final = {"none": "No guard", "negative_prompt": "Negative prompt", "sega": "SEGA"}


def run(
    workspace: Workspace,
    concept: Concept,
    base_model: BaseModel,
    *,
    token: GuidelineToken,
    num_prompts: int = 48,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    other_tokens: Sequence[GuidelineToken] = (),
    prompts: Sequence[EvalPrompt] | None = None,
    prompt_source: str | None = None,
    judges: Mapping[str, Judge] | None = None,
    image_metrics: Sequence[str] = (),
    dataset: str | Path | None = None,
    gates: Gates | None = None,
    against: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    shard: tuple[int, int] | None = None,
    num_examples: int = 6,
    num_attacks: int = 0,
    progress: base.Progress | None = None,
) -> base.StageResult:
    """Draws and judges every prompt in every column and writes ``reports/<concept>/<version>/``.

    Whatever is wrong with what it was given is found before the first image is drawn. Beside ``report.html``,
    ``figures.json`` and ``figures.csv`` the folder holds all images with their judgements, below ``runs/``; a run that
    was interrupted goes on where it stopped, and one with more columns draws only those.

    Args:
        workspace: where to write.
        concept: whose prompts to draw.
        base_model: what draws.
        token: the token to measure.
        num_prompts: of each kind (named, hinted, safe), in [1, 1e5]; not used where ``prompts`` are given.
        columns: what to compare, of `COLUMNS`; ``none`` and ``dagkit`` are always there.
        other_tokens: further tokens, a column each.
        prompts: instead of the concept's own.
        prompt_source: where ``prompts`` are from, in words.
        judges: by name, the first one gives the figures; by default the concept's own.
        image_metrics: further figures of the images, of `dagkit.evaluation.IMAGE_METRICS`, ``name`` or ``name=PATH``.
        dataset: annotated images whose test split scores the detection by itself; none where None.
        gates: what must be reached; by default 90% erased and kept, and the concept's false-trigger rate.
        against: figures of the version that this one would replace: it must not be worse.
        seed: of prompts and noise.
        batch_size: images drawn together.
        shard: (i, n) draws the i-th of n parts, for several machines; the report is written when all parts are there.
        num_examples: pictures of each kind in the report.
        num_attacks: pictures of the concept that a soft-prompt adversary tries to bring back under guard; neither its
            prompts nor its images are kept.
        progress: shows progress; None for silence.

    Returns:
        Its ``data`` has the ``path`` of the report, the ``figures`` and whether all gates ``passed``; nothing of these
        while other shards are missing.

    Raises:
        CheckpointError: a metric's weights are missing.
        ConceptError: an unknown column, or two of one name.
        DatasetError: there is no such dataset, it is damaged, or it has no ``dataset.json``; nothing was drawn.
        GuardError: a token cannot guard this model.
        ModelError: an attack on a model for which there is none.
        PluginError: an unknown metric, or its package is missing.
        TokenError: ``against`` was measured with other prompts, settings or judges.
        PromptRefused: a prompt sexualises minors.
        WorkspaceError: the folder cannot be written.
    """
    from dagkit import evaluation
    from dagkit.judges import build_judge
    from dagkit.workspace import StageFolder, lock, sha256_json

    is_own = not prompts
    annotated = None if dataset is None else _annotated(dataset)
    prompts = prompts or evaluation.concept_prompts(concept, num_prompts, seed=seed)
    judges = judges or {concept.judge.name: build_judge(concept, str(base_model.device))}
    metrics = evaluation.load_image_metrics(image_metrics, judges, str(base_model.device))
    drawn = _columns(concept, base_model, token, columns, other_tokens)
    settings = _settings(concept, base_model, prompts, prompt_source, judges, seed, batch_size)
    if is_own and prompt_source is None:
        candidates = workspace.stage("candidates", concept.name).rows()
        prompt_source = evaluation.describe_prompts(concept, [str(row.get("prompt")) for row in candidates])
    _check_inputs(concept, base_model, prompts, drawn, num_attacks)
    _require_comparable(_planned(settings, judges), against)
    detection = _detection(base_model, token, annotated, seed, batch_size)
    folder = StageFolder(workspace.stage("reports", concept.name).path / token.version)
    runs = StageFolder(folder.path / "runs" / sha256_json(settings)[7:15])
    part = evaluation.EvaluationRun(runs, prompts, batch_size, shard)
    progress = progress or base.Progress(is_quiet=True)
    folder.claim("runs/*/settings.json")
    own = folder.path if shard is None else runs.path / "shard-{}-of-{}".format(*shard)
    with lock(own, writes_below=folder.path if shard is None else runs.path):
        runs.settings(settings)
        steps = evaluation.draw_columns(part, drawn, judges)
        total = part.num_batches * len(drawn)
        counts = list(progress.track(steps, total=total, description="evaluate"))
    done, found = sum(new for new, _ in counts), sum(old for _, old in counts)
    missing = part.num_missing(drawn)
    if missing:
        message = f"{done} images drawn, {found} were there already; {missing} are left to other shards -> {runs.path}"
        return base.StageResult("evaluate", done, found, message, {"missing": missing})
    with lock(folder.path, patience_s=REPORT_PATIENCE_S):  # other shards may end at the same time
        said = {**settings, "prompt_source": prompt_source or settings["prompt_source"]}
        figures = _figures(concept, token, part, drawn, judges, metrics, said)
        figures["detection"] = detection
        figures["attack"] = _attack(concept, base_model, token, part, drawn[0], judges, num_attacks, progress)
        figures["against"] = _comparison(figures, against)
        figures["checks"] = _checks(figures, gates or _default_gates(concept))
        path = _write_report(folder, figures, part, drawn, num_examples)
    passed = all(check["is_passed"] for check in figures["checks"])
    data = {"path": path, "passed": passed, "figures": figures}
    return base.StageResult("evaluate", done, found, f"{_summary(figures)} -> {path}", data)


def _check_inputs(
    concept: Concept,
    base_model: BaseModel,
    prompts: Sequence[EvalPrompt],
    columns: Sequence[PipelineColumn],
    num_attacks: int,
) -> None:
    """Finds what would stop the drawing in its middle or after it: refused prompts, and guards that do not fit."""
    from dagkit import evaluation
    from dagkit.refusal import refuse_sexualised_minors

    negative = [column.negative_prompt for column in columns if column.negative_prompt is not None]
    for text in [*(prompt.text for prompt in prompts), *negative]:
        refuse_sexualised_minors(text, concept.context)
    if num_attacks:
        evaluation.check_attack(base_model)
    for column in columns:
        if column.guard is not None:
            with column.guard.attach(base_model.pipe):
                pass


def _columns(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    names: Sequence[str],
    other_tokens: Sequence[GuidelineToken],
) -> list[PipelineColumn]:
    from dagkit.evaluation import PipelineColumn
    from dagkit.guard import SEGAGuard, SLDGuard

    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise ConceptError(f"{unknown[0]!r} is not a column of an evaluation. Available: {', '.join(COLUMNS)}.")
    sampling, context, safety = concept.sampling.model_dump(), concept.context, concept.safety_prompt

    def column(name: str, settings: dict[str, Any], **options: Any) -> PipelineColumn:
        return PipelineColumn(name, base_model, sampling, settings, context=context, **options)

    made = {"none": column("none", {}), GUARDED: column(GUARDED, _token_settings(token), guard=_guard(token))}
    for name in names:
        if name == "negative_prompt":
            made[name] = column(name, {"negative_prompt": safety}, negative_prompt=safety)
        elif name == "sega":
            made[name] = column(name, {"safety_prompt": safety}, guard=SEGAGuard(safety))
        elif name.startswith("sld_"):
            preset = name.removeprefix("sld_")
            made[name] = column(name, {"safety_prompt": safety, "preset": preset}, guard=SLDGuard(safety, preset))
    for other in other_tokens:
        name = f"token_{other.concept}_{other.version}"
        if name in made:
            raise ConceptError(
                f"two other tokens are called {other.name}: their columns cannot be told apart. Keep one."
            )
        made[name] = column(name, _token_settings(other), guard=_guard(other))
    return list(made.values())


def _guard(token: GuidelineToken) -> Any:
    return token.guard(keep_maps=True)


def _token_settings(token: GuidelineToken) -> dict[str, Any]:
    from dagkit.evaluation import token_identity

    guidance = token.record.guidance.model_dump(mode="json")
    return {**token_identity(token), "safety_prompt": token.record.safety_prompt, "guidance": guidance}


def _settings(
    concept: Concept,
    base_model: BaseModel,
    prompts: Sequence[EvalPrompt],
    prompt_source: str | None,
    judges: Mapping[str, Judge],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """All that decides how any column comes out, the columns' own settings aside."""
    from dagkit import evaluation

    return {
        "model": public_name(base_model.source),
        "model_fingerprint": base_model.fingerprint,
        "scheduler": type(base_model.pipe.scheduler).__name__,
        "sampling": concept.sampling.model_dump(),
        "prompt_source": prompt_source or evaluation.describe_prompts(concept),
        "prompts": [prompt.to_json() for prompt in prompts],
        "judges": [{"name": name, "options": public(judge.settings)} for name, judge in judges.items()],
        "seed": seed,
        "batch_size": batch_size,
        "device": base_model.device.type,
    }


def _figures(
    concept: Concept,
    token: GuidelineToken,
    run: EvaluationRun,
    columns: Sequence[PipelineColumn],
    judges: Mapping[str, Judge],
    metrics: Sequence[ImageMetric],
    settings: dict[str, Any],
) -> dict[str, Any]:
    from dagkit import evaluation
    from dagkit.token import now, software
    from dagkit.token.card import measured_on

    name, judge = next(iter(judges.items()))
    rows = run.result(columns[0]).rows.values()
    labels = {label for row in rows for label in row["judgements"][name]["labels"]}
    unsafe = evaluation.unsafe_labels(judge, concept.words, sorted(labels))
    settings = {**settings, **_planned(settings, judges)["settings"]}
    settings["judge"] = {**settings["judge"], "unsafe_labels": unsafe}
    label_threshold = settings["judge"]["label_threshold"]
    figures = evaluation.compute(
        run, columns, judge=name, unsafe=unsafe, threshold=label_threshold, image_metrics=metrics
    )
    kinds = [prompt.kind for prompt in run.prompts]
    shown = {
        **{key: value for key, value in settings.items() if key != "judges"},
        "num_prompts": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "image_metrics": [{"name": one.name, "title": one.title, "settings": public(one.settings)} for one in metrics],
        "columns": [
            {"name": column.name, "label": _label(column.name, token), "settings": column.settings}
            for column in columns
        ],
    }
    return {
        "schema": evaluation.SCHEMA,
        "title": f"{token.concept} {token.version} on {Path(settings['model']).name}",
        "created": now(),
        "concept": {"name": concept.name, "summary": concept.summary},
        "column": GUARDED,
        "token": {
            "name": token.name,
            "made_for": public_name(token.record.base_model.id),
            "created": token.record.created or None,
            "data_efficiency": token.record.metrics.get("data_efficiency"),
            "calibration_curve": token.record.metrics.get("calibration_curve"),
            "measured_on": measured_on(token.record.metrics),
        },
        "settings": shown,
        **figures,
        "agreement": evaluation.concordance(run, columns, list(judges)),
        "prompts": evaluation.prompt_table(run, columns, judge=name, unsafe=unsafe, threshold=label_threshold),
        "versions": software(),
    }


def _planned(settings: Mapping[str, Any], judges: Mapping[str, Judge]) -> dict[str, Any]:
    """What is known of the figures before anything is drawn, as far as it decides with what they may be compared."""
    from dagkit import evaluation
    from dagkit.workspace import sha256_json

    threshold = next(iter(judges.values())).threshold
    judge = {
        **settings["judges"][0],
        "threshold": threshold,
        "label_threshold": 0.5 if threshold is None else threshold,
    }
    known = {**settings, "prompts": sha256_json(settings["prompts"]), "judge": judge}
    return {"schema": evaluation.SCHEMA, "column": GUARDED, "settings": known}


def _annotated(path: str | Path) -> tuple[list[AnnotatedImage], dict[str, Any]]:
    """Images of a dataset's test split, and its summary.

    Raises:
        DatasetError: there is no such dataset, it is damaged, or its images have several sizes.
    """
    from dagkit import dataset as data
    from dagkit.errors import DatasetError

    splits, summary = data.load_with_summary(path)
    images = data.examples(splits["test"])
    sizes = sorted({one.image.size for one in images})
    if len(sizes) > 1:
        raise DatasetError(
            f"{path}: expected test images of one size, but got {sizes[:4]} (width, height). Resize them first."
        )
    return images, summary


def _detection(
    base_model: BaseModel,
    token: GuidelineToken,
    annotated: tuple[list[AnnotatedImage], dict[str, Any]] | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any] | None:
    """The token's maps against the masks of the dataset's test split."""
    from dagkit import evaluation

    images, summary = annotated or ([], {})
    if not images:
        return None
    rows = evaluation.score_detection(base_model, token, images, seed=seed, batch_size=batch_size)
    num_unsafe = sum(one.is_unsafe for one in images)
    states = ", ".join(f"{count} {state}" for state, count in sorted(summary["review_states"].items()))
    words = (
        f"{num_unsafe} unsafe and {len(images) - num_unsafe} safe images of the dataset's test split, noised to each "
        f"level of noise; masks of the whole dataset: {states}."
    )
    return {"words": words, "dataset": summary["fingerprint"], "rows": rows}


def _attack(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    run: EvaluationRun,
    unguarded: Column,
    judges: Mapping[str, Judge],
    num: int,
    progress: base.Progress,
) -> dict[str, Any] | None:
    """What an adversary achieves against the guard, from the first unguarded images that show the concept."""
    from dataclasses import asdict

    from dagkit import evaluation

    name, judge = next(iter(judges.items()))
    drawn = run.result(unguarded)
    shown = [prompt for prompt in run.prompts if prompt.kind != "safe"]
    chosen = [one for one in shown if drawn.rows[one.key]["judgements"][name]["is_present"]][:num]
    if not chosen:
        return None
    attack = evaluation.Attack()
    targets = [evaluation.Target(drawn.image(one.key), one.text, one.seed) for one in chosen]
    sampling = concept.sampling.model_dump()
    with progress.bar("attack") as report:
        result = evaluation.attack_guard(
            base_model,
            token,
            token.guard(),
            targets,
            judge,
            sampling=sampling,
            attack=attack,
            context=concept.context,
            progress=report,
        )
    return {"settings": asdict(attack), **result.to_json()}


def _checks(figures: dict[str, Any], gates: Gates) -> list[dict[str, Any]]:
    """Gates, and what got worse since the older version."""
    from dagkit import evaluation

    checks, against = gates.checks(figures, GUARDED), figures["against"]
    if against is None:
        return checks
    before, worse = against["token"], evaluation.regressions(against["rows"])
    if not worse:
        text = f"no worse than {before}, as far as {len(figures['prompts'])} prompts can show"
        return [*checks, {"name": "against", "text": text, "is_passed": True}]
    return [*checks, *({**one, "text": f"worse than {before}: {one['text']}", "is_passed": False} for one in worse)]


def _require_comparable(figures: Mapping[str, Any], against: Mapping[str, Any] | None) -> None:
    """Makes sure that two versions were measured alike, as far as it is known.

    Raises:
        TokenError: they were not.
    """
    from dagkit import evaluation
    from dagkit.errors import TokenError

    if against is None:
        return
    before, different = against["token"]["name"], evaluation.comparable(figures, against)
    if different:
        raise TokenError(
            f"{before} was evaluated with other settings ({', '.join(different)}), so the two cannot be compared. "
            "Evaluate both with the same prompts, seed, model and judge."
        )


def _comparison(figures: dict[str, Any], against: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The token beside the version that it would replace."""
    from dagkit import evaluation

    _require_comparable(figures, against)
    if against is None:
        return None
    return {"token": against["token"]["name"], "rows": evaluation.compare(figures, against, GUARDED)}


def _write_report(
    folder: StageFolder,
    figures: dict[str, Any],
    run: EvaluationRun,
    columns: Sequence[Column],
    num_examples: int,
) -> Path:
    from dagkit import report

    examples = _examples(run, columns, num_examples, report.Example)
    folder.write_json("figures.json", figures)
    folder.write_bytes("figures.csv", report.to_csv(figures).encode())
    path: Path = folder.write_bytes("report.html", report.render(figures, examples).encode())
    return path


def _label(name: str, token: GuidelineToken) -> str:
    if name == GUARDED:
        return f"dagkit {token.concept} {token.version}"
    if name.startswith("sld_"):
        return f"SLD {name.removeprefix('sld_')}"
    if name.startswith("token_"):
        return " ".join(["dagkit", *name.split("_", 1)[1].rsplit("_", 1)])
    return _LABELS[name]


def _default_gates(concept: Concept) -> Gates:
    from dagkit.evaluation import Gates

    return Gates(max_false_trigger_rate=concept.thresholds.max_false_trigger_rate)


def _examples(run: EvaluationRun, columns: Sequence[Column], num_examples: int, example: Any) -> list[Any]:
    """The first prompts of each kind with their pictures."""
    drawn = {column.name: run.result(column) for column in columns}
    guarded = drawn[GUARDED]
    chosen = []
    for kind in dict.fromkeys(prompt.kind for prompt in run.prompts):
        for prompt in [one for one in run.prompts if one.kind == kind][:num_examples]:
            images = {name: one.image(prompt.key) for name, one in drawn.items()}
            firing = guarded.rows[prompt.key]["trace"].get("is_firing", [])
            chosen.append(example(prompt.key, images, guarded.maps(prompt.key), firing))
    return chosen


def _summary(figures: Mapping[str, Any]) -> str:
    parts = []
    for kind in ("named", "hinted"):
        result = figures["results"].get(kind, {}).get(GUARDED)
        if result and result["erase_rate"]["value"] is not None:
            one, kept = result["erase_rate"], result["preservation"]
            words = f"{kind}: {one['value']:.0%} erased ({one['count']:g}/{one['total']:g})"
            parts.append(words + ("" if kept["value"] is None else f", {kept['value']:.0%} kept"))
    failed = [check["text"] for check in figures["checks"] if not check["is_passed"]]
    return "; ".join(
        [*parts, f"{len(failed)} of {len(figures['checks'])} gates failed" if failed else "all gates passed"]
    )
