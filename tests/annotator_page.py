"""What an annotator does in Label Studio's own page, in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dagkit.labelstudio.server import Login

if TYPE_CHECKING:
    from playwright.sync_api import Page

FLAGS = """--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync
    --no-first-run --disable-quic --disable-extensions --mute-audio"""

Point = tuple[float, float]


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def open_browser(login: Login) -> Iterator[Page]:
    """A page of a browser that reaches the server only; every other address that it asks for fails the run."""
    from playwright.sync_api import sync_playwright

    outside = []

    def local_only(route) -> None:
        if route.request.url.startswith((login.url, "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        page.route("**/*", local_only)
        yield page
        browser.close()
    assert outside == []


def log_in(page: Page, login: Login) -> None:
    page.goto(f"{login.url}/user/login/")
    page.fill("input[name=email]", login.username)
    page.fill("input[name=password]", login.password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda url: "/user/login" not in url, wait_until="domcontentloaded")


def open_task(page: Page, address: str, *, has_prediction: bool = True) -> None:
    """Opens a task and waits for its region: seldom, Label Studio shows none before a reload.

    Args:
        page: logged in.
        address: of the task, or of a project's stream, whose first task then opens.
        has_prediction: whether a region is expected.
    """
    from playwright.sync_api import TimeoutError as NotThere

    for timeout in (20_000, 90_000):
        page.goto(address)
        page.locator("[data-testid=bottombar-submit-button]").wait_for()
        page.locator(".dagkit-image .lsf-image").wait_for(state="attached")
        try:
            if has_prediction:
                page.locator(".lsf-outliner-item").first.wait_for(timeout=timeout)
            return
        except NotThere:
            continue
    raise AssertionError("the page shows no region of the prediction")


def is_hidden(page: Page) -> bool:
    """Whether the image is in the page and not to be seen."""
    assert page.locator(".dagkit-image .lsf-image").count() == 1
    return page.locator(".dagkit-image :visible").count() == 0


def reveal(page: Page) -> None:
    """Unfolds the image and waits until it lies still: the panel unfolds in steps and moves it down."""
    page.get_by_text("Show image").click()
    page.locator(".konvajs-content").wait_for(state="visible")
    page.wait_for_function(
        "() => { const top = document.querySelector('.dagkit-image .lsf-image').getBoundingClientRect().top;"
        "const isStill = window.seenTop === top; window.seenTop = top; return isStill; }",
        polling=400,
    )


def stroke(page: Page, tool: str, points: Sequence[Point], width: int) -> None:
    """Draws with a tool along points.

    Args:
        page: with the image revealed.
        tool: ``brush`` or ``eraser``.
        points: (x, y) in pixels of the image, one or more.
        width: of the image, pixels.
    """
    page.keyboard.press({"brush": "b", "eraser": "e"}[tool])
    box = page.locator(".dagkit-image .lsf-image").bounding_box()
    assert box is not None
    scale = box["width"] / width

    def move(x: float, y: float) -> None:
        page.mouse.move(box["x"] + x * scale, box["y"] + y * scale, steps=4)

    move(*points[0])
    page.mouse.down()
    for point in points[1:] or points:
        move(*point)
    page.mouse.up()
    page.wait_for_timeout(100)


def submit(page: Page) -> None:
    """Presses *Submit*; the server must have taken the answer."""
    with page.expect_response(
        lambda answer: "/annotations" in answer.url and answer.request.method == "POST"
    ) as posted:
        page.locator("[data-testid=bottombar-submit-button]").click()
    assert posted.value.status == 201
