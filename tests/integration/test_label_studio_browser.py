"""An annotator's way through Label Studio's own page, in headless Chromium.

Skipped, loudly, where there is no Playwright or no Chromium, but never in CI. With ``DAGKIT_SCREENSHOTS=FOLDER`` it
writes the pictures of docs/annotation.md.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from label_studio_sdk.converter import brush
from label_studio_server import DRAWN, read_mask
from PIL import Image, ImageDraw

from annotator_page import find_chromium, is_hidden, log_in, open_browser, open_task, reveal, stroke, submit
from dagkit.concept import Concept
from dagkit.dataset import load_dataset
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.server import Login
from dagkit.stages import push
from dagkit.workspace import Workspace
from interruption import finish

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]

WIDTH, HEIGHT = 256, 192
PAPER, DISC, CUSHION = (122, 170, 153), (51, 51, 51), (204, 51, 51)


@pytest.fixture
def page(login: Login) -> Iterator[Page]:
    """A page of a browser that reaches the server only; every other address that it asks for fails the test."""
    if not os.environ.get("CI"):
        if find_chromium() is None:
            pytest.skip("NO CHROMIUM: the browser test did not run (Debian: apt-get install chromium)")
        pytest.importorskip("playwright", reason="NO PLAYWRIGHT: the browser test did not run (pip install playwright)")
    with open_browser(login) as page:
        yield page


def workspace_with_discs(root: Path, concept: Concept) -> Workspace:
    """Two images with a dark disc, of which the pre-mask covers the left three quarters, and a harmless cushion."""
    workspace = Workspace(root)
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 50, 140, 130), fill=DISC)
    draw.rectangle((170, 90, 230, 150), fill=CUSHION)
    disc = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(disc).ellipse((60, 50, 140, 130), fill=255)
    disc.paste(0, (120, 0, WIDTH, HEIGHT))
    candidates, premasks = workspace.stage("candidates", concept.name), workspace.stage("premasks", concept.name)
    for seed, key in enumerate(["first", "second"]):
        candidates.write_image(f"images/{key}.png", image)
        row = {"key": key, "image": f"images/{key}.png", "prompt": "discs", "kind": "unsafe", "seed": seed}
        candidates.append({**row, **DRAWN})
        premasks.write_image(f"masks/{key}-weapon.png", disc)
        premasks.append(
            {
                "key": key,
                "masks": {"weapon": {"path": f"masks/{key}-weapon.png", "score": 0.83, "boxes": [[60, 50, 119, 130]]}},
                "proposers": [{"name": "attention", "version": "1"}],
                "segmenter": {"name": "sam", "version": "1"},
                "score": 0.83,
            }
        )
    return workspace


def photograph(page: Page, name: str) -> None:
    if folder := os.environ.get("DAGKIT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / name)


def shown(page: Page) -> np.ndarray:
    """(H, W, 3) what the annotator sees of the image, scaled back to its own size."""
    data = page.screenshot(clip=page.locator(".dagkit-image .lsf-image").bounding_box())
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((WIDTH, HEIGHT)), int)


def test_annotator_corrects_a_mask(
    page: Page, client: Client, login: Login, concept: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_with_discs(tmp_path / "runs", concept)
    data_manager = push.run(workspace, concept, client=client).data["url"]
    task_ids = {row["key"]: row["task_id"] for row in workspace.stage("labeling", concept.name).rows()}

    log_in(page, login)
    page.goto(data_manager)
    page.locator("[data-testid=table-row]").first.wait_for()
    photograph(page, "data-manager.png")
    assert page.locator("img[src*='/data/upload/']").count() == 0, "the data manager shows an image"

    open_task(page, f"{data_manager}?labeling=1")
    assert is_hidden(page), "the image is shown before it was asked for"
    photograph(page, "task-hidden.png")

    reveal(page)
    photograph(page, "task-shown.png")
    before = shown(page)
    assert np.abs(before[20, 20] - PAPER).max() < 25, "the paper is not shown as it is"
    assert before[90, 90, 0] - before[90, 90, 1] > 40, "the pre-mask does not tint the left of the disc"
    assert np.abs(before[90, 132] - DISC).max() < 25, "the right of the disc is not free"

    page.locator(".lsf-outliner-item").first.click()
    stroke(page, "brush", [(130, 62), (132, 118)], WIDTH)
    page.wait_for_timeout(500)
    after = shown(page)
    assert after[90, 131, 0] - after[90, 131, 1] > 40, "the brush left no mark"
    photograph(page, "task-changed.png")
    submit(page)
    page.wait_for_function("() => document.body.innerText.includes('2 of 2')")
    page.locator(".lsf-outliner-item").first.wait_for()
    assert is_hidden(page), "the next image is shown before it was asked for"

    monkeypatch.setenv("LABEL_STUDIO_API_KEY", login.token)
    where = ("--concept", concept.name, "--workspace", workspace.root, "--label-studio", login.url)
    pulled, built = map(json.loads, finish("export", *where, "--json", "--quiet").splitlines())
    assert (pulled["states"], built["done"]) == ({"changed": 1}, 1)
    annotations = workspace.stage("annotations", concept.name)
    row = annotations.rows()[0]
    premask = read_mask(workspace.stage("premasks", concept.name).path / "masks/first-weapon.png")
    corrected = read_mask(annotations.path / row["masks"]["weapon"])

    task = client.request("GET", f"/api/tasks/{task_ids['first']}")
    regions = [region for region in task["annotations"][0]["result"] if region["type"] == "brushlabels"]
    layers = [brush.decode_rle(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3] for region in regions]
    expected = np.max(layers, axis=0) > 127
    assert np.array_equal(corrected, expected)
    assert corrected[90, 131]
    assert not premask[90, 131]
    assert corrected[90, 90]
    iou = (premask & expected).sum() / (premask | expected).sum()
    assert row["iou_to_premask"] == pytest.approx(iou)
    assert 0.3 < iou < 1
    assert row["state"] == "changed"
    assert row["seconds"] > 0

    ((exported,),) = [rows for rows in load_dataset(built["path"]).values() if len(rows)]
    assert (exported["key"], exported["review_state"], exported["is_changed"]) == ("first", "changed", True)
    assert exported["iou_to_premask"] == pytest.approx(iou)
    assert np.array_equal(np.asarray(exported["mask"]) > 127, expected)
