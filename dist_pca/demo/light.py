"""The light that falls on a street."""

import math
from dataclasses import dataclass, field
from random import Random

from dist_pca.demo.canvas import Pixel, between
from dist_pca.demo.looks import RGB, Look


@dataclass(frozen=True)
class Glow:
    """A lamp that is on: where, how far it shines in pixels of the finished image, and its colour in 0..1."""

    centre: Pixel
    radius: float
    colour: RGB


@dataclass
class Light:
    """Sun, sky and the lamps that are on."""

    sun: RGB
    ambient: RGB
    towards: tuple[float, float, float]
    """Unit vector to the sun."""
    glows: list[Glow] = field(default_factory=list)

    def on(self, colour: RGB, normal: tuple[float, float, float]) -> RGB:
        """How a surface of that colour and normal looks."""
        facing = max(sum(a * b for a, b in zip(normal, self.towards, strict=True)), 0.0)
        red, green, blue = (
            c * (ambient + sun * facing) / 255 for c, ambient, sun in zip(colour, self.ambient, self.sun, strict=True)
        )
        return red, green, blue

    def shadow(self, height: float) -> tuple[float, float]:
        """How far along x and z the shadow of a height reaches on the ground, in metres."""
        x, y, z = self.towards
        return -height * x / y, -height * z / y


def draw_light(look: Look, random: Random) -> Light:
    """The light of a look, the sun somewhere in its range and at any bearing that is not straight ahead."""
    elevation = math.radians(between(look.sun_elevation, random.random()))
    bearing = math.radians(random.choice((-1, 1)) * random.uniform(35, 150))
    flat = math.cos(elevation)
    towards = (flat * math.sin(bearing), math.sin(elevation), flat * math.cos(bearing))
    return Light(look.sun, look.ambient, towards)


def scaled(colour: RGB, factor: float) -> RGB:
    """A colour, brighter or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def mixed(first: RGB, second: RGB, share: float) -> RGB:
    """A colour between two: `share` of the second."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue
