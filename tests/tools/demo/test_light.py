import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.tools.demo.canvas import Array, View
from dist_pca.tools.demo.light import Glow, shine
from dist_pca.tools.demo.looks import NIGHT

VIEW = View(width=160, height=120, focal=120.0, horizon=50.0, x=0.5, y=1.8, yaw=math.radians(4))


def _wall(depth: float) -> Array:
    return np.full((60, 80), depth, np.float32)


def _lamp(x: float, y: float, z: float, *, beam: bool = False) -> Glow:
    return Glow((0.0, 0.0), 3.0, (0.9, 0.6, 0.3), (x, y, z), power=1.0, beam=beam)


@settings(max_examples=25)
@given(x=st.floats(-8, 8), y=st.floats(0, 8), z=st.floats(2, 60), depth=st.floats(1, 90), beam=st.booleans())
def test_a_lamp_darkens_nothing_and_stays_finite(x: float, y: float, z: float, depth: float, beam: bool) -> None:
    colour = np.full((60, 80, 3), 0.2, np.float32)
    lit = shine(colour, _wall(depth), VIEW, [_lamp(x, y, z, beam=beam)], NIGHT)
    assert np.isfinite(lit).all()
    assert (lit >= colour).all()


def test_light_falls_off_around_the_pixel_that_shows_the_lamp() -> None:
    lamp = (2.0, 4.0, 15.0)
    colour, depth = np.full((60, 80, 3), 0.1, np.float32), _wall(VIEW.depth(lamp[0], lamp[2]))
    lit = (shine(colour, depth, VIEW, [_lamp(*lamp)], NIGHT) - shine(colour, depth, VIEW, [], NIGHT)).sum(2)
    ((column, row),) = VIEW.project([lamp])
    brightest = np.unravel_index(lit.argmax(), lit.shape)
    assert brightest == (pytest.approx(row / 2, abs=1), pytest.approx(column / 2, abs=1))
    assert (np.diff(lit[brightest[0], brightest[1] :]) < 0).all()


def test_headlights_of_others_light_what_lies_before_them_and_not_what_is_behind() -> None:
    colour = np.full((60, 80, 3), 0.1, np.float32)

    def gain(depth: float) -> float:
        lamps = [_lamp(0.5, 0.6, 20.0, beam=True)]
        return float(
            (shine(colour, _wall(depth), VIEW, lamps, NIGHT) - shine(colour, _wall(depth), VIEW, [], NIGHT)).max()
        )

    assert gain(16) > 0.1
    assert gain(22) < 0.01 * gain(16)
