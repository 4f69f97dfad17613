"""Which figures the report draws, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from dagkit.report import charts
from dagkit.report.wording import KIND_TITLES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def plane(figures: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> Markup:
    """Erase rate against what else is kept, a point a column and kind of prompt."""
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


def step_chart(by_step: Mapping[str, Any], column: str | None, figure: str) -> Markup:
    """A figure of the guarded runs by step; empty where no run was guarded."""
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


def data_chart(token: Mapping[str, Any] | None) -> Markup:
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


def calibration_chart(token: Mapping[str, Any] | None) -> dict[str, Any] | None:
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


def sweep_charts(figures: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Erase rate by the judge's threshold, a chart a kind of prompt."""
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
