import math
from dataclasses import replace
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from dist_pca.tools.demo.canvas import Array, Canvas, View
from dist_pca.tools.demo.light import Glow
from dist_pca.tools.demo.looks import NIGHT
from dist_pca.tools.demo.reflections import reflect
from dist_pca.tools.demo.world import BUILDING, ROAD, SIDEWALK, SKY, VEGETATION

VIEW = View(width=160, height=160, focal=120.0, horizon=60.0, x=0.0, y=1.8, yaw=math.radians(3))
FACADE = 18.0
LAMP = Glow((30.0, 10.0), 4.0, (0.9, 0.6, 0.3), (-1.0, 5.0, 12.0), power=1.0, beam=False)

Scene = tuple[Array, npt.NDArray[np.uint8], Array]


def _scene(window: tuple[float, float] | None = None) -> Scene:
    """A dark road between sidewalk and lawn, closed by a dark facade with one bright window from height to height."""
    canvas = Canvas(VIEW)
    canvas.polygon([(0, 0), (160, 0), (160, 160), (0, 160)], (6, 6, 12), canvas.surface(SKY, 1000.0))
    plane = VIEW.plane((0, 0, 0), (1, 0, 0), (0, 0, 1))
    for label, x0, x1 in ((VEGETATION, -60, -6), (SIDEWALK, -6, -3), (ROAD, -3, 60)):
        corners = [(x, 0.0, z) for x, z in ((x0, 0.0), (x0, 90.0), (x1, 90.0), (x1, 0.0))]
        canvas.polygon(VIEW.project(corners), (12, 12, 14), canvas.slanted(label, plane))
    foot = VIEW.horizon + VIEW.focal * VIEW.y / FACADE
    wall = canvas.surface(BUILDING, FACADE)
    canvas.polygon([(0, 0), (160, 0), (160, foot), (0, foot)], (12, 12, 14), wall)
    if window is not None:
        top, bottom = (VIEW.horizon + VIEW.focal * (VIEW.y - height) / FACADE for height in window)
        canvas.polygon([(70, top), (90, top), (90, bottom), (70, bottom)], (250, 230, 160))
    return canvas.resolve()


def _reflected(scene: Scene, glows: list[Glow], wetness: float = 1.0) -> Array:
    return reflect(*scene, VIEW, glows, replace(NIGHT, wetness=wetness), Random(0))


def test_reflections_lie_on_road_and_sidewalk_alone() -> None:
    scene = colour, label, _ = _scene(window=(4.0, 2.0))
    changed = (_reflected(scene, [LAMP]) != colour).any(axis=2)
    assert set(np.unique(label)) == {ROAD, SIDEWALK, VEGETATION, BUILDING}
    assert set(np.unique(label[changed])) == {ROAD, SIDEWALK}


def test_dry_ground_mirrors_nothing() -> None:
    scene = _scene(window=(4.0, 2.0))
    np.testing.assert_array_equal(_reflected(scene, [LAMP], wetness=0.0), scene[0])


@pytest.mark.parametrize("height", [2.5, 4.0, 6.0])
def test_a_window_is_mirrored_as_far_below_the_foot_of_its_wall_as_it_is_above(height: float) -> None:
    with_window, without = (_reflected(_scene(window), []) for window in ((height + 0.5, height - 0.5), None))
    gain = (with_window - without).sum(axis=2)
    gain[: int(VIEW.horizon / 2 + 6)] = 0
    mirrored = (VIEW.horizon + VIEW.focal * (VIEW.y + height) / FACADE) / 2
    columns, rows = gain.sum(axis=0), gain[:, 35:45].sum(axis=1)
    assert np.nonzero(columns > 0)[0].tolist() == list(range(35, 46))
    assert (rows * np.arange(80)).sum() / rows.sum() == pytest.approx(mirrored, abs=2.5)


def test_a_lamp_draws_a_streak_that_is_longer_than_wide_below_it() -> None:
    scene = _scene()
    gain = (_reflected(scene, [LAMP]) - _reflected(scene, [])).sum(axis=2)
    column = np.unravel_index(gain.argmax(), gain.shape)[1]
    assert column == pytest.approx(LAMP.centre[0], abs=2)
    strong = gain > 0.3 * gain.max()
    assert strong.any(axis=1).sum() > 3 * strong.any(axis=0).sum()


def test_wet_ground_mirrors_more_the_farther_it_is() -> None:
    colour, label, depth = _scene()
    colour[label == BUILDING] = 0.5
    dark = np.where((label == ROAD)[..., None], np.float32(0), colour)
    gain = _reflected((dark, label, depth), []).mean(axis=2)
    far, near = (gain[(label == ROAD) & (depth > a) & (depth < b)].mean() for a, b in ((12, 18), (4, 5)))
    assert far > 1.5 * near
