from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dagkit import evaluation, report
from dagkit.report import pictures
from scene_columns import NUM_STEPS, scene_columns, scene_examples, scene_figures, scene_run

NUM = 3


class _Page(HTMLParser):
    """Attributes of every element, by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def figures_and_examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list]:
    columns = scene_columns()
    run = scene_run(tmp_path_factory.mktemp("run"), NUM, columns)
    return scene_figures(run, columns), scene_examples(run, columns, 2)


@pytest.fixture(scope="module")
def html(figures_and_examples: tuple[dict, list]) -> str:
    return report.render(*figures_and_examples)


@pytest.fixture(scope="module")
def page(html: str) -> _Page:
    return _Page(html)


def test_page_is_well_formed_and_holds_all_that_it_shows(page: _Page, html: str) -> None:
    assert page.open == []
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not page.all("link")
    assert all("src" not in script for script in page.all("script"))
    assert not re.findall(r"url\(|@import|https?://", html)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_every_picture_is_hidden_behind_a_labelled_checkbox(page: _Page) -> None:
    covers = [label for label in page.all("label") if label.get("class") == "cover"]
    boxes = [box for box in page.all("input") if (box.get("aria-label") or "").startswith("Show ")]
    assert len(covers) == len(boxes) == 3 * 2 * 4  # kinds x examples x (three columns and the detection map)
    assert all("checked" not in box for box in page.all("input"))


def test_alt_texts_say_which_picture_not_what_is_in_it(page: _Page) -> None:
    alts = [image["alt"] for image in page.all("img")]
    assert all(alts)
    assert not any(word in alt for alt in alts for word in ("bomb", "knife", "axe", "dynamite"))
    assert "No guard, named prompt 1; judge: concept found" in alts


def test_rates_stand_with_counts_and_intervals(html: str, figures_and_examples: tuple[dict, list]) -> None:
    erased = figures_and_examples[0]["results"]["named"]["dagkit"]["erase_rate"]
    assert f"{erased['low']:.0%} – 100% · {NUM}/{NUM}" in html
    assert "Wilson" in html
    assert "McNemar" in html


def test_settings_of_every_figure_are_on_the_page(html: str) -> None:
    for words in (
        "DDIMScheduler, 25 steps, guidance 5.0, 64 × 64 px",
        "3 named, 3 hinted, 3 safe",
        "bomb, knife",
        "0.0.0",
    ):
        assert words in html


def test_text_from_prompts_is_escaped(figures_and_examples: tuple[dict, list]) -> None:
    figures, examples = figures_and_examples
    hostile = "</td><script>alert(1)</script>\"' onload="
    prompts = [{**row, "text": hostile} for row in figures["prompts"]]
    page = _Page(report.render({**figures, "prompts": prompts, "title": hostile}, examples))
    assert len(page.all("script")) == 1
    assert page.all("tr")[-1]["data-text"] == hostile.lower()


def test_page_without_traces_or_baselines_is_whole(figures_and_examples: tuple[dict, list]) -> None:
    figures, _ = figures_and_examples
    named = {"none": figures["results"]["named"]["none"], "dagkit": dict(figures["results"]["named"]["dagkit"])}
    named["dagkit"].pop("fired")
    shown = {**figures["settings"], "columns": figures["settings"]["columns"][:2]}
    rows = [row for row in figures["prompts"] if row["kind"] == "named"]
    small = {
        **figures,
        "results": {"named": named},
        "settings": shown,
        "prompts": rows,
        "detection_by_step": {"named": {}},
    }
    page = _Page(report.render(small, []))
    assert page.open == []
    assert not page.all("img")
    assert "detection" not in [section.get("id") for section in page.all("section")]


def test_agreement_and_detection_are_shown_where_they_were_measured(
    figures_and_examples: tuple[dict, list], html: str
) -> None:
    figures, examples = figures_and_examples
    assert "How far the judges agree" not in html
    assert "Against masks" not in html
    share = figures["results"]["named"]["dagkit"]["erase_rate"]
    pair = {"first": "demo", "second": "clip", "share": share, "kappa": 0.5, "first_only": 1, "second_only": 0}
    names = ("iou", "precision", "recall", "image_recall", "false_trigger")
    detection = {"words": "2 images", "dataset": "sha256:0", "rows": [{"level": 0.7, **dict.fromkeys(names, share)}]}
    passed = dict.fromkeys(("stop", "second_look", "all"), share)
    spent = {"num_queries": 24, "num_drawn": 40, "num_refused": 0}
    attack = {**dict.fromkeys(("static", "attacked"), share), "passed": passed, **spent}
    text = report.render({**figures, "agreement": [pair], "detection": detection, "attack": attack}, examples)
    assert "Against an adversary" in text
    assert "Against an adversary" not in html
    assert "demo, clip" in text
    assert "noise level 0.7" in text


def test_the_version_before_stands_beside(figures_and_examples: tuple[dict, list], html: str) -> None:
    figures, examples = figures_and_examples
    rows = evaluation.compare(figures, figures, "dagkit")
    rows[0] = {**rows[0], "before": 0, "after": 3, "num_worse": 3, "p_value": 0.25, "is_worse": True}
    text = report.render({**figures, "against": {"token": "weapon@0.9.0", "rows": rows}}, examples)
    assert "Beside weapon@0.9.0" in text
    assert "Beside weapon" not in html
    cells = '<td class="n">0/3</td><td class="n">3/3</td><td class="n">3</td><td class="n">0</td>'
    assert f'shows the concept, named</th>{cells}<td><span class="tag bad">worse</span>' in text


def test_figures_of_images_have_a_column_each(figures_and_examples: tuple[dict, list], html: str) -> None:
    figures, examples = figures_and_examples
    ssim = figures["results"]["named"]["dagkit"]["ssim"]
    assert f"{ssim['value']:.3f}<small>{ssim['low']:.3f} – {ssim['high']:.3f} · {NUM}</small>" in html
    measured = [
        {"name": "clip_score", "title": "CLIP score", "settings": {"checkpoint": "acme/clip"}},
        {"name": "fid", "title": "FID", "settings": {"width": 2048}},
    ]
    estimate = {"value": 23.456, "low": 20.0, "high": 30.0, "count": 3, "total": 3, "interval": "bootstrap"}
    results = {
        kind: {name: {**result, "clip_score": estimate} for name, result in columns.items()}
        for kind, columns in figures["results"].items()
    }
    changed = {**figures, "results": results, "settings": {**figures["settings"], "image_metrics": measured}}
    text = report.render(changed, examples)
    assert text.count("23.46<small>20.00 – 30.00 · 3</small>") == 3 * 3  # kinds x columns, the unguarded one included
    assert "acme/clip" in text
    assert "compare them at equal counts only" in text
    assert "compare them at equal counts only" not in html


def test_data_efficiency_is_plotted_where_it_was_measured(figures_and_examples: tuple[dict, list], html: str) -> None:
    figures, examples = figures_and_examples
    curve = [{"num_images": size, "validation_iou": iou} for size, iou in ((2, 0.2), (8, 0.5), (32, 0.61))]
    text = report.render({**figures, "token": {**figures["token"], "data_efficiency": curve}}, examples)
    assert "Validation IoU by annotated images: 0.20 with 2, 0.50 with 8, 0.61 with 32" in text
    assert "How much data it needs" not in html


def test_training_figures_are_called_so(figures_and_examples: tuple[dict, list]) -> None:
    figures, examples = figures_and_examples
    curve = [{"num_images": 2, "training_iou": 0.2}, {"num_images": 8, "training_iou": 0.5}]
    made = {"data_efficiency": curve, "calibration_curve": CURVE, "measured_on": "the training's own unsafe images"}
    text = report.render({**figures, "token": {**figures["token"], **made}}, examples)
    assert "Training IoU by annotated images: 0.20 with 2, 0.50 with 8" in text
    section = text[text.index('<section id="data"') :]
    section = section[: section.index("</section>")]
    assert "<p>Measured on the training&#39;s own unsafe images when the token was optimised.</p>" in section
    assert "validation" not in section.lower()
    assert "<p>Measured on validation images when" in with_curve(figures_and_examples, CURVE)


CURVE = [
    {"deviations": 0.0, "false_trigger_rate": 0.5, "detection_rate": 1.0},
    {"deviations": 1.5, "false_trigger_rate": 0.125, "detection_rate": 0.96875, "is_chosen": True},
    {"deviations": 3.0, "false_trigger_rate": 0.0, "detection_rate": 0.75},
]


def with_curve(figures_and_examples: tuple[dict, list], curve: list[dict] | None) -> str:
    figures, examples = figures_and_examples
    return report.render({**figures, "token": {**figures["token"], "calibration_curve": curve}}, examples)


def test_each_member_of_the_concept_is_shown(figures_and_examples: tuple[dict, list]) -> None:
    figures, examples = figures_and_examples
    one = {"name": "knife <b>", "count": 12, "early_rate": 0.75, "iou": 0.5, "num_held_out": 2, "detection_rate": 1.0}
    shown = report.render({**figures, "token": {**figures["token"], "slices": [one]}}, examples)
    section = shown.split("Member by member")[1].split("What else changed")[0]
    for member in figures["members"]:
        assert f'<th scope="col">{member}</th>' in section
    assert section.count('<th scope="row">') == 2  # the columns, the baseline aside
    assert "the token sees in time: knife &lt;b&gt; 75% of 12 (IoU 0.50)." in section
    assert "Member by member" not in report.render({**figures, "members": {}}, examples)
    member = next(iter(figures["members"]))
    assert f"members,{member},dagkit,erase_rate,1.0," in report.to_csv(figures)


def test_calibration_curve_is_drawn_with_what_was_chosen(figures_and_examples: tuple[dict, list], html: str) -> None:
    text = with_curve(figures_and_examples, CURVE)
    words = "12.5% false-trigger rate, 96.9% detection rate"
    assert f'aria-label="Detection rate by false-trigger rate; chosen: {words}"' in text
    section = text[text.index('<section id="data"') :]
    section = section[: section.index("</section>")]
    assert 'points="544.0,14.0 181.0,20.4 60.0,65.5"' in section
    assert '<circle class="dot c-guard" cx="181.0" cy="20.4" r="6"/>' in section
    assert f'text-anchor="start">{words}</text>' in section
    assert f"The dot is what the token was calibrated to: {words}." in section
    assert "How much data it needs" not in text
    assert "deviations" not in text  # the curve is drawn, not written into the settings
    assert _Page(text).open == []
    assert "When it counts as sure" not in html


def test_a_curve_without_a_chosen_point_is_drawn_without_a_mark(figures_and_examples: tuple[dict, list]) -> None:
    text = with_curve(figures_and_examples, [{**point, "is_chosen": False} for point in CURVE])
    assert 'aria-label="Detection rate by false-trigger rate"' in text
    assert "The dot is what" not in text
    assert "When it counts as sure" not in with_curve(figures_and_examples, None)


def test_film_strip_shows_each_step_and_whether_the_guard_acted(
    figures_and_examples: tuple[dict, list], html: str, page: _Page
) -> None:
    figures, examples = figures_and_examples
    strips = [one["aria-label"] for one in page.all("div") if one.get("class") == "strip"]
    assert strips == [f"Detection map by step, {one.key}" for one in examples]
    frames = [image for image in page.all("img") if image["alt"].startswith("Detection map at step")]
    assert [image["alt"] for image in frames[:NUM_STEPS]] == [
        f"Detection map at step {step}" for step in range(1, NUM_STEPS + 1)
    ]
    wanted = [pictures.data_uri(pictures.heat(frame)) for one in examples for frame in one.maps]
    assert [image["src"] for image in frames] == wanted
    assert html.count('<figcaption class="acts">') == sum(sum(one.firing) for one in examples) > 0
    assert 'class="acts"' not in report.render(figures, [replace(one, firing=[]) for one in examples])
    assert 'class="strip"' not in report.render(figures, [replace(one, maps=None) for one in examples])


def test_small_pictures_are_scaled_without_smoothing(html: str) -> None:
    assert '<body class="pixels"' in html


def test_csv_has_a_line_an_estimate(figures_and_examples: tuple[dict, list]) -> None:
    lines = report.to_csv(figures_and_examples[0]).splitlines()
    assert lines[0] == "section,kind,column,figure,value,low,high,count,total,interval"
    assert any(
        line.startswith("results,named,dagkit,erase_rate,1.0,") and f",{NUM},{NUM},Wilson" in line for line in lines
    )
    assert len(set(lines)) == len(lines)
    assert {line.split(",")[0] for line in lines[1:]} == {"gate", "results", "paired", "members", "cost", "sweep"}


def test_pictures_are_smaller_copies(tmp_path: Path) -> None:
    from PIL import Image

    from dagkit.report.pictures import data_uri

    assert data_uri(Image.new("RGB", (64, 64))).startswith("data:image/png;base64,")
    big = Image.new("RGB", (1024, 512))
    assert data_uri(big).startswith("data:image/jpeg;base64,")
    assert big.size == (1024, 512)
