from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dagkit.report import charts, pictures

ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}
NOTHING = {"value": None, "low": None, "high": None}


def test_interval_bar_places_value_and_interval() -> None:
    assert 'M32.0 7H88.0"' in charts.interval_bar(ESTIMATE, "c-guard")
    assert 'cx="60.0"' in charts.interval_bar(ESTIMATE, "c-guard")
    assert charts.interval_bar(NOTHING, "c-guard") == ""


def test_line_chart_spans_its_axes_and_describes_itself() -> None:
    series = charts.Series("one <b>", "c-guard", [(1, 0.0), (25, 1.0)], [(1, 0.0, 0.2), (25, 0.8, 1.0)])
    svg = charts.line_chart([series], label="scores & steps", x_title="step", y_title="score", is_x_whole=True)
    assert 'points="60.0,220.0 544.0,14.0"' in svg
    assert 'aria-label="scores &amp; steps"' in svg
    assert "one &lt;b&gt;" in svg
    assert ">25<" in svg


def test_line_chart_marks_a_point_with_words_towards_its_middle() -> None:
    def svg(x: float) -> str:
        series = charts.Series("s", "c-guard", [(0, 0.0), (1, 1.0)], mark=(x, 0.9, "5% & 90%"))
        return charts.line_chart([series], label="l", x_title="x", y_title="y")

    assert '<circle class="dot c-guard" cx="108.4" cy="34.6" r="6"/>' in svg(0.1)
    assert '<text class="note" x="120.4" y="54.6" text-anchor="start">5% &amp; 90%</text>' in svg(0.1)
    assert 'x="483.6" y="54.6" text-anchor="end"' in svg(0.9)


def test_plane_leaves_out_what_has_no_value() -> None:
    points = [
        charts.Point("a", "circle", "c-guard", ESTIMATE, ESTIMATE),
        charts.Point("b", "square", "c-none", NOTHING, ESTIMATE),
    ]
    svg = charts.plane(points, [("a", "c-guard")], x_title="erased", y_title="kept")
    assert svg.count('class="dot') == 1
    assert "a: 50% and 50%" in svg
    assert "nothing to show" in charts.plane(points[1:], [], x_title="erased", y_title="kept")


@pytest.mark.parametrize(
    ("low", "high", "is_whole", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 25, True, [5, 10, 15, 20, 25]),
        (0.75, 1, False, [0.75, 0.8, 0.85, 0.9, 0.95, 1.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, is_whole: bool, expected: list[float]) -> None:
    assert charts._ticks(low, high, is_whole=is_whole) == pytest.approx(expected)


def test_heat_runs_from_dark_to_light() -> None:
    colours = np.asarray(pictures.heat(np.linspace(0, 1, 32)[None])).astype(int)
    assert colours.shape == (1, 32, 3)
    assert (np.diff(colours.sum(-1)[0]) >= 0).all()
    assert colours[0, 0].tolist() == [0, 0, 4]


def test_overlay_colours_only_where_the_map_is() -> None:
    image = Image.new("RGB", (32, 32), (120, 120, 120))
    maps = np.zeros((4, 4), np.float32)
    maps[0, 0] = 1
    pixels = np.asarray(pictures.overlay(image, maps)).astype(int)
    assert np.ptp(pixels[-1, -1]) == 0
    assert np.ptp(pixels[0, 0]) > 60


def test_film_strip_has_first_and_last_step() -> None:
    frames = pictures.film_strip(np.zeros((25, 4, 4), np.float32), num_frames=5)
    assert [index for index, _ in frames] == [0, 6, 12, 18, 24]
    assert len(pictures.film_strip(np.zeros((3, 4, 4), np.float32))) == 3
