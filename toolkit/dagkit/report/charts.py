"""Small charts as inline SVG: they take their colours from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH: Final = 560
HEIGHT: Final = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 14, 40


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: shown in the legend.
        style: class of the style sheet that gives its colour.
        points: (x, y).
        band: (x, low, high) around the line, or empty.
        mark: (x, y) of a point to mark and the words beside it, or None.
    """

    label: str
    style: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    mark: tuple[float, float, str] | None = None


def interval_bar(estimate: dict[str, Any], style: str, *, low: float = 0.0, high: float = 1.0) -> Markup:
    """A value with its interval on a scale from ``low`` to ``high``; empty where there is no value."""
    if estimate["value"] is None:
        return Markup("")

    def x(value: float) -> float:
        return 4 + 112 * (min(max(value, low), high) - low) / (high - low)

    return Markup(  # noqa: S704 - every part is escaped or a number
        f'<svg class="bar {escape(style)}" viewBox="0 0 120 14" width="120" height="14" aria-hidden="true">'
        '<path class="track" d="M4 7H116"/>'
        f'<path class="range" d="M{x(estimate["low"]):.1f} 7H{x(estimate["high"]):.1f}"/>'
        f'<circle cx="{x(estimate["value"]):.1f}" cy="7" r="4"/></svg>'
    )


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] = (0.0, 1.0),
    is_x_whole: bool = False,
) -> Markup:
    """Lines over a common x axis, with bands where a series has one.

    Args:
        series: at least one with a point; drawn in order.
        label: what the picture shows, for screen readers.
        x_title: name of the x axis.
        y_title: name of the y axis.
        y_range: ends of the y axis.
        is_x_whole: ticks of the x axis are whole numbers.
    """
    xs = [x for one in series for x, _ in one.points]
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    last = last if last > first else first + 1
    frame = _Frame((first, last), y_range)
    parts = [frame.axes(x_title, y_title, is_x_whole)]
    for one in series:
        if one.band:
            upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in one.band]
            lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(one.band)]
            parts.append(f'<polygon class="band {escape(one.style)}" points="{" ".join(upper + lower)}"/>')
    for one in series:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in one.points)
        parts.append(f'<polyline class="line {escape(one.style)}" points="{path}"/>')
    parts += [_mark(frame, one.style, *one.mark) for one in series if one.mark]
    return _figure(parts, label, [(one.label, one.style) for one in series])


def _mark(frame: _Frame, style: str, x: float, y: float, words: str) -> str:
    """A dot with words towards the middle of the chart."""
    left, top = frame.x(x), frame.y(y)
    side, anchor = (-12, "end") if left > (_LEFT + WIDTH - _RIGHT) / 2 else (12, "start")
    below = 20 if top < HEIGHT / 2 else -12
    return (
        f'<circle class="dot {escape(style)}" cx="{left:.1f}" cy="{top:.1f}" r="6"/>'
        f'<text class="note" x="{left + side:.1f}" y="{top + below:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )


@dataclass(frozen=True)
class Point:
    """One point of the plane.

    Attributes:
        label: for screen readers and on hover.
        shape: ``circle`` or ``square``.
        style: class of the style sheet that gives its colour.
        along: estimate on the x axis, as a dictionary.
        up: estimate on the y axis.
    """

    label: str
    shape: str
    style: str
    along: dict[str, Any]
    up: dict[str, Any]


def plane(points: Sequence[Point], legend: Sequence[tuple[str, str]], *, x_title: str, y_title: str) -> Markup:
    """Points with the crosses of their 95% intervals; the axes end at 1: up and to the right is better.

    Args:
        points: those without a value are left out.
        legend: (label, style class).
        x_title: name of the x axis.
        y_title: name of the y axis.
    """
    known = [point for point in points if point.along["value"] is not None and point.up["value"] is not None]
    starts = [
        max(0.0, min([0.9, *(math.floor(getattr(point, axis)["low"] * 10) / 10 for point in known)]))
        for axis in ("along", "up")
    ]
    frame = _Frame((starts[0], 1.0), (starts[1], 1.0))
    parts = [frame.axes(x_title, y_title, is_x_whole=False)]
    for point in known:
        x, y = frame.x(point.along["value"]), frame.y(point.up["value"])
        parts.append(
            f'<path class="cross {escape(point.style)}" d="M{frame.x(point.along["low"]):.1f} {y:.1f}'
            f"H{frame.x(point.along['high']):.1f}M{x:.1f} {frame.y(point.up['low']):.1f}"
            f'V{frame.y(point.up["high"]):.1f}"/>'
        )
    for point in known:
        x, y = frame.x(point.along["value"]), frame.y(point.up["value"])
        mark = (
            f'<circle class="dot {escape(point.style)}" cx="{x:.1f}" cy="{y:.1f}" r="6">'
            if point.shape == "circle"
            else f'<rect class="dot {escape(point.style)}" x="{x - 5.5:.1f}" y="{y - 5.5:.1f}" width="11" height="11">'
        )
        parts.append(f"{mark}<title>{escape(_words(point))}</title></{'circle' if 'circle' in mark else 'rect'}>")
    label = f"{x_title} against {y_title}: {'; '.join(map(_words, known)) or 'nothing to show'}"
    return _figure(parts, label, legend)


def _words(point: Point) -> str:
    return f"{point.label}: {point.along['value']:.0%} and {point.up['value']:.0%}"


class _Frame:
    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        first, last = self.x_range
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (min(max(value, first), last) - first) / (last - first)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (min(max(value, low), high) - low) / (high - low)

    def axes(self, x_title: str, y_title: str, is_x_whole: bool) -> str:
        lines = []
        for value in _ticks(*self.y_range):
            y = self.y(value)
            lines.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
            lines.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        below = HEIGHT - _BOTTOM + 18
        lines += [
            f'<text class="tick" x="{self.x(value):.1f}" y="{below}" text-anchor="middle">{value:g}</text>'
            for value in _ticks(*self.x_range, is_whole=is_x_whole)
        ]
        middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
        lines.append(
            f'<text class="axis" x="{middle_x}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_title)}</text>'
        )
        lines.append(
            f'<text class="axis" transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_title)}</text>"
        )
        return "".join(lines)


def _ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    step = next(
        size
        for size in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 250, 500, 1000)
        if (high - low) / size <= 6 and (size >= 1 or not is_whole)
    )
    first = -(-low // step)
    return [round((first + index) * step, 6) for index in range(int((high - first * step) / step + 1e-9) + 1)]


def _figure(parts: Sequence[str], label: str, legend: Sequence[tuple[str, str]]) -> Markup:
    keys = "".join(f'<li class="{escape(style)}">{escape(text)}</li>' for text, style in legend)
    below = f'<ul class="legend">{keys}</ul>' if legend else ""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{''.join(parts)}</svg>{below}")  # noqa: S704 - every part is escaped or a number
