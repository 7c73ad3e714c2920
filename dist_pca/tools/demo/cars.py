"""Cars: an outline seen from the side, drawn out to the car's width and lit face by face."""

import math
from collections.abc import Callable
from itertools import pairwise
from random import Random

from dist_pca.tools.demo.canvas import Canvas, Point, View
from dist_pca.tools.demo.light import Light, mixed, scaled
from dist_pca.tools.demo.looks import RGB, Look
from dist_pca.tools.demo.things import add_glow
from dist_pca.tools.demo.world import CAR, Body, Car

Place = Callable[[float, float, float], Point]

# fmt: off
OUTLINES: dict[Body, tuple[tuple[float, float], ...]] = {
    "saloon": ((0.0, 0.2), (0.0, 0.6), (0.16, 0.67), (0.29, 0.98), (0.56, 1.0),
               (0.73, 0.67), (0.97, 0.56), (1.0, 0.44), (1.0, 0.2)),
    "hatchback": ((0.0, 0.2), (0.0, 0.56), (0.03, 0.64), (0.13, 0.97), (0.58, 1.0),
                  (0.77, 0.64), (0.97, 0.53), (1.0, 0.42), (1.0, 0.2)),
    "van": ((0.0, 0.15), (0.0, 0.5), (0.01, 0.55), (0.03, 0.98), (0.74, 1.0),
            (0.87, 0.6), (0.98, 0.48), (1.0, 0.38), (1.0, 0.15)),
}
"""From the lower edge of the tail over the roof to the lower edge of the nose: (share of the length, of the height)."""
# fmt: on
REAR_WINDOW, WINDSCREEN = 2, 4
"""Segments of the outlines that are glass."""
TYRE: RGB = (34, 34, 36)


def paint_car(canvas: Canvas, car: Car, look: Look, light: Light, random: Random) -> None:
    """Wheels, the faces that can be seen from far to near, windows and lights."""
    view = canvas.view
    surface = canvas.surface(CAR, view.depth(car.x, car.z))
    paint = scaled(random.choice(look.paints), random.uniform(0.85, 1.1))
    glass = light.on(mixed(look.glass, look.sky_bottom[0], 0.15), (0, 0.6, -0.5))
    outline = OUTLINES[car.body]
    belt = outline[2][1]
    taper = 0.08 if car.body == "van" else 0.26

    def at(side: float, along: float, up: float) -> Point:
        """`side` -1..1 across the car, `along` 0 at the tail and 1 at the nose, `up` a share of the height."""
        half = car.width / 2 * (1 - taper * max(up - belt, 0) / (1 - belt))
        return car.x + side * half, up * car.height, car.z + car.length * (1 - along if car.oncoming else along)

    seen = math.copysign(1, view.x - car.x)
    _paint_wheels(canvas, car, seen, surface)
    nose = -1 if car.oncoming else 1
    faces = []
    for segment, (start, end) in enumerate(pairwise(outline)):
        along, up = nose * (end[0] - start[0]) * car.length, (end[1] - start[1]) * car.height
        length = math.hypot(along, up)
        normal = (0.0, nose * along / length, -nose * up / length)
        corners = [at(-1, *start), at(-1, *end), at(1, *end), at(1, *start)]
        if _faces(view, corners[0], normal):
            faces.append((sum(corner[2] for corner in corners), segment, normal, corners))
    for _, segment, normal, corners in sorted(faces, reverse=True):
        canvas.polygon(view.project(corners), light.on(paint, normal), surface)
        if segment in (REAR_WINDOW, WINDSCREEN):
            canvas.polygon(view.project(_inset(corners, 0.1)), glass)

    flank = light.on(paint, (seen, 0.15, 0.0))
    canvas.polygon(view.project([at(seen, *point) for point in outline]), flank, surface)
    sill = [at(seen, along, up) for along, up in ((0, outline[0][1]), (1, outline[0][1]), (1, 0.3), (0, 0.3))]
    canvas.polygon(view.project(sill), scaled(flank, 0.72))
    window = [at(seen, *outline[2]), at(seen, *outline[3]), at(seen, *outline[4]), at(seen, *outline[5])]
    pillar = (outline[2][0] + outline[5][0]) / 2
    canvas.polygon(view.project(_inset(window, 0.13)), scaled(glass, 0.85))
    post = [at(seen, pillar + dx, up) for dx, up in ((-0.012, belt), (-0.012, 0.97), (0.012, 0.97), (0.012, belt))]
    canvas.polygon(view.project(post), flank)
    hub = light.on((150, 152, 156), (seen, 0.0, 0.0))
    for along in (0.18, 0.81):
        canvas.polygon(view.project(_wheel(car, seen, along, 0.34)), TYRE)
        canvas.polygon(view.project(_wheel(car, seen, along, 0.18)), hub)
    _paint_end(canvas, car, look, light, at)


def _faces(view: View, point: Point, normal: tuple[float, float, float]) -> bool:
    eye = (view.x - point[0], view.y - point[1], -point[2])
    return sum(a * b for a, b in zip(eye, normal, strict=True)) > 0


def _inset(corners: list[Point], share: float) -> list[Point]:
    middle = [sum(corner[axis] for corner in corners) / len(corners) for axis in range(3)]
    return [
        (x + share * (middle[0] - x), y + share * (middle[1] - y), z + share * (middle[2] - z)) for x, y, z in corners
    ]


def _paint_wheels(canvas: Canvas, car: Car, seen: float, surface: int) -> None:
    for side in (-1, 1):
        inner, outer = car.x + side * (car.width / 2 - 0.22), car.x + side * (car.width / 2 - 0.02)
        z = car.z + 0.5
        tread = [(inner, 0.0, z), (inner, 0.4, z), (outer, 0.4, z), (outer, 0.0, z)]
        canvas.polygon(canvas.view.project(tread), scaled(TYRE, 0.7), surface)
    for along in (0.18, 0.81):
        canvas.polygon(canvas.view.project(_wheel(car, seen, along, 0.32)), TYRE, surface)


def _wheel(car: Car, seen: float, along: float, radius: float) -> list[Point]:
    x, z = car.x + seen * (car.width / 2 + 0.01), car.z + car.length * (1 - along if car.oncoming else along)
    turns = [math.tau * step / 12 for step in range(12)]
    return [(x, 0.32 + radius * math.cos(turn), z + radius * math.sin(turn)) for turn in turns]


def _paint_end(canvas: Canvas, car: Car, look: Look, light: Light, at: Place) -> None:
    """Bumper, plate and lights of the end that faces the camera."""
    view = canvas.view
    along = 1.0 if car.oncoming else 0.0
    toward = (0.0, 0.3, -0.95)

    def patch(left: float, right: float, low: float, high: float, colour: RGB) -> None:
        corners = [at(left, along, low), at(left, along, high), at(right, along, high), at(right, along, low)]
        canvas.polygon(view.project(corners), colour)

    patch(-1, 1, 0.17, 0.27, light.on((58, 58, 62), toward))
    patch(-0.3, 0.3, 0.29, 0.35, light.on((226, 224, 200), toward))
    lit = look.lamps_on and not car.parked
    if car.oncoming:
        patch(-0.5, 0.5, 0.37, 0.42, light.on((46, 48, 52), toward))
        lens: RGB = (255, 248, 226) if lit else light.on((232, 232, 226), toward)
        low, high = 0.34, 0.43
    else:
        lens = (255, 66, 48) if lit else light.on((176, 34, 32), toward)
        low, high = 0.4, 0.52
    for left, right in ((-0.96, -0.66), (0.66, 0.96)):
        patch(left, right, low, high, lens)
        if lit:
            scale = view.focal / view.depth(car.x, car.z)
            lamp = at((left + right) / 2, along, (low + high) / 2)
            (centre,) = view.project([lamp])
            glow = (0.9, 0.82, 0.66) if car.oncoming else (0.6, 0.08, 0.05)
            radius, power = (0.8, 0.35) if car.oncoming else (0.45, 0.12)
            add_glow(light, centre, radius * look.halo * scale, glow, lamp, power=power, beam=True)
