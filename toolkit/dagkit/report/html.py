"""Figures and examples to one HTML page."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dagkit.report import charts, gallery, plots, wording

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Template

    from dagkit.report.gallery import Example


def render(figures: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """The report as HTML.

    Args:
        figures: the content of ``figures.json`` (see ``docs/evaluation.md``).
        examples: pictures to show, in order.

    Returns:
        A page that loads nothing: style, script and pictures are inside, and its security policy forbids the rest.
    """
    columns = wording.columns_of(figures)
    main = next((column for column in columns if column["style"] == "c-guard"), None)
    kinds = [
        {
            "name": kind,
            "title": wording.KIND_TITLES[kind][0],
            "detail": wording.KIND_TITLES[kind][1],
            "gate": wording.gate_words(kind, figures),
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
        tiles=wording.tiles(figures, main, columns) if main else [],
        plane=plots.plane(figures, columns),
        comparisons=wording.comparisons(figures, main, columns) if main else [],
        examples=gallery.groups_of(figures, examples, columns),
        num_examples=max(
            (sum(e.key.startswith(f"{kind}-") for e in examples) for kind in figures["results"]), default=0
        ),
        has_traces=guarded is not None,
        score_chart=plots.step_chart(by_step, guarded, "score"),
        firing_chart=plots.step_chart(by_step, guarded, "firing"),
        data_chart=plots.data_chart(figures["token"]),
        calibration_chart=plots.calibration_chart(figures["token"]),
        measured_on=(figures["token"] or {}).get("measured_on", "validation images"),
        sweep_charts=plots.sweep_charts(figures, columns),
        cost_words=wording.cost_words(figures),
        rows=wording.prompt_rows(figures, columns),
        outcomes=wording.OUTCOMES,
        settings=wording.settings_of(figures),
        methods=wording.methods(figures),
        bar=charts.interval_bar,
        whole=lambda value: f"{value:g}" if value == int(value) else f"{value:.1f}",
        ratio=wording.ratio,
        fixed=wording.fixed,
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
