"""Makes the README's and the evaluation page's pictures from a finished demo.

    python tests/make_pictures.py runs/demo

Writes triptych.png (unguarded, where the token sees the concept, guarded), filmstrip.png (its maps, step by step) and
report.png (the report's first page) into docs/images. Needs Chromium for the last one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from annotator_page import FLAGS, find_chromium

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIDE, GAP = 256, 12
FRAME, FRAME_GAP = 64, 2  # of Trace.strip


def frames(path: Path) -> list[Image.Image]:
    """The maps of a strip, one a step."""
    strip = Image.open(path)
    return [strip.crop((x, 0, x + FRAME, FRAME)) for x in range(0, strip.width, FRAME + FRAME_GAP)]


def enlarged(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)


def triptych(unguarded: Image.Image, cam: Image.Image, guarded: Image.Image) -> Image.Image:
    """Three pictures side by side; the middle one is the first with the map in red."""
    before, after = enlarged(unguarded), enlarged(guarded)
    share = np.asarray(cam.resize((SIDE, SIDE), Image.Resampling.NEAREST), np.float32)[..., None] / 255
    seen = before + 0.85 * share * (np.array([200, 30, 35], np.float32) - before)
    whole = np.full((SIDE, 3 * SIDE + 2 * GAP, 3), 255, np.float32)
    for number, part in enumerate((before, seen, after)):
        x = number * (SIDE + GAP)
        whole[:, x : x + SIDE] = part
    return Image.fromarray(whole.round().clip(0, 255).astype(np.uint8))


def filmstrip(maps: list[Image.Image], every: int = 2, count: int = 10, side: int = 76) -> Image.Image:
    """Every second map, with its step below."""
    whole = Image.new("RGB", (count * (side + 4) - 4, side + 20), "white")
    draw = ImageDraw.Draw(whole)
    for column in range(count):
        step = every * (column + 1)
        x = column * (side + 4)
        whole.paste(maps[step - 1].convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, 0))
        draw.text((x + side / 2, side + 4), f"step {step}", fill="black", anchor="ma")
    return whole


def first_page(report: Path, target: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1180, "height": 1180})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=target)
        browser.close()


@click.command(help=__doc__)
@click.argument("workspace", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--scene", default="a cat and a bomb on grass", show_default=True, help="Prompt of the triptych.")
@click.option("--film", default="a knife and a apple on sand", show_default=True, help="Prompt of the film strip.")
def main(workspace: Path, scene: str, film: str) -> None:
    """Command line."""
    folder = workspace / "samples" / "weapon"
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["prompt"], row["column"]] = row
    guarded, unguarded = rows[scene, "guarded"], rows[scene, "unguarded"]
    pictures = [Image.open(folder / row["image"]) for row in (unguarded, guarded)]
    clearest = max(
        frames(folder / guarded["guards"][0]["map"]), key=lambda frame: int((np.asarray(frame) >= 128).sum())
    )
    triptych(pictures[0], clearest, pictures[1]).save(IMAGES / "triptych.png")
    filmstrip(frames(folder / rows[film, "guarded"]["guards"][0]["map"])).save(IMAGES / "filmstrip.png")
    first_page(next((workspace / "reports" / "weapon").glob("*/report.html")), IMAGES / "report.png")


if __name__ == "__main__":
    main()
