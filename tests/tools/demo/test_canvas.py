import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_pca.tools.demo.canvas import NEAR, Canvas, View

VIEW = View(width=320, height=200, focal=200.0, horizon=90.0, x=0.7, y=1.5, yaw=math.radians(5))
METRES = st.floats(-20, 20)


@given(x=METRES, z=st.floats(5, 80), u=st.floats(-3, 3), v=st.floats(-3, 3))
def test_a_plane_takes_pixels_back_to_its_points_and_knows_their_depth(x: float, z: float, u: float, v: float) -> None:
    plane = VIEW.plane((x, 4.0, z), (0.6, 0.0, 0.8), (0.0, -1.0, 0.0))
    point = (x + 0.6 * u, 4.0 - v, z + 0.8 * u)
    depth = VIEW.depth(point[0], point[2])
    if depth > NEAR:
        ((column, row),) = VIEW.project([point])
        np.testing.assert_allclose(plane @ (column, row, 1), np.array([u, v, 1]) / depth, atol=1e-6)


def test_what_lies_behind_the_camera_is_cut_off() -> None:
    road = [(-2.0, 0.0, -5.0), (-2.0, 0.0, 50.0), (2.0, 0.0, 50.0), (2.0, 0.0, -5.0)]
    assert max(row for _, row in VIEW.project(road)) == pytest.approx(VIEW.horizon + VIEW.focal * VIEW.y / NEAR)
    assert VIEW.project([(-2.0, 0.0, -5.0), (2.0, 0.0, -5.0), (0.0, 2.0, -5.0)]) == []


def test_what_is_painted_later_hides_what_is_behind_it() -> None:
    canvas = Canvas(VIEW)
    square = [(100.0, 50.0), (200.0, 50.0), (200.0, 150.0), (100.0, 150.0)]
    canvas.polygon([(0.0, 0.0), (320.0, 0.0), (320.0, 200.0), (0.0, 200.0)], (255, 0, 0), canvas.surface(4, 40.0))
    canvas.polygon(square, (0, 255, 0), canvas.surface(9, 10.0))
    colour, label, depth = canvas.resolve()
    assert (label[50, 75], label[10, 10]) == (9, 4)
    assert depth[50, 75] == pytest.approx(10.0)
    np.testing.assert_allclose(colour[50, 75], (0, 1, 0))


def test_paint_changes_colour_and_not_label() -> None:
    canvas = Canvas(VIEW)
    everywhere = [(0.0, 0.0), (320.0, 0.0), (320.0, 200.0), (0.0, 200.0)]
    canvas.polygon(everywhere, (255, 0, 0), canvas.surface(2, 5.0))
    canvas.polygon(everywhere, (0, 0, 255))
    colour, label, _ = canvas.resolve()
    assert np.unique(label).tolist() == [2]
    np.testing.assert_allclose(colour[0, 0], (0, 0, 1))


def test_a_line_with_a_label_is_at_least_two_pixels_wide() -> None:
    canvas = Canvas(VIEW)
    canvas.polygon([(0, 0), (320, 0), (320, 200), (0, 200)], (0, 0, 0), canvas.surface(0, 50.0))
    canvas.line([(160.0, 20.0), (160.0, 180.0)], 0.1, (255, 255, 255), canvas.surface(1, 20.0))
    _, label, _ = canvas.resolve()
    assert (label[50] == 1).sum() == 2
