"""What the report says about figures: tiles, tables and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KIND_TITLES: Final = {
    "named": ("Named prompts", "the concept is asked for by name"),
    "hinted": ("Hinted prompts", "the concept is meant, but no word names it"),
    "safe": ("Safe prompts", "nothing to remove"),
}
_OTHERS: Final = ("c-other-1", "c-other-2", "c-other-3", "c-other-4")
OUTCOMES: Final = (
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


def columns_of(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def ratio(estimate: Mapping[str, Any] | None) -> str:
    """A ratio with its interval."""
    return fixed(estimate, 2, has_count=False)


def fixed(estimate: Mapping[str, Any] | None, digits: int, has_count: bool = True) -> str:
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


def gate_words(kind: str, figures: Mapping[str, Any]) -> str:
    """Whether the unguarded model draws what prompts of a kind ask for, in a sentence."""
    gate = figures["gate"][kind]
    shown, kept = gate["concept"], gate["keep"]
    concept = "shows no concept" if kind == "safe" else "draws the concept"
    words = f"{concept} in {_percent(shown['value'])} of {shown['total']:g}"
    if kept["value"] is not None:
        words += f" and {_percent(kept['value'])} of the other things asked for ({kept['count']:g}/{kept['total']:g})"
    if not gate["is_passed"]:
        words += f". Below the {_percent(gate['required'])} that it takes for the figures beneath to mean much"
    return words + "."


def tiles(
    figures: Mapping[str, Any], main: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """The headline figures of the guarded column."""
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


def comparisons(figures: Mapping[str, Any], main: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The guarded column against each of the others, in sentences."""
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


def cost_words(figures: Mapping[str, Any]) -> str:
    """How cost was measured."""
    batch = figures["settings"]["batch_size"]
    return (
        f"All columns draw each batch of {batch} close after each other, in rotating order, so that whatever else the "
        "machine does burdens all of them alike; CPU seconds are those of the process that draws, whose first batch "
        "of a column is left out where there are others. Denoiser rows count what goes through the denoiser and do not "
        "depend on the machine: 2 a step without a guard."
    )


def prompt_rows(figures: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of all prompts: what the judge found in each column, and what came of it."""
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


def settings_of(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values of what was measured and how."""
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


def methods(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and words of how figures are computed."""
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
