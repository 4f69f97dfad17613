"""Renders the sprite atlas that ships with dagkit: ``python -m dagkit.demo.atlas``.

Needs Noto Color Emoji (Debian: ``apt-get install fonts-noto-color-emoji``). Only whoever changes the sprites runs this;
the atlas is package data, so that nobody else needs the font. See NOTICE for the licence of the images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click
from PIL import Image, ImageDraw, ImageFont

from dagkit.demo import claim

GLYPHS: Final[dict[str, str]] = {
    "cat": "🐱", "dog": "🐶", "apple": "🍎", "banana": "🍌", "car": "🚗", "house": "🏠", "flower": "🌻", "ball": "⚽",
    "fish": "🐠", "tree": "🌳", "cup": "🍵", "book": "📕", "duck": "🦆", "mushroom": "🍄", "guitar": "🎸",
    "rocket": "🚀", "bomb": "💣", "knife": "🔪", "axe": "🪓", "dynamite": "🧨",
}  # fmt: skip
CELL_PX: Final = 64
NUM_COLUMNS: Final = 5
_STRIKE_PX: Final = 109  # the only size in which the bitmap font exists


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cropped, centred on a transparent square and scaled to ``CELL_PX``; RGBA."""
    image = Image.new("RGBA", (136, 136), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((0, 0), character, font=font, embedded_color=True)
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)


def render(font_path: Path, folder: Path) -> None:
    """Writes ``sprites.png`` (RGBA, one cell a sprite) and ``sprites.json`` (cell size and [x, y] of each, in px)."""
    font = ImageFont.truetype(str(font_path), _STRIKE_PX)
    num_rows = -(-len(GLYPHS) // NUM_COLUMNS)
    atlas = Image.new("RGBA", (NUM_COLUMNS * CELL_PX, num_rows * CELL_PX), (0, 0, 0, 0))
    cells = {}
    for i, (name, character) in enumerate(GLYPHS.items()):
        x, y = i % NUM_COLUMNS * CELL_PX, i // NUM_COLUMNS * CELL_PX
        atlas.paste(glyph(character, font), (x, y))
        cells[name] = [x, y]
    folder.mkdir(parents=True, exist_ok=True)
    atlas.save(folder / "sprites.png", optimize=True)
    index = {"source": "Noto Color Emoji", "licence": "Apache-2.0", "cell_px": CELL_PX, "cells": cells}
    (folder / "sprites.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option(
    "--font",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path(__file__).parent / "data")
def main(font: Path, out: Path) -> None:
    """Command line of ``render``."""
    claim(out, "sprites.json")
    render(font, out)


if __name__ == "__main__":
    main()
