"""A reader's way through the report, in headless Chromium, without any network.

Skipped, loudly, where there is no Playwright or no Chromium, but never in CI. With ``DAGKIT_SCREENSHOTS=FOLDER`` it
writes pictures of the page.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from annotator_page import FLAGS, find_chromium
from dagkit import report
from scene_columns import NUM_STEPS, scene_columns, scene_examples, scene_figures, scene_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

NUM = 4
WORST_CONTRAST = """() => {
  const parse = text => {
    const numbers = (text.match(/[\\d.]+/g) || []).map(Number);
    return numbers.length === 4 ? numbers : [...numbers, 1];
  };
  const linear = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const paper = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  let worst = [99, ""];
  const tags = "p, td, th, dd, dt, li, h1, h2, h3, figcaption, small, b, a, label";
  for (const element of document.querySelectorAll(tags)) {
    const text = (element.innerText || "").trim();
    if (!text || element.closest(".skip, .cover")) continue;
    const [ink, back] = [light(parse(getComputedStyle(element).color)), light(paper(element))];
    const ratio = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${element.tagName}.${element.className}: ${text.slice(0, 40)}`];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    columns = scene_columns()
    folder = tmp_path_factory.mktemp("report")
    run = scene_run(folder / "run", NUM, columns)
    figures = scene_figures(run, columns)
    rates = [(0.4, 1.0), (0.1, 0.975), (0.025, 0.95), (0.0, 0.7)]
    figures["token"]["calibration_curve"] = [
        {"false_trigger_rate": false, "detection_rate": found, "is_chosen": false == 0.025} for false, found in rates
    ]
    html = report.render(figures, scene_examples(run, columns, 2))
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = find_chromium()
    if not os.environ.get("CI"):
        if chromium is None:
            pytest.skip("NO CHROMIUM: the browser test did not run (Debian: apt-get install chromium)")
        pytest.importorskip("playwright", reason="NO PLAYWRIGHT: the browser test did not run (pip install playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Page]:
    """The report in a new page; a request, an error or a warning on its console fails the test."""
    page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme="light")
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert complaints == []


def visible(page: Page) -> int:
    """How many pictures can be seen."""
    script = "images => images.filter(image => getComputedStyle(image).visibility === 'visible').length"
    count: int = page.eval_on_selector_all(".cover img", script)
    return count


def test_pictures_are_hidden_until_asked_for(page: Page) -> None:
    num_pictures = page.locator(".cover img").count()
    assert num_pictures == 3 * 2 * 4
    assert visible(page) == 0
    first = page.locator(".cover").first
    first.scroll_into_view_if_needed()
    first.click()
    assert visible(page) == 1
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the next one, by keyboard alone
    assert visible(page) == 2
    first.click()
    assert visible(page) == 1
    page.get_by_label("Show all pictures").check()
    assert visible(page) == num_pictures
    if os.environ.get("DAGKIT_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["DAGKIT_SCREENSHOTS"]) / "report-open.png", full_page=True)
    page.get_by_label("Show all pictures").uncheck()
    assert visible(page) == 1


def test_film_strips_are_as_wide_as_their_pictures(page: Page) -> None:
    strips = page.locator(".strip")
    assert strips.count() == 3 * 2
    frames = strips.first.locator("img")
    assert frames.count() == NUM_STEPS
    boxes = [frame.bounding_box() for frame in frames.all()]
    assert all(left["x"] + left["width"] < right["x"] for left, right in itertools.pairwise(boxes))
    assert min(box["width"] for box in boxes) > 20


def test_the_chosen_point_of_the_calibration_can_be_read(page: Page) -> None:
    note, chart = page.locator("#data .note").bounding_box(), page.locator("#data svg").bounding_box()
    assert note["x"] >= chart["x"]
    assert note["x"] + note["width"] <= chart["x"] + chart["width"]
    assert page.locator("#data .note").inner_html() == "2.5% false-trigger rate, 95.0% detection rate"


def test_hidden_pictures_stay_hidden_in_print(page: Page) -> None:
    page.emulate_media(media="print")
    assert visible(page) == 0
    assert page.locator("nav").is_hidden()


def test_prompts_are_filtered(page: Page) -> None:
    rows = page.locator("table.prompts tbody tr:visible")
    assert rows.count() == 3 * NUM
    page.get_by_label("Kind").select_option("hinted")
    assert rows.count() == NUM
    assert page.locator("#filter-count").inner_text() == f"{NUM} of {3 * NUM} prompts"
    page.get_by_label("Outcome").select_option("survived")
    assert rows.count() == 0
    page.get_by_label("Outcome").select_option("erased")
    assert rows.count() == NUM
    page.get_by_label("Words").fill("no such words")
    assert rows.count() == 0


def test_sections_are_reached_from_the_top(page: Page) -> None:
    for link in page.locator("nav a").all():
        target = link.get_attribute("href")
        link.click()
        assert page.locator(target).count() == 1
        assert page.evaluate("location.hash") == target
    page.locator("#settings").scroll_into_view_if_needed()
    assert page.get_by_text("DDIMScheduler, 25 steps").is_visible()


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, path: Path, width: int) -> None:
    """Wide tables scroll inside; the page itself never moves sideways."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    page.get_by_label("Show all pictures").check()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: Any, path: Path, scheme: str) -> None:
    """Every text is at least 4.5 : 1 against its background (WCAG 2.2, AA)."""
    page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    worst = page.evaluate(WORST_CONTRAST)
    page.close()
    assert worst[0] >= 4.5, worst
