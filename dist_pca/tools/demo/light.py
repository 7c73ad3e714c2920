"""The light that falls on a street."""

import math
from dataclasses import dataclass, field
from random import Random

import numpy as np

from dist_pca.tools.demo.canvas import SUPERSAMPLING, Array, Pixel, Point, View, between
from dist_pca.tools.demo.looks import RGB, Look


@dataclass(frozen=True)
class Glow:
    """A lamp that is on."""

    centre: Pixel
    """In pixels of the finished image."""
    radius: float
    """How far its halo reaches, in pixels of the finished image."""
    colour: RGB
    """In 0..1."""
    point: Point
    """Where it hangs in the world."""
    power: float
    """Light on what is near, over that of a street lamp."""
    beam: bool
    """Whether it shines towards the camera alone, as the lights of a car's near end do."""


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


def shine(colour: Array, depth: Array, view: View, glows: list[Glow], look: Look) -> Array:
    """Light what is near lamps, and what lies in the beam of the camera's own car.

    Args:
        colour: H x W x 3 in 0..1, as the light of the sky alone shows it.
        depth: H x W in metres.
        view: The camera, in pixels of the canvas.
        glows: The lamps that are on.
        look: The domain.

    Returns:
        H x W x 3, not below what was given, and not clipped.
    """
    height, width = depth.shape
    right = (SUPERSAMPLING * np.arange(width, dtype=np.float32)[None] - view.width / 2) / view.focal
    down = (SUPERSAMPLING * np.arange(height, dtype=np.float32)[:, None] - view.horizon) / view.focal
    cos, sin = math.cos(view.yaw), math.sin(view.yaw)
    # Low beam: wide, cut off just above the horizon, and lost with the square of the distance.
    beam = np.exp(-((right / 0.45) ** 2)) / (1 + np.exp(-(down + 0.02) / 0.015)) / (1 + (depth / 12) ** 2)
    gain = look.headlights * beam[..., None].repeat(3, axis=-1)
    for glow in glows:
        x, y, z = glow.point
        across, along = cos * (x - view.x) - sin * z, view.depth(x, z)
        squared = (right * depth - across) ** 2 + (down * depth - view.y + y) ** 2 + (depth - along) ** 2
        light = look.lamplight * glow.power / (squared + 2)
        if glow.beam:
            light /= 1 + np.exp(np.clip((depth - along + 1.5) / 0.4, -50, 50))
        gain += light[..., None] * np.array(glow.colour, np.float32)
    # What is bright already shines by itself, and hardly more for the light that falls on it.
    return np.asarray(colour * (1 + gain * (1 - colour)), dtype=np.float32)


def scaled(colour: RGB, factor: float) -> RGB:
    """A colour, brighter or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def mixed(first: RGB, second: RGB, share: float) -> RGB:
    """A colour between two: `share` of the second."""
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue
