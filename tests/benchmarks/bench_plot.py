"""A scatter plot as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 560, 400, 56
LETTER, LINE = 6.6, 13
"""Width of a letter and distance of two lines, in pixels."""


def scatter(points: Sequence[tuple[str, float, float]], x_title: str, y_title: str) -> str:
    """Named points; the first one (dagkit's default) is drawn as the large one.

    Args:
        points: name, x, y.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.
    """
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (1, 2))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left)
        up = (y - low) / (high - low)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = []
    for step in range(5):
        x, y = left + step * (right - left) / 4, low + step * (high - low) / 4
        across, up = place(x, low)[0], place(left, y)[1]
        parts.append(
            f'<path d="M{across:.0f},{MARGIN}V{HEIGHT - MARGIN}M{MARGIN},{up:.0f}H{WIDTH - MARGIN}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{across:.0f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{x:.3g}</text>')
        parts.append(f'<text x="{MARGIN - 6}" y="{up + 4:.0f}" text-anchor="end">{y:.3g}</text>')
    taken: list[tuple[float, float, float]] = []
    for number, (name, x, y) in enumerate(points):
        across, up = place(x, y)
        size, colour = (7, "#b3261e") if number == 0 else (4, "#33658a")
        start, base = _free(across, up, LETTER * len(name), taken)
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{size}" fill="{colour}"/>')
        parts.append(f'<text x="{start:.1f}" y="{base:.1f}">{escape(name)}</text>')
    title = escape(f"{y_title} against {x_title}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<title>{title}</title><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text transform="translate(14,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
        "</svg>\n"
    )


def _free(across: float, up: float, length: float, taken: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Where a label starts, so that it lies on no other: beside its point, or a line further up or down."""
    for line in (0, -1, 1, -2, 2, -3, 3):
        base = up + 4 + LINE * line
        for start in (across + 10, across - 10 - length):
            is_inside = MARGIN < start < WIDTH - length - 4
            if is_inside and all(
                abs(base - other) >= LINE or start >= end or start + length <= first for other, first, end in taken
            ):
                taken.append((base, start, start + length))
                return start, base
    return across + 10, up


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Round numbers around all values: from 0, a little beyond the largest."""
    high = max(*values, 1e-6)
    step = 10 ** math.floor(math.log10(high)) / 2
    return min(0.0, *values), step * math.ceil(high / step - 1e-9)
