"""Rectangles, polygons, ellipses and bitmasks as masks: against geometry done another way."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagkit.errors import LabelStudioError
from dagkit.labelstudio.shapes import MAX_POINTS, kind_of, region_mask

WIDTH, HEIGHT = 40, 24


def centres() -> list[tuple[float, float]]:
    return [(x + 0.5, y + 0.5) for y in range(HEIGHT) for x in range(WIDTH)]


def shape(kind: str, **value: Any) -> np.ndarray:
    return region_mask(kind, value, WIDTH, HEIGHT)


def data_url(alpha: np.ndarray, mode: str = "RGBA") -> str:
    image = Image.fromarray(np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha]))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def winding(points: list[tuple[float, float]], at: tuple[float, float]) -> int:
    """How often an outline goes round a point, by the sum of the angles under which its edges are seen."""
    angles = [math.atan2(y - at[1], x - at[0]) for x, y in points]
    turns = [
        (two - one + math.pi) % (2 * math.pi) - math.pi
        for one, two in zip(angles, angles[1:] + angles[:1], strict=True)
    ]
    return round(sum(turns) / (2 * math.pi))


def test_an_upright_rectangle_is_exact_to_the_pixel() -> None:
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[6:18, 10:30] = True
    assert np.array_equal(shape("rectangle", x=25, y=25, width=50, height=50), expected)
    assert np.array_equal(shape("rectangle", x=25, y=25, width=50, height=50, rotation=360), expected)
    over = shape("rectangle", x=-10, y=-10, width=200, height=60)
    assert np.array_equal(over, np.arange(HEIGHT)[:, None].repeat(WIDTH, 1) < 12)


@pytest.mark.parametrize("degrees", [90, 180, 270, -90])
def test_a_rectangle_turned_by_right_angles(degrees: int) -> None:
    """About the corner x, y (20, 12), clockwise on the screen: 10 px wide and 6 px high before that."""
    expected = np.zeros((HEIGHT, WIDTH), bool)
    rows, columns = {
        90: (slice(12, 22), slice(14, 20)),
        180: (slice(6, 12), slice(10, 20)),
        270: (slice(2, 12), slice(20, 26)),
        -90: (slice(2, 12), slice(20, 26)),
    }[degrees]
    expected[rows, columns] = True
    assert np.array_equal(shape("rectangle", x=50, y=50, width=25, height=25, rotation=degrees), expected)


def test_turned_rectangles_are_the_polygons_of_their_corners() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        x, y, degrees = rng.uniform(10, 90), rng.uniform(10, 90), rng.uniform(-400, 400)
        across, along = rng.uniform(5, 60, 2)
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        right = (across * WIDTH / 100 * cosine, across * WIDTH / 100 * sine)
        down = (-along * HEIGHT / 100 * sine, along * HEIGHT / 100 * cosine)
        corners = [
            (x * WIDTH / 100 + a * right[0] + b * down[0], y * HEIGHT / 100 + a * right[1] + b * down[1])
            for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))
        ]
        expected = np.array([winding(corners, at) != 0 for at in centres()]).reshape(HEIGHT, WIDTH)
        mask = region_mask(
            "rectangle", {"x": x, "y": y, "width": across, "height": along, "rotation": degrees}, WIDTH, HEIGHT
        )
        assert np.array_equal(mask, expected)


def test_polygons_cover_what_they_wind_around() -> None:
    rng = np.random.default_rng(1)
    for num in (3, 4, 5, 8, 12):
        for _ in range(6):
            points = rng.uniform(-20, 120, (num, 2)).tolist()
            corners = [(x * WIDTH / 100, y * HEIGHT / 100) for x, y in points]
            expected = np.array([winding(corners, at) != 0 for at in centres()]).reshape(HEIGHT, WIDTH)
            if expected.any():
                assert np.array_equal(shape("polygon", points=points), expected)
    star = [[50 + 50 * math.sin(4 * math.pi * k / 5), 50 - 50 * math.cos(4 * math.pi * k / 5)] for k in range(5)]
    assert shape("polygon", points=star)[HEIGHT // 2, WIDTH // 2]  # as the browser fills it, middle included


@pytest.mark.parametrize("degrees", [0, 30, 90, 200])
def test_ellipses(degrees: float) -> None:
    """Against the sum of the distances to its foci."""
    a, b = 12.0, 6.0
    focus = math.sqrt(a * a - b * b)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    foci = [(20 + sign * focus * cosine, 12 + sign * focus * sine) for sign in (1, -1)]
    expected = [math.dist(at, foci[0]) + math.dist(at, foci[1]) <= 2 * a + 1e-9 for at in centres()]
    mask = shape("ellipse", x=50, y=50, radiusX=30, radiusY=25, rotation=degrees)
    assert np.array_equal(mask, np.array(expected).reshape(HEIGHT, WIDTH))


def test_bitmasks() -> None:
    alpha = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    assert np.array_equal(shape("bitmask", imageDataURL=data_url(alpha)), alpha > 127)
    assert not shape("bitmask", imageDataURL=data_url(np.zeros_like(alpha))).any()  # erased wholly
    assert np.array_equal(shape("bitmask", imageDataURL=data_url(alpha, "LA")), alpha > 127)


SQUARE = {"x": 10, "y": 10, "width": 10, "height": 10}
ROUND = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10}
OPAQUE = np.full((HEIGHT, WIDTH), 255, np.uint8)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("rectangle", {}, "The rectangle is damaged: x: missing"),
        ("rectangle", SQUARE | {"width": 0}, "width: expected greater than 0, but got 0"),
        ("rectangle", SQUARE | {"height": -5}, "height: expected greater than 0"),
        ("rectangle", SQUARE | {"x": "10"}, "x: expected a number, but got '10'"),
        ("rectangle", SQUARE | {"x": 1e300}, "x: expected less than or equal"),
        ("rectangle", SQUARE | {"rotation": math.nan}, "rotation: expected a finite number"),
        ("rectangle", SQUARE | {"x": 200}, "marks no pixel of the image"),
        ("rectangle", SQUARE | {"width": 1e-3}, "marks no pixel of the image"),
        ("ellipse", ROUND | {"radiusX": 0}, "radiusX: expected greater than 0"),
        ("ellipse", ROUND | {"x": None}, "x: expected a number"),
        ("polygon", {"points": [[1, 1], [2, 2]]}, "points: List should have at least 3 items"),
        ("polygon", {"points": [[1, 1], [2, 2], [3]]}, "points.2"),
        ("polygon", {"points": [[1, 1], [1.1, 1], [1, 1.1]]}, "marks no pixel of the image"),
        ("polygon", {"points": [[0, 0], [90, 0], [90, 90]], "closed": False}, "its outline is not closed"),
        ("polygon", {"points": [[0, 0]] * (MAX_POINTS + 1)}, "points: List should have at most 10000 items"),
        ("bitmask", {}, "imageDataURL: missing"),
        ("bitmask", {"imageDataURL": "/etc/passwd"}, "expected data:image/png;base64"),
        ("bitmask", {"imageDataURL": "https://example.org/a.png"}, "expected data:image/png;base64"),
        ("bitmask", {"imageDataURL": "data:image/png;base64,AAAA"}, "its PNG cannot be read"),
        ("bitmask", {"imageDataURL": "data:image/png;base64,?"}, "cannot be used"),
        ("bitmask", {"imageDataURL": data_url(OPAQUE[:5])}, "its PNG has 40x5 pixels"),
        ("bitmask", {"imageDataURL": data_url(OPAQUE)[:90]}, "cannot be"),
        ("bitmask", {"imageDataURL": data_url(OPAQUE, "L")}, "its PNG has no transparency"),
        ("bitmask", {"imageDataURL": data_url(OPAQUE // 4)}, "mark something, but no pixel by half or more"),
        ("brush", {"rle": 10**12}, "must be a list of ints"),
        ("brush", {"rle": "abc"}, "must be a list of ints"),
        ("brush", {"rle": [0] * 8, "format": "coco"}, "must be in the format 'rle', but are in 'coco'"),
        ("brush", {"rle": [300]}, "must be a list of ints"),
    ],
)
def test_what_cannot_be_converted_is_named(kind: str, value: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelStudioError) as caught:
        region_mask(kind, value, WIDTH, HEIGHT)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["keypointlabels", "keypoint", "vectorlabels", "magicwand", "cuboidlabels", "labels", ""]
)
def test_other_kinds_are_not_known(name: str) -> None:
    assert kind_of(name) is None
