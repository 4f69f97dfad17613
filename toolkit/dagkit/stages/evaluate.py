"""evaluate: a token -> reports/. The same prompts and noise with and without guard, judged, and a report about it."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from dagkit.stages import base
from dagkit.stages.columns import GUARDED, build_columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dagkit.concept import Concept
    from dagkit.engines import Build, Engine, Work
    from dagkit.engines.source import ModelSource
    from dagkit.evaluation import Column, EvalPrompt, EvaluationRun, Gates, PipelineColumn
    from dagkit.judges import Judge
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken
    from dagkit.workspace import StageFolder, Workspace

DEFAULT_COLUMNS: Final = ("none", GUARDED, "negative_prompt")
REPORT_PATIENCE_S: Final = 3600.0
"""How long a run whose images are all there waits while another one writes the report: both then write the same."""

_LABELS: Final = {"none": "No guard", "negative_prompt": "Negative prompt", "sega": "SEGA"}


def run(
    workspace: Workspace,
    concept: Concept,
    base_model: BaseModel,
    *,
    token: GuidelineToken,
    num_prompts: int = 48,
    num_safe: int | None = None,
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
    engine: Engine | None = None,
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
        num_safe: of safe ones, likewise; ``num_prompts`` where None.
        columns: what to compare, of `dagkit.stages.columns.COLUMNS`; ``none`` and ``dagkit`` are always there.
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
        num_attacks: prompts from which word attacks try to bring the concept back under guard; neither their prompts
            nor their images are kept.
        engine: who draws and judges; this process where None. One with workers makes the judges by their names.
        progress: shows progress; None for silence.

    Returns:
        Its ``data`` has the ``path`` of the report, the ``figures`` and whether all gates ``passed``; nothing of these
        while other shards are missing.

    Raises:
        CheckpointError: a metric's weights are missing.
        ConceptError: an unknown column, or two of one name.
        DatasetError: there is no such dataset, it is damaged, or it has no ``dataset.json``; nothing was drawn.
        EngineError: a worker of the engine ended; what it had finished is kept.
        GuardError: a token cannot guard this model.
        PluginError: an unknown metric, or its package is missing.
        TokenError: ``against`` was measured with other prompts, settings or judges.
        PromptRefused: a prompt sexualises minors.
        WorkspaceError: the folder cannot be written.
    """
    from dagkit import evaluation
    from dagkit.evaluation import measuring
    from dagkit.judges import build_judge
    from dagkit.workspace import StageFolder, lock, sha256_json

    is_own = not prompts
    annotated = None if dataset is None else measuring.annotated_images(dataset)
    prompts = prompts or evaluation.concept_prompts(concept, num_prompts, num_safe=num_safe, seed=seed)
    judges = judges or {concept.judge.name: build_judge(concept, str(base_model.device))}
    metrics = evaluation.load_image_metrics(image_metrics, judges, str(base_model.device))
    drawn = build_columns(concept, base_model, token, columns, other_tokens)
    settings = measuring.run_settings(concept, base_model, prompts, prompt_source, judges, seed, batch_size)
    known = measuring.known_before(settings, judges, GUARDED)
    if is_own and prompt_source is None:
        candidates = workspace.stage("candidates", concept.name).rows()
        prompt_source = evaluation.describe_prompts(concept, [str(row.get("prompt")) for row in candidates])
    _check_inputs(concept, prompts, drawn)
    measuring.require_comparable(known, against)
    detection = measuring.detect(base_model, token, annotated, seed, batch_size)
    folder = StageFolder(workspace.stage("reports", concept.name).path / token.version)
    runs = StageFolder(folder.path / "runs" / sha256_json(settings)[7:15])
    part = evaluation.EvaluationRun(runs, prompts, batch_size, shard)
    build = _build(concept, base_model, token, columns, other_tokens, judges)
    progress = progress or base.Progress(is_quiet=True)
    folder.claim("runs/*/settings.json")
    own = folder.path if shard is None else runs.path / "shard-{}-of-{}".format(*shard)
    with lock(own, writes_below=folder.path if shard is None else runs.path):
        runs.settings(settings)
        with closing(evaluation.draw_columns(part, drawn, judges, engine, build)) as steps:
            total = part.num_batches * len(drawn)
            counts = list(progress.track(steps, total=total, description="evaluate"))
    done, found = sum(new for new, _ in counts), sum(old for _, old in counts)
    missing = part.num_missing(drawn)
    if missing:
        message = f"{done} images drawn, {found} were there already; {missing} are left to other shards -> {runs.path}"
        return base.StageResult("evaluate", done, found, message, {"missing": missing})
    with lock(folder.path, patience_s=REPORT_PATIENCE_S):  # other shards may end at the same time
        if prompt_source:
            known["settings"]["prompt_source"] = prompt_source
        shown = {_label(column.name, token): column for column in drawn}
        figures = measuring.measure(concept, token, part, shown, judges, metrics, known)
        figures["detection"] = detection
        figures["attack"] = None
        if num_attacks:
            with progress.bar("attack") as report:
                figures["attack"] = measuring.attack(
                    concept, base_model, token, part, drawn[0], drawn[1], judges, num_attacks, report
                )
        figures["against"] = measuring.comparison(figures, against)
        figures["checks"] = measuring.checks(figures, gates or _default_gates(concept))
        path = _write_report(folder, figures, part, drawn, num_examples)
    passed = all(check["is_passed"] for check in figures["checks"])
    data = {"path": path, "passed": passed, "figures": figures}
    return base.StageResult("evaluate", done, found, f"{_summary(figures)} -> {path}", data)


def _build(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    columns: Sequence[str],
    other_tokens: Sequence[GuidelineToken],
    judges: Mapping[str, Judge],
) -> Build | None:
    """How other processes come to the same columns and judges; None where a judge is not the one of its name."""
    from dagkit import plugins
    from dagkit.engines.source import ModelSource
    from dagkit.errors import PluginError

    try:
        known = [type(judge) is plugins.load("judges", name) for name, judge in judges.items()]
    except PluginError:
        return None
    if not all(known):
        return None
    tokens = [_flat(one) for one in (token, *other_tokens)]
    return partial(_elsewhere, concept, ModelSource.of(base_model), tokens, tuple(columns), tuple(judges))


def _elsewhere(
    concept: Concept,
    source: ModelSource,
    tokens: Sequence[Sequence[Any]],
    columns: Sequence[str],
    judges: Sequence[str],
) -> Work:
    from dagkit.evaluation import ColumnWork
    from dagkit.judges import build_judge

    base_model = source.load()
    first, *others = (_unflat(fields) for fields in tokens)
    made = {name: build_judge(concept, source.device, name=name) for name in judges}
    return ColumnWork(build_columns(concept, base_model, first, columns, others), made)


def _flat(token: GuidelineToken) -> list[Any]:
    """A token's fields, tensors as arrays: a tensor would be shared with the other process, and not sent to it."""
    fields = [getattr(token, field.name) for field in dataclasses.fields(token)]
    return [one.numpy() if hasattr(one, "numpy") else one for one in fields]


def _unflat(fields: Sequence[Any]) -> GuidelineToken:
    import torch

    from dagkit.token import GuidelineToken

    values: list[Any] = [torch.from_numpy(one) if hasattr(one, "dtype") else one for one in fields]
    return GuidelineToken(*values)


def _check_inputs(
    concept: Concept,
    prompts: Sequence[EvalPrompt],
    columns: Sequence[PipelineColumn],
) -> None:
    """Finds what would stop the drawing in its middle or after it: refused prompts, and guards that do not fit."""
    from dagkit.refusal import refuse_sexualised_minors

    negative = [column.negative_prompt for column in columns if column.negative_prompt is not None]
    for text in [*(prompt.text for prompt in prompts), *negative]:
        refuse_sexualised_minors(text, concept.context)
    for column in columns:
        if column.bound is not None:
            with column.bound.run():
                pass


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
