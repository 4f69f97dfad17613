"""Makes datasets/weapon-demo by dagkit's own pipeline, reviewed in Label Studio's own page.

Run it from the repository, once for every new base model that ships::

    python tests/make_weapon_demo.py draw    # candidates, pre-masks, and sheets of them to look at
    python tests/make_weapon_demo.py review  # carries out weapon_demo_decisions.json, writes datasets/weapon-demo

Between the two somebody looks at the sheets and writes down, for each candidate, what an annotator shall do with it:
``accept`` the proposal, answer ``empty`` or ``cannot_tell``, or go over areas with the brush or the eraser::

    {"00003-1f2e3d4c": [{"tool": "eraser", "area": [[40, 12], [52, 12], [46, 30]]}], ...}

Areas are polygons in pixels of the image. Every task is then opened in headless Chromium, its image revealed,
and the decision carried out with the page's own controls.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image, ImageDraw

from annotator_page import Point, is_hidden, log_in, open_browser, open_task, reveal, stroke, submit
from dagkit import dataset
from dagkit.concept import load_concept
from dagkit.labelstudio.api import Client
from dagkit.labelstudio.config import CANNOT_TELL, NOTHING_UNSAFE
from dagkit.labelstudio.server import EmbeddedServer
from dagkit.stages import export, generate, premask, pull, push
from dagkit.workspace import Workspace
from loopback import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
NAME = "weapon-demo"
NUM_IMAGES, SAFE_SHARE, SEED = 96, 0.5, 7
DECISIONS = Path(__file__).with_name("weapon_demo_decisions.json")
NOTE = (
    "How it was reviewed: every task was opened in Label Studio's own page (version {version}, headless Chromium that "
    "a script drives), its image revealed, the answer given and submitted there. What to answer was decided before, "
    "image by image, looking at contact sheets of images and pre-masks; the decisions are in "
    "tests/weapon_demo_decisions.json of the repository. The one reviewer was a multimodal model, no person; so there "
    "is no agreement to report, and the seconds are the script's."
)
SIDE, ZOOM, COLUMNS = 64, 4, 6


@click.group()
def main() -> None:
    """Makes datasets/weapon-demo."""


@main.command()
@click.option("--workspace", "root", type=click.Path(path_type=Path), default=ROOT / "runs" / NAME)
@click.option("--num-images", default=NUM_IMAGES, show_default=True)
def draw(root: Path, num_images: int) -> None:
    """Draws candidates and pre-masks, and sheets of both."""
    from dagkit import demo
    from dagkit.proposers import build_proposers
    from dagkit.segmenters import build_segmenter

    concept, workspace = load_concept("weapon"), Workspace(root)
    base = demo.load_model()
    click.echo(generate.run(workspace, concept, base, num_images=num_images, safe_share=SAFE_SHARE, seed=SEED).message)
    click.echo(premask.run(workspace, concept, build_proposers(concept, base), build_segmenter(concept)).message)
    candidates, premasks = workspace.stage("candidates", "weapon"), workspace.stage("premasks", "weapon")
    masks = {row["key"]: row["masks"] for row in premasks.rows()}
    tiles = []
    for row in candidates.rows():
        found = masks[row["key"]].get("weapon")
        mask = np.asarray(premasks.read_image(found["path"], "L")) > 127 if found else None
        tiles.append(tile(row["key"], row["prompt"], candidates.read_image(row["image"]), mask))
    for number, start in enumerate(range(0, len(tiles), 4 * COLUMNS)):
        click.echo(sheet(tiles[start : start + 4 * COLUMNS], root / f"sheet-{number}.png"))


def tile(key: str, prompt: str, image: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """One candidate, enlarged, with the outline of its pre-mask and a ruler of 8 pixels."""
    side = image.width * ZOOM
    picture = Image.new("RGB", (side + 6, side + 34), "white")
    picture.paste(image.resize((side, side), Image.Resampling.NEAREST), (0, 34))
    pen = ImageDraw.Draw(picture)
    pen.text((2, 2), key, fill="black")
    pen.text((2, 16), prompt[:42], fill="black")
    for tick in range(0, side, 8 * ZOOM):
        pen.line((tick, 30, tick, 33), fill="black")
        pen.line((side + 1, 34 + tick, side + 4, 34 + tick), fill="black")
    if mask is not None:
        inner = mask.copy()
        inner[1:-1, 1:-1] &= mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        for y, x in zip(*np.nonzero(mask & ~inner), strict=True):
            pen.rectangle((x * ZOOM, 34 + y * ZOOM, (x + 1) * ZOOM - 1, 34 + (y + 1) * ZOOM - 1), outline="magenta")
    return picture


def sheet(tiles: list[Image.Image], path: Path) -> Path:
    width, height = tiles[0].size
    whole = Image.new("RGB", (COLUMNS * width, -(-len(tiles) // COLUMNS) * height), "white")
    for index, one in enumerate(tiles):
        whole.paste(one, (index % COLUMNS * width, index // COLUMNS * height))
    whole.save(path)
    return path


@main.command()
@click.option("--workspace", "root", type=click.Path(path_type=Path), default=ROOT / "runs" / NAME)
@click.option("--decisions", "path", type=click.Path(path_type=Path), default=DECISIONS)
@click.option("--to", type=click.Path(path_type=Path), default=ROOT / "datasets" / NAME)
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder for screenshots of repaired tasks.")
def review(root: Path, path: Path, to: Path, pictures: Path | None) -> None:
    """Carries out the decisions in Label Studio's page, pulls them and writes the dataset."""
    from dagkit.labelstudio.server import VERSION

    concept, workspace = load_concept("weapon"), Workspace(root)
    decisions: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    keys = workspace.stage("premasks", concept.name).keys()
    if missing := sorted(keys - decisions.keys()):
        raise click.ClickException(f"{path}: no decision for {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(folder=Path(folder))
        login = server.up(free_port())
        try:
            with Client(login.url, login.token) as client:
                pushed = push.run(workspace, concept, client=client)
                click.echo(pushed.message)
                with open_browser(login) as page:
                    page.set_viewport_size({"width": 1280, "height": 1200})
                    log_in(page, login)
                    answer_all(page, workspace, pushed.data["url"], decisions, pictures)
                click.echo(pull.run(workspace, concept, client=client).message)
        finally:
            server.down()
    exported = export.run(workspace, concept, licence="apache-2.0", note=NOTE.format(version=VERSION))
    click.echo(exported.message)
    data = dataset.load_dataset(exported.data["path"])
    dataset.write_parquet(data, to, dataset.read_summary(exported.data["path"]))
    click.echo(to)


def answer_all(
    page: Page, workspace: Workspace, project: str, decisions: dict[str, Any], pictures: Path | None
) -> None:
    """Opens each task that nobody answered, looks, and answers."""
    masks = {row["key"]: row["masks"] for row in workspace.stage("premasks", "weapon").rows()}
    for row in workspace.stage("labeling", "weapon").rows():
        key, decision = row["key"], decisions[row["key"]]
        open_task(page, f"{project}?task={row['task_id']}", has_prediction=bool(masks[key]))
        settle(page)
        assert is_hidden(page), f"{key}: the image is shown before it was asked for"
        reveal(page)
        if isinstance(decision, list):
            repair(page, decision, is_new=not masks[key])
        elif decision == "empty":
            page.get_by_text(NOTHING_UNSAFE).click()
        elif decision == "cannot_tell":
            page.get_by_text(CANNOT_TELL).click()
        elif decision != "accept":
            raise click.ClickException(f"{key}: {decision!r} is no decision")
        if pictures and decision != "accept":
            page.screenshot(path=pictures / f"{key}.png")
        submit(page)


def settle(page: Page) -> None:
    """Waits until the page has one image at two looks in a row: while it loads, it may draw its parts twice."""
    page.wait_for_function(
        "() => { const isOne = document.querySelectorAll('.dagkit-image .lsf-image').length === 1;"
        "const isStill = isOne && window.wasOne === true; window.wasOne = isOne; return isStill; }",
        polling=200,
    )


def repair(page: Page, areas: list[dict[str, Any]], *, is_new: bool) -> None:
    """Goes over each area line by line, with a tool of 1.5 pixels."""
    if is_new:
        page.keyboard.press("1")
    else:
        page.locator(".lsf-outliner-item").first.click()
    for area in areas:
        for start, end in lines(area["area"]):
            stroke(page, area["tool"], [start, end], SIDE)


def lines(polygon: list[list[float]]) -> Iterator[tuple[Point, Point]]:
    """The horizontal runs of pixels of a polygon, from middle to middle."""
    filled = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(filled).polygon([(x, y) for x, y in polygon], fill=1, outline=1)
    for y, row in enumerate(np.pad(np.asarray(filled, np.int8), ((0, 0), (1, 1)))):
        edges = np.diff(row)
        for first, after in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            yield (first + 0.5, y + 0.5), (after - 0.5, y + 0.5)


if __name__ == "__main__":
    main()
