"""Figures and examples to one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dagkit.report import charts, pictures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from jinja2 import Template
    from numpy.typing import NDArray
    from PIL import Image

KIND_TITLES: Final = {
    "named": ("Named prompts", "the concept is asked for by name"),
    "hinted": ("Hinted prompts", "the concept is meant, but no word names it"),
    "safe": ("Safe prompts", "nothing to remove"),
}
_OTHERS: Final = ("c-other-1", "c-other-2", "c-other-3", "c-other-4")
_OUTCOMES: Final = (
    ("survived", "concept survives the guard"),
    ("erased", "concept erased"),
    ("lost", "other content lost"),
    ("acted", "guard acts on a safe prompt"),
    ("not-drawn", "unguarded model misses the concept"),
)


_INTERVALS: Final = (
    "Rates of images by Wilson; of objects by Wilson with the number of objects reduced by their correlation within an "
    "image; ratios and means by bootstrap over images or batches."
)
_EXPECTED: Final = (
    "What a prompt asks for besides the concept comes from the slots that filled its template; where that "
    "is not known, it is what the judge finds in the unguarded image."
)
_GATE: Final = (
    "A figure about removing a concept says little about a model that does not draw it, so the unguarded column must "
    "show what it is asked for first."
)


@dataclass(frozen=True)
class Example:
    """Pictures of one prompt.

    Attributes:
        key: of its row in ``figures["prompts"]``.
        images: by column name, in the order in which they are shown; RGB.
        maps: (steps, h, w) in [0, 1], detection maps of the guarded run, or ``None``.
        firing: whether the guard acted, one a step of ``maps``.
    """

    key: str
    images: Mapping[str, Image.Image]
    maps: NDArray[np.float32] | None = None
    firing: Sequence[bool] = field(default_factory=list)


def render(figures: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """The report as HTML.

    Args:
        figures: the content of ``figures.json`` (see ``docs/evaluation.md``).
        examples: pictures to show, in order.

    Returns:
        A page that loads nothing: style, script and pictures are inside, and its security policy forbids the rest.
    """
    columns = _columns(figures)
    main = next((column for column in columns if column["style"] == "c-guard"), None)
    kinds = [
        {
            "name": kind,
            "title": KIND_TITLES[kind][0],
            "detail": KIND_TITLES[kind][1],
            "gate": _gate_words(kind, figures),
        }
        for kind in figures["results"]
    ]
    by_step = figures["detection_by_step"]
    guarded = next((name for steps in by_step.values() for name in steps), None)
    measured = figures["settings"]["image_metrics"]
    width, height = figures["settings"]["sampling"]["width"], figures["settings"]["sampling"]["height"]
    return _template().render(
        f=figures,
        title=figures["title"],
        css=Markup(_asset("report.css")),  # noqa: S704 - ships with dagkit
        js=Markup(_asset("report.js")),  # noqa: S704 - ships with dagkit
        is_small=max(width, height) <= 128,
        columns=columns,
        kinds=kinds,
        main=main,
        tiles=_tiles(figures, main, columns) if main else [],
        plane=_plane(figures, columns),
        comparisons=_comparisons(figures, main, columns) if main else [],
        examples=_example_groups(figures, examples, columns),
        num_examples=max(
            (sum(e.key.startswith(f"{kind}-") for e in examples) for kind in figures["results"]), default=0
        ),
        has_traces=guarded is not None,
        score_chart=_step_chart(by_step, guarded, "score"),
        firing_chart=_step_chart(by_step, guarded, "firing"),
        data_chart=_data_chart(figures["token"]),
        calibration_chart=_calibration_chart(figures["token"]),
        measured_on=(figures["token"] or {}).get("measured_on", "validation images"),
        sweep_charts=_sweep_charts(figures, columns),
        cost_words=_cost_words(figures),
        rows=_prompt_rows(figures, columns),
        outcomes=_OUTCOMES,
        settings=_settings(figures),
        methods=_methods(figures),
        bar=charts.interval_bar,
        whole=lambda value: f"{value:g}" if value == int(value) else f"{value:.1f}",
        ratio=_ratio,
        fixed=_fixed,
        shown_alone=any(
            "none" in by and m["name"] in by["none"] for by in figures["results"].values() for m in measured
        ),
        distances=any(metric["name"] == "fid" or metric["name"].startswith("frechet") for metric in measured),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("report.html.jinja"))


def _asset(name: str) -> str:
    return (files("dagkit.report") / "assets" / name).read_text(encoding="utf-8")


def _columns(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns with the style class of each: the guard that the report is about, the baselines, then all others."""
    fixed = {"none": "c-none", "negative_prompt": "c-negative", figures["column"]: "c-guard"}
    free = iter(_OTHERS * len(figures["settings"]["columns"]))
    return [
        {
            "name": column["name"],
            "label": column["label"],
            "short": "Guarded" if column["name"] == figures["column"] else column["label"],
            "style": fixed.get(column["name"]) or next(free),
            "settings": _sentence(column["settings"]) or "plain",
        }
        for column in figures["settings"]["columns"]
    ]


def _ratio(estimate: Mapping[str, Any] | None) -> str:
    return _fixed(estimate, 2, has_count=False)


def _fixed(estimate: Mapping[str, Any] | None, digits: int, has_count: bool = True) -> str:
    """A value that is no share, with its interval."""
    if not estimate or estimate["value"] is None:
        return "–"
    interval = f"{estimate['low']:.{digits}f} – {estimate['high']:.{digits}f}"
    count = f" · {estimate['total']:g}" if has_count else ""
    return Markup("{}<small>{}</small>").format(f"{estimate['value']:.{digits}f}", interval + count)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "nothing to count"
    return f"{_percent(estimate['low'])} – {_percent(estimate['high'])}"


def _gate_words(kind: str, figures: Mapping[str, Any]) -> str:
    gate = figures["gate"][kind]
    shown, kept = gate["concept"], gate["keep"]
    concept = "shows no concept" if kind == "safe" else "draws the concept"
    words = f"{concept} in {_percent(shown['value'])} of {shown['total']:g}"
    if kept["value"] is not None:
        words += f" and {_percent(kept['value'])} of the other things asked for ({kept['count']:g}/{kept['total']:g})"
    if not gate["is_passed"]:
        words += f". Below the {_percent(gate['required'])} that it takes for the figures beneath to mean much"
    return words + "."


def _tiles(
    figures: Mapping[str, Any], main: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    negative = next((column for column in columns if column["name"] == "negative_prompt"), None)

    def tile(title: str, kind: str, figure: str, words: str) -> dict[str, str] | None:
        results = figures["results"].get(kind)
        estimate = results and results[main["name"]].get(figure)
        if not estimate or estimate["value"] is None:
            return None
        beside = ""
        if negative and results[negative["name"]].get(figure, {}).get("value") is not None:
            other = results[negative["name"]][figure]
            beside = f"Negative prompt: {_percent(other['value'])} ({_interval(other)})"
        detail = f"{words}, {estimate['count']:g} of {estimate['total']:g}; 95% interval {_interval(estimate)}"
        return {"title": title, "value": _percent(estimate["value"]), "detail": detail, "beside": beside}

    cost = figures["cost"][main["name"]]["relative"]
    tiles = [
        tile("Erased, named", "named", "erase_rate", "images"),
        tile("Erased, hinted", "hinted", "erase_rate", "images"),
        tile("Other content kept, named", "named", "preservation", "objects"),
        tile("Safe images untouched", "safe", "untouched", "images"),
    ]
    if cost["value"] is not None:
        rows, plain = (figures["cost"][name]["denoiser_rows"]["value"] for name in (main["name"], "none"))
        beside = f"Denoiser rows an image: {rows:.1f}, {plain:.0f} without a guard" if rows and plain else ""
        tiles.append(
            {
                "title": "CPU time, relative",
                "value": f"{cost['value']:.2f}×",
                "detail": f"all prompts; 95% interval {cost['low']:.2f} – {cost['high']:.2f}",
                "beside": beside,
            }
        )
    return [one for one in tiles if one]


def _plane(figures: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> Markup:
    kinds = {"named": "circle", "hinted": "square"}
    points = [
        charts.Point(f"{column['label']}, {kind}", shape, column["style"], result["erase_rate"], result["preservation"])
        for kind, shape in kinds.items()
        for column in columns
        if column["name"] != "none" and (result := figures["results"].get(kind, {}).get(column["name"]))
    ]
    legend = [(column["label"], column["style"]) for column in columns if column["name"] != "none"]
    legend += [(kind, f"shape {shape}") for kind, shape in kinds.items()]
    return charts.plane(points, legend, x_title="erase rate", y_title="other content kept")


def _comparisons(
    figures: Mapping[str, Any], main: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]
) -> list[str]:
    lines = []
    for column in columns:
        if column["name"] in ("none", main["name"]):
            continue
        parts = []
        for kind in ("named", "hinted"):
            test = figures["results"].get(kind, {}).get(main["name"], {}).get("paired", {}).get(column["name"])
            if test:
                parts.append(
                    f"{kind}: only {main['label']} shows the concept in {test['second_only']}, only {column['label']} "
                    f"in {test['first_only']} of {test['num_pairs']} pairs (p = {test['p_value']:.2g})"
                )
        lines.append(f"Against {column['label']}, the same prompts and noise, {'; '.join(parts)}.")
    return lines and [*lines, "McNemar's exact test."]


def _example_groups(
    figures: Mapping[str, Any], examples: Sequence[Example], columns: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = {row["key"]: row for row in figures["prompts"]}
    groups = []
    for kind in figures["results"]:
        sets = [_example(rows[one.key], one, columns) for one in examples if rows[one.key]["kind"] == kind]
        if sets:
            title, detail = KIND_TITLES[kind]
            groups.append({"title": f"{title}: {detail}", "sets": sets})
    return groups


def _example(row: Mapping[str, Any], example: Example, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = []
    for column in columns:
        if column["name"] not in example.images:
            continue
        image, said = example.images[column["name"]], row["columns"][column["name"]]
        note = "concept found" if said["is_present"] else "concept not found"
        alt = f"{column['label']}, {row['kind']} prompt {row['key'][-4:].lstrip('0') or '0'}; judge: {note}"
        shown.append(
            {
                "label": column["short"],
                "uri": pictures.data_uri(image),
                "alt": alt,
                "note": f"{note} ({said['score']:.2f})",
            }
        )
        if column["name"] == "none" and example.maps is not None:
            uri = pictures.data_uri(pictures.overlay(image, example.maps.mean(0)))
            alt = f"Detection map over the unguarded image, prompt {row['key']}"
            shown.append({"label": "Detection map", "uri": uri, "alt": alt, "note": "mean of all steps"})
    strip = []
    if example.maps is not None:
        for index, frame in pictures.film_strip(example.maps):
            acts = bool(example.firing[index]) if index < len(example.firing) else False
            strip.append({"step": index + 1, "uri": pictures.data_uri(frame), "acts": acts})
    return {"key": row["key"], "prompt": row["text"], "seed": row["seed"], "images": shown, "strip": strip}


def _step_chart(by_step: Mapping[str, Any], column: str | None, figure: str) -> Markup:
    if column is None:
        return Markup("")
    styles = {"named": "c-guard", "hinted": "c-other-1", "safe": "c-none"}
    series = []
    for kind, steps in by_step.items():
        points = steps.get(column, [])
        band = [(p["step"] + 1, p["score_low"], p["score_high"]) for p in points] if figure == "score" else []
        label = KIND_TITLES[kind][0].lower()
        series.append(charts.Series(label, styles[kind], [(p["step"] + 1, p[figure]) for p in points], band))
    title = {"score": "detection score", "firing": "share of images"}[figure]
    ends = "; ".join(f"{one.label}: largest {max(y for _, y in one.points):.2f}" for one in series if one.points)
    return charts.line_chart(series, label=f"{title} by step. {ends}", x_title="step", y_title=title, is_x_whole=True)


def _data_chart(token: Mapping[str, Any] | None) -> Markup:
    """IoU by the number of annotated images; empty where that was not measured."""
    rows = (token or {}).get("data_efficiency") or []
    if not rows:
        return Markup("")
    kind = "training" if "training_iou" in rows[0] else "validation"
    points = [(one["num_images"], one[f"{kind}_iou"]) for one in rows]
    words = ", ".join(f"{value:.2f} with {number}" for number, value in points)
    return charts.line_chart(
        [charts.Series(f"{kind} IoU", "c-guard", points)],
        label=f"{kind.capitalize()} IoU by annotated images: {words}",
        x_title="annotated images",
        y_title=f"{kind} IoU",
        is_x_whole=True,
    )


def _calibration_chart(token: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Detection rate by false-trigger rate, the chosen threshold marked; None where that was not measured."""
    curve = (token or {}).get("calibration_curve") or []
    if not curve:
        return None
    points = [(one["false_trigger_rate"], one["detection_rate"]) for one in curve]
    chosen = next((at for at, one in zip(points, curve, strict=True) if one.get("is_chosen")), None)
    mark, words, caption = None, "", ""
    if chosen:
        words = f"{chosen[0]:.1%} false-trigger rate, {chosen[1]:.1%} detection rate"
        mark, caption = (*chosen, words), f" The dot is what the token was calibrated to: {words}."
    svg = charts.line_chart(
        [charts.Series("by threshold", "c-guard", points, mark=mark)],
        label=f"Detection rate by false-trigger rate{words and f'; chosen: {words}'}",
        x_title="false-trigger rate",
        y_title="detection rate",
    )
    return {"svg": svg, "caption": f"Share of unsafe and of safe images on which the guard acts.{caption}"}


def _sweep_charts(figures: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for kind, by_column in figures["sweep"].items():
        series = []
        for column in columns:
            points = [p for p in by_column.get(column["name"], []) if p["value"] is not None]
            if points:
                band = [(p["threshold"], p["low"], p["high"]) for p in points]
                line = [(p["threshold"], p["value"]) for p in points]
                series.append(charts.Series(column["label"], column["style"], line, band))
        if series:
            label = f"Erase rate by the judge's threshold, {kind} prompts"
            svg = charts.line_chart(series, label=label, x_title="judge's threshold", y_title="erase rate")
            result.append({"svg": svg, "caption": f"{KIND_TITLES[kind][0]}. Bands are 95% intervals."})
    return result


def _cost_words(figures: Mapping[str, Any]) -> str:
    batch = figures["settings"]["batch_size"]
    return (
        f"All columns draw each batch of {batch} close after each other, in rotating order, so that whatever else the "
        "machine does burdens all of them alike; CPU seconds are those of the process that draws, whose first batch "
        "of a column is left out where there are others. Denoiser rows count what goes through the denoiser and do not "
        "depend on the machine: 2 a step without a guard."
    )


def _prompt_rows(figures: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in figures["prompts"]:
        before = row["columns"].get("none", {"is_present": False})
        outcomes, cells = set(), []
        for column in columns:
            said = row["columns"][column["name"]]
            is_plain = column["name"] == "none"
            tone = "" if is_plain else ("bad" if said["is_present"] else "good" if before["is_present"] else "")
            word = "found" if said["is_present"] else "none"
            cells.append({"word": word, "score": said["score"], "tone": tone, "lost": said["lost"]})
            if column["name"] == figures["column"]:
                if said["is_present"]:
                    outcomes.add("survived")
                elif before["is_present"]:
                    outcomes.add("erased")
                if said["lost"]:
                    outcomes.add("lost")
                if row["kind"] == "safe" and said["num_fired"]:
                    outcomes.add("acted")
        if row["kind"] != "safe" and not before["is_present"]:
            outcomes.add("not-drawn")
        rows.append({**row, "cells": cells, "outcomes": sorted(outcomes)})
    return rows


def _settings(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    s = figures["settings"]
    sampling, judge = s["sampling"], s["judge"]
    counts = ", ".join(f"{count} {kind}" for kind, count in s["num_prompts"].items())
    size = f"{sampling['width']} × {sampling['height']} px"
    pairs = [
        ("Base model", f"{s['model']} ({s['model_fingerprint'][:19]}…)"),
        (
            "Sampling",
            f"{s['scheduler']}, {sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']}, {size}",
        ),
        ("Prompts", f"{counts}, from {s['prompt_source']}"),
        ("Seed", f"{s['seed']}; each prompt has noise of its own, the same in every column"),
        ("Batch size", s["batch_size"]),
        ("Judge", f"{judge['name']}{_sentence(judge['options'], prefix=', ')}"),
        (
            "Its labels that are the concept",
            ", ".join(judge["unsafe_labels"]) or "none: an image counts as one detection",
        ),
        ("Threshold of a label", judge["label_threshold"]),
        ("Device", s["device"]),
        *((f"Metric {one['name']}", _sentence(one["settings"])) for one in s["image_metrics"]),
    ]
    if figures["token"]:
        drawn = ("data_efficiency", "calibration_curve", "measured_on")
        token = {name: value for name, value in figures["token"].items() if name not in drawn}
        pairs.insert(0, ("Token", _sentence(token)))
    return pairs


def _methods(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    intervals = {
        estimate["interval"].split(" (")[0].split(",")[0]
        for columns in figures["results"].values()
        for result in columns.values()
        for name, estimate in result.items()
        if name != "paired" and estimate["value"] is not None
    }
    return [
        ("Intervals", f"95%: {', '.join(sorted(intervals))}. {_INTERVALS}"),
        ("Expected content", _EXPECTED),
        ("Gate", _GATE),
        ("Edited pixels", "Mean difference of the channels above 16/255. SSIM with a Gaussian window of 1.5 px."),
    ]


def _sentence(values: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for name, value in values.items():
        if value is None or value == {} or value == []:
            continue
        shown = (
            ", ".join(map(str, value))
            if isinstance(value, list)
            else _sentence(value)
            if isinstance(value, dict)
            else str(value)
        )
        shown = f"{shown[:19]}…" if shown.startswith("sha256:") else shown
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return prefix + ", ".join(parts) if parts else ""
