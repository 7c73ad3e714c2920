"""What stands in a street: lengths in metres, drawn from a random stream and from nothing else.

The road runs along +z, x points right and y up; the origin lies on the road's centre line below the camera.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

CLASS_NAMES = (
    "road", "sidewalk", "building", "fence", "pole", "traffic sign", "vegetation", "sky", "person", "car",
)  # fmt: skip
"""Names of the labels, all of them classes of Cityscapes, by index."""
ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON, CAR = range(len(CLASS_NAMES))

NEAREST = 4.5
FARTHEST = 110.0

Blob = tuple[float, float, float]
SignStyle = Literal["disc", "triangle", "board", "octagon", "diamond", "back"]
Body = Literal["saloon", "hatchback", "van"]

# Some styles stand oftener in a street than others.
_STYLES: tuple[SignStyle, ...] = ("disc", "disc", "triangle", "board", "octagon", "diamond", "back")
_BODIES: tuple[Body, ...] = ("saloon", "saloon", "hatchback", "hatchback", "van")
_ROOFLINES: dict[Body, tuple[float, float]] = {"saloon": (1.38, 1.5), "hatchback": (1.45, 1.65), "van": (1.9, 2.3)}


@dataclass(frozen=True)
class Building:
    """A house with its facade along the street at `x`, from `z0` to `z1`."""

    x: float
    z0: float
    z1: float
    height: float
    depth: float
    bay: float
    """Width of the wall that carries one window."""
    gabled: bool
    shop: bool


@dataclass(frozen=True)
class Fence:
    """A fence along the street at `x`."""

    x: float
    z0: float
    z1: float
    height: float
    pitch: float
    """Distance from bar to bar."""


@dataclass(frozen=True)
class Tree:
    """A trunk and a crown of discs (x and y from the crown's centre, radius), or a bush where the trunk is short."""

    x: float
    z: float
    trunk: float
    blobs: tuple[Blob, ...]
    reach: float
    """Half the crown's width."""


@dataclass(frozen=True)
class Lamp:
    """A street lamp whose arm reaches `arm` to the right (left if negative)."""

    x: float
    z: float
    height: float
    arm: float


@dataclass(frozen=True)
class Sign:
    """A traffic sign on a post; `style` is what is painted on it."""

    x: float
    z: float
    height: float
    size: float
    style: SignStyle


@dataclass(frozen=True)
class Car:
    """A car whose nearest end is at `z`."""

    x: float
    z: float
    length: float
    width: float
    height: float
    body: Body
    oncoming: bool
    parked: bool


@dataclass(frozen=True)
class Person:
    """Someone on foot; `stride` opens the legs, `facing` is -1, 0 (along the street) or 1."""

    x: float
    z: float
    height: float
    stride: float
    facing: int
    skirt: bool


Thing = Tree | Lamp | Sign | Car | Person
Lot = Building | Fence | Tree


@dataclass(frozen=True)
class World:
    """One street."""

    left: float
    """x of the road's left edge."""
    right: float
    """x of the road's right edge."""
    sidewalk_left: float
    """Width of the left sidewalk."""
    sidewalk_right: float
    """Width of the right sidewalk."""
    lane: float
    """Width of one lane."""
    dashed: bool
    """Whether the centre line is dashed."""
    crossing: float | None
    """Where a zebra crossing begins."""
    patches: tuple[tuple[float, float, float, float], ...]
    """Rectangular repair patches of the road: x0, z0, x1, z1."""
    skyline: tuple[tuple[float, float, float, bool], ...]
    """What closes the view: x0, x1, height, and whether it is trees."""
    lots: tuple[Lot, ...]
    """What stands beyond the sidewalks, farthest first."""
    things: tuple[Thing, ...]
    """What stands on road and sidewalks, farthest first."""
    gaze: tuple[float, float, float, float, float]
    """Where in its ranges the camera is: height, focal length, horizon, yaw and place across the lane, each in 0..1."""


def draw_world(random: Random) -> World:
    """One street from the random stream."""
    lane = random.uniform(2.8, 3.5)
    parking_left, parking_right = random.random() < 0.65, random.random() < 0.65
    left = -lane - 2.2 * parking_left - 0.4
    right = lane + 2.2 * parking_right + 0.4
    sidewalk_left, sidewalk_right = random.uniform(2.3, 4.6), random.uniform(2.3, 4.6)
    crossing = random.uniform(7, 24) if random.random() < 0.4 else None

    lots = _lots(random, left - sidewalk_left, -1) + _lots(random, right + sidewalk_right, 1)
    things: list[Thing] = []
    for edge, sidewalk, side, parking in (
        (left, sidewalk_left, -1, parking_left),
        (right, sidewalk_right, 1, parking_right),
    ):
        things += _furniture(random, edge, side)
        things += _walkers(random, edge, sidewalk, side)
        if parking:
            things += _parked(random, edge - side * 1.15, oncoming=side < 0)
    things += _traffic(random, lane)
    if crossing is not None:
        free = (crossing - 5.5, crossing + 3.5)
        things = [thing for thing in things if not isinstance(thing, Car) or not free[0] < thing.z < free[1]]
        for _ in range(random.randint(0, 3)):
            x, z = random.uniform(left, right), crossing + random.uniform(0.3, 2.5)
            things.append(_person(random, x, z, random.choice((-1, 1))))

    return World(
        left=left,
        right=right,
        sidewalk_left=sidewalk_left,
        sidewalk_right=sidewalk_right,
        lane=lane,
        dashed=random.random() < 0.75,
        crossing=crossing,
        patches=tuple(_patch(random, left, right) for _ in range(random.randint(1, 5))),
        skyline=_skyline(random),
        lots=tuple(lots),
        things=tuple(sorted(things, key=lambda thing: thing.z, reverse=True)),
        gaze=(random.random(), random.random(), random.random(), random.random(), random.random()),
    )


def _lots(random: Random, edge: float, side: int) -> list[Lot]:
    """One side of the street, farthest first."""
    lots: list[Lot] = []
    z = random.uniform(-12, -4)
    usual = random.uniform(6, 15)
    while z < FARTHEST:
        if random.random() < 0.68:
            width = random.uniform(7, 15)
            height = min(max(3 * round(random.gauss(usual, 4) / 3), 3), 21) + 1.0
            x = edge + side * random.choice((0, 0, 0.4, 0.9))
            bay = width / round(width / random.uniform(2.4, 3.4))
            depth, gabled, shop = random.uniform(7, 11), random.random() < 0.5, random.random() < 0.35
            lots.append(Building(x, z, z + width, height, depth, bay, gabled, shop))
        else:
            width = random.uniform(5, 12)
            # Nearest first here: the list is turned round as a whole.
            pitch = random.choice((0.16, 0.24, 0.4))
            lots.append(Fence(edge + side * 0.1, z, z + width, random.uniform(0.9, 1.7), pitch))
            for place in sorted(random.random() for _ in range(random.randint(1, 3))):
                x = edge + side * random.uniform(1.5, 6)
                lots.append(_tree(random, x, z + place * width, random.choice((0.3, 1.8, 2.4))))
        z += width
    return lots[::-1]


def _tree(random: Random, x: float, z: float, trunk: float) -> Tree:
    radius = random.uniform(1.2, 2.1) if trunk > 1 else random.uniform(0.8, 1.3)
    tall = random.uniform(0.85, 1.4)
    blobs = []
    for index in range(32):
        angle = random.uniform(0, 2 * math.pi)
        inner = index < 10
        reach = radius * (random.uniform(0, 0.5) if inner else random.uniform(0.5, 0.72))
        size = radius * (random.uniform(0.35, 0.5) if inner else random.uniform(0.2, 0.32))
        blobs.append((reach * math.cos(angle), tall * reach * math.sin(angle), size))
    return Tree(x, z, trunk, tuple(sorted(blobs, key=lambda blob: blob[1] - 2 * blob[2])), radius)


def _furniture(random: Random, edge: float, side: int) -> list[Thing]:
    things: list[Thing] = []
    if random.random() < 0.55:
        gap, z = random.uniform(8, 15), random.uniform(NEAREST, 14)
        while z < 75:
            things.append(_tree(random, edge + side * 0.9, z + random.uniform(-1, 1), random.uniform(1.9, 2.7)))
            z += gap
    if random.random() < 0.8:
        gap, z, height = random.uniform(14, 24), random.uniform(5, 16), random.uniform(4.5, 7.5)
        while z < 60:
            things.append(Lamp(edge + side * 0.35, z, height, -side * random.uniform(0.8, 1.6)))
            z += gap
    for _ in range(random.randint(1, 3)):
        style = random.choice(_STYLES)
        z = random.uniform(6, 24)
        things.append(Sign(edge + side * 0.5, z, random.uniform(2.1, 3.0), random.uniform(0.4, 0.6), style))
    if random.random() < 0.4:
        z, gap = random.uniform(5, 12), random.uniform(1.6, 2.6)
        things += [Lamp(edge + side * 0.2, z + gap * step, 0.95, 0) for step in range(random.randint(4, 7))]
    return things


def _walkers(random: Random, edge: float, sidewalk: float, side: int) -> list[Thing]:
    things: list[Thing] = []
    for _ in range(random.randint(2, 5)):
        x, z = edge + side * random.uniform(0.6, sidewalk - 0.4), random.uniform(5, 24)
        facing = random.choice((-1, 0, 0, 1))
        for step in range(random.choice((1, 1, 2, 2))):
            things.append(_person(random, x + 0.55 * step, z + 0.2 * step, facing))
    return things


def _person(random: Random, x: float, z: float, facing: int) -> Person:
    child = random.random() < 0.1
    height = random.uniform(1.2, 1.4) if child else random.uniform(1.58, 1.9)
    return Person(x, z, height, random.uniform(0.2, 1), facing, random.random() < 0.3)


def _parked(random: Random, x: float, oncoming: bool) -> list[Thing]:
    things: list[Thing] = []
    z = random.uniform(NEAREST, 12)
    while z < 80:
        if random.random() < 0.6:
            things.append(_car(random, x + random.uniform(-0.12, 0.12), z, oncoming, parked=True))
        z += random.uniform(5.4, 7)
    return things


def _traffic(random: Random, lane: float) -> list[Thing]:
    things: list[Thing] = []
    for x, oncoming in ((lane / 2, False), (-lane / 2, True)):
        z = random.uniform(8, 30)
        for _ in range(random.randint(0, 2)):
            things.append(_car(random, x + random.uniform(-0.3, 0.3), z, oncoming, parked=False))
            z += random.uniform(9, 25)
    return things


def _car(random: Random, x: float, z: float, oncoming: bool, parked: bool) -> Car:
    body = random.choice(_BODIES)
    low, high = _ROOFLINES[body]
    length = random.uniform(4.2, 4.8) if body != "hatchback" else random.uniform(3.7, 4.2)
    return Car(x, z, length, random.uniform(1.7, 1.9), random.uniform(low, high), body, oncoming, parked)


def _patch(random: Random, left: float, right: float) -> tuple[float, float, float, float]:
    x, z = random.uniform(left, right - 1), random.uniform(4, 40)
    return x, z, min(x + random.uniform(0.6, 2.5), right), z + random.uniform(1, 8)


def _skyline(random: Random) -> tuple[tuple[float, float, float, bool], ...]:
    blocks = []
    x = -150.0
    while x < 150:
        width = random.uniform(7, 22)
        trees = random.random() < 0.5
        blocks.append((x, x + width, random.uniform(4, 9) if trees else random.uniform(8, 19), trees))
        x += width * random.uniform(0.6, 0.95)
    return tuple(blocks)
