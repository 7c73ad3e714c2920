"""Pixels that shapes cover, against each pixel's centre taken alone."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from dist_pca.shards.polygons import as_points, paint_circle, paint_polygon, run_length_mask

# COCO's tool converts arrays in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
HEIGHT, WIDTH = 9, 7
COORDINATE = st.one_of(
    st.integers(-3, 12).map(float), st.integers(-6, 24).map(lambda half: half / 2), st.floats(-4, 13)
)
POLYGON = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=8)


def painted(points: list[tuple[float, float]]) -> npt.NDArray[np.uint8]:
    codes = np.zeros((HEIGHT, WIDTH), np.uint8)
    paint_polygon(codes, np.array(points), 1)
    return codes


def is_inside(points: list[tuple[float, float]], x: float, y: float) -> bool:
    """Whether a ray from a point to the left crosses an odd number of edges; an edge includes its upper end alone."""
    crossed = 0
    for start, end in zip(points, [*points[1:], points[0]], strict=True):
        (x0, y0), (x1, y1) = sorted((start, end), key=lambda point: point[1])
        if y0 <= y < y1 and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
            crossed += 1
    return crossed % 2 == 1


@given(POLYGON)
@settings(max_examples=150, deadline=None)
def test_a_polygon_covers_the_pixels_whose_centres_are_inside(points: list[tuple[float, float]]) -> None:
    expected = [[is_inside(points, x + 0.5, y + 0.5) for x in range(WIDTH)] for y in range(HEIGHT)]
    np.testing.assert_array_equal(painted(points), expected)


@given(st.tuples(COORDINATE, COORDINATE), st.tuples(COORDINATE, COORDINATE))
@settings(max_examples=50, deadline=None)
def test_polygons_with_a_common_edge_neither_overlap_nor_leave_a_gap(
    first: tuple[float, float], second: tuple[float, float]
) -> None:
    left = [(-99.0, -99.0), first, second, (-99.0, 99.0)]
    right = [second, first, (99.0, -99.0), (99.0, 99.0)]
    around = [(-99.0, -99.0), first, (99.0, -99.0), (99.0, 99.0), second, (-99.0, 99.0)]
    np.testing.assert_array_equal(painted(left) ^ painted(right), painted(around))


def test_a_polygon_of_many_edges_is_a_disc() -> None:
    angles = np.linspace(0, 2 * math.pi, 5000, endpoint=False)
    polygon, circle = np.zeros((2, 40, 50), np.uint8)
    paint_polygon(polygon, np.stack([25.3 + 13.9 * np.cos(angles), 18.1 + 13.9 * np.sin(angles)], axis=-1), 1)
    paint_circle(circle, np.array([25.3, 18.1]), 13.9, 1)
    np.testing.assert_array_equal(polygon, circle)


@given(st.tuples(COORDINATE, COORDINATE), st.floats(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_circle_covers_the_pixels_whose_centres_are_within_its_radius(
    center: tuple[float, float], radius: float
) -> None:
    codes = np.zeros((HEIGHT, WIDTH), np.uint8)
    paint_circle(codes, np.array(center), radius, 1)
    expected = [
        [(x + 0.5 - center[0]) ** 2 + (y + 0.5 - center[1]) ** 2 <= radius**2 for x in range(WIDTH)]
        for y in range(HEIGHT)
    ]
    np.testing.assert_array_equal(codes, expected)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_read_as_cocos_own_tool_writes_them(rows: list[list[bool]], compressed: bool) -> None:
    pixels = np.repeat(np.array(rows), 13, axis=0)
    counts: object = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
    if not compressed:
        flat = pixels.T.ravel()
        ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
        counts = [0] * int(flat[0]) + np.diff(ends).tolist()
    np.testing.assert_array_equal(run_length_mask(counts, *pixels.shape), pixels)


def test_polygons_differ_from_cocos_own_tool_at_their_edges_alone() -> None:
    angles = np.linspace(0, 2 * math.pi, 9, endpoint=False)
    points = np.stack([52.4 + 37 * np.cos(angles), 44.7 + 31 * np.sin(angles)], axis=-1)
    codes = np.zeros((90, 110), np.uint8)
    paint_polygon(codes, points, 1)
    theirs = mask.decode(mask.frPyObjects([points.ravel().tolist()], 90, 110))[..., 0]
    assert (codes != theirs).sum() < 0.03 * theirs.sum()
    rectangle = [3.0, 4.0, 20.0, 4.0, 20.0, 11.0, 3.0, 11.0]
    codes[:] = 0
    paint_polygon(codes, np.array(rectangle).reshape(-1, 2), 1)
    np.testing.assert_array_equal(codes, mask.decode(mask.frPyObjects([rectangle], 90, 110))[..., 0])


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([3, 4], "add up to 7 where 3 x 4"),
        ([13, -1], "no list of whole numbers"),
        ([6.0, 6.0], "no list of whole numbers"),
        ([True, 11], "no list of whole numbers"),
        ([10**400], "more than 63 bits"),
        (None, "no list of whole numbers"),
        ("~~", "wrong character"),
        ("P", "end within a number"),
        ("P" * 40, "wrong character"),
        ("3", "add up to 3"),
        ("N", "no list of whole numbers"),
    ],
)
def test_run_lengths_that_are_none_or_do_not_add_up_are_refused(counts: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_length_mask(counts, 4, 3)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[0, 0], [1, 1]], "shape of 2 points"),
        ([[0, 0], [1, 1], [2]], "pairs"),
        ("abc", "pairs"),
        ([[0, 0], [1, 1], [2, float("nan")]], "coordinate nan is not within"),
        ([[0, 0], [1, 1], [2, 1e308]], r"coordinate 1e\+308 is not within"),
        ([[0, 0], [1, 1], [2, 10**400]], "coordinate of many digits"),
        ([[0, 0], [1, 1], [2, "3"]], "'3' is no number"),
        ([[0, 0], [1, 1], [2, True]], "'True' is no number"),
    ],
)
def test_points_that_are_none_are_refused(points: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_points(points)
