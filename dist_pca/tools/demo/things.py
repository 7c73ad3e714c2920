"""Trees, lamps, signs and people: upright things that face the camera."""

import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from dist_pca.tools.demo.canvas import SUPERSAMPLING, Canvas, Pixel, Point, ink
from dist_pca.tools.demo.light import Glow, Light, mixed, scaled
from dist_pca.tools.demo.looks import RGB, Look
from dist_pca.tools.demo.textures import TEXELS_PER_METRE, TILE, tile
from dist_pca.tools.demo.world import PERSON, POLE, SIGN, VEGETATION, Lamp, Person, Sign, Tree

SKIN = ((224, 180, 150), (196, 146, 112), (150, 104, 76), (104, 72, 54))
WHITE, RED, BLUE, YELLOW, GREY = (236, 236, 232), (200, 32, 36), (36, 84, 168), (236, 190, 48), (126, 130, 132)
FRONT = (0.0, 0.5, -0.87)


def paint_tree(canvas: Canvas, tree: Tree, look: Look, light: Light, random: Random) -> None:
    """A trunk and a crown of lit and shaded clumps of leaves."""
    depth = canvas.view.depth(tree.x, tree.z)
    scale = canvas.view.focal / depth
    centre_height = tree.trunk + 0.75 * tree.reach
    foot, middle = canvas.view.project([(tree.x, 0.0, tree.z), (tree.x, centre_height, tree.z)])
    surface = canvas.surface(VEGETATION, depth)
    bark = light.on(scaled(look.bark, random.uniform(0.85, 1.1)), FRONT)
    canvas.line([foot, middle], 0.26 * scale, bark, surface)
    shaded = [(column - 0.07 * scale, row) for column, row in (foot, middle)]
    canvas.line(shaded, 0.09 * scale, scaled(bark, 0.7))

    wide = 1.15 * tree.reach
    high = max(y + radius for _, y, radius in tree.blobs)
    size = (max(round(2 * wide * scale), 3), max(round(2 * high * scale), 3))
    crown, core, rim = Image.new("RGB", size), Image.new("1", size), Image.new("1", size)
    brush, inside, outside = ImageDraw.Draw(crown), ImageDraw.Draw(core), ImageDraw.Draw(rim)
    leaf = scaled(random.choice(look.foliage), random.uniform(0.85, 1.15))
    yellowish = (leaf[1], leaf[1], leaf[2])
    for x, y, radius in tree.blobs:
        if radius * scale < 1.5:
            continue
        hue = scaled(mixed(leaf, yellowish, random.uniform(-0.1, 0.2)), 0.85 + 0.2 * y / high)
        colour = light.on(hue, (0.75 * x / wide, 0.55 + 0.45 * y / high, -0.5))
        column, row, across = (x + wide) * scale, (high - y) * scale, radius * scale
        brush.ellipse((column - across, row - across, column + across, row + across), fill=ink(colour))
        outside.ellipse((column - across, row - across, column + across, row + across), fill=1)
        across *= 0.7
        inside.ellipse((column - across, row - across, column + across, row + across), fill=1)

    # The leaves' place in the texture is the world's: they cut the crown's edge, hence the label.
    texels = TEXELS_PER_METRE / scale
    left, top = int(abs(37 * tree.x)) % (TILE // 2), int(37 * abs(tree.z)) % (TILE // 2)
    part = (left, top, left + size[0] * texels, top + size[1] * texels)
    leaves = _leaves().resize(size, Image.Resampling.BILINEAR, box=part, reducing_gap=1.0)
    gaps = leaves.point(_GAPS, "1")
    mask = ImageChops.logical_or(core, ImageChops.logical_and(rim, gaps))
    crown = crown.filter(ImageFilter.BoxBlur(0.07 * scale))
    corner = (round(middle[0] - wide * scale), round(middle[1] - high * scale))
    canvas.stamp(ImageChops.overlay(crown, leaves.convert("RGB")), mask, corner, surface)


_GAPS = [255 * (value > 118) for value in range(256)]


@lru_cache(maxsize=1)
def _leaves() -> Image.Image:
    return Image.fromarray(np.clip(128 * tile("foliage"), 0, 255).astype(np.uint8))


def paint_lamp(canvas: Canvas, lamp: Lamp, look: Look, light: Light, random: Random) -> None:
    """A street lamp, or a bollard where it has no arm."""
    view = canvas.view
    depth = view.depth(lamp.x, lamp.z)
    scale = view.focal / depth
    surface = canvas.surface(POLE, depth)
    metal = light.on(random.choice(look.metal), FRONT)
    foot, head = view.project([(lamp.x, 0.0, lamp.z), (lamp.x, lamp.height, lamp.z)])
    canvas.line([foot, head], 0.19 * scale, metal, surface)
    canvas.line([(foot[0], foot[1]), (foot[0], foot[1] - 0.6 * scale)], 0.24 * scale, scaled(metal, 0.85), surface)
    if not lamp.arm:
        return
    (tip,) = view.project([(lamp.x + lamp.arm, lamp.height + 0.15, lamp.z)])
    canvas.line([head, tip], 0.1 * scale, metal, surface)
    across = math.copysign(0.35 * scale, lamp.arm)
    canvas.line([(tip[0] - across, tip[1]), (tip[0] + across, tip[1])], 0.16 * scale, scaled(metal, 0.8), surface)
    if look.lamps_on:
        canvas.line([(tip[0] - across, tip[1] + 2), (tip[0] + across, tip[1] + 2)], 0.1 * scale, (255, 236, 190))
        point = (lamp.x + lamp.arm, lamp.height, lamp.z)
        add_glow(light, tip, 0.9 * look.halo * scale, (0.9, 0.66, 0.36), point)


def add_glow(
    light: Light, pixel: Pixel, radius: float, colour: RGB, point: Point, *, power: float = 1.0, beam: bool = False
) -> None:
    """Switch on a lamp at a pixel of the canvas; the radius is in pixels of the canvas too."""
    centre = (pixel[0] / SUPERSAMPLING, pixel[1] / SUPERSAMPLING)
    light.glows.append(Glow(centre, min(max(radius / SUPERSAMPLING, 1.5), 24), colour, point, power, beam))


def paint_sign(canvas: Canvas, sign: Sign, look: Look, light: Light, random: Random) -> None:
    """A traffic sign on its post."""
    view = canvas.view
    depth = view.depth(sign.x, sign.z)
    scale = view.focal / depth
    metal = light.on(random.choice(look.metal), FRONT)
    foot, middle = view.project([(sign.x, 0.0, sign.z), (sign.x, sign.height, sign.z)])
    canvas.line([foot, middle], 0.09 * scale, metal, canvas.surface(POLE, depth))
    surface = canvas.surface(SIGN, depth)
    radius = max(sign.size * scale, 2.5 * SUPERSAMPLING)

    def face(corners: int, turn: float, size: float, colour: RGB) -> None:
        angles = [math.tau * (corner + turn) / corners for corner in range(corners)]
        ring = [(middle[0] + size * math.sin(a), middle[1] - size * math.cos(a)) for a in angles]
        canvas.polygon(ring, scaled(light.on(colour, FRONT), look.retroreflection), surface)

    if sign.style == "disc":
        face(16, 0, radius, RED)
        face(16, 0, 0.68 * radius, WHITE)
    elif sign.style == "triangle":
        face(3, 0, 1.2 * radius, RED)
        face(3, 0, 0.7 * radius, WHITE)
    elif sign.style == "board":
        face(4, 0.5, 1.3 * radius, WHITE)
        face(4, 0.5, 1.15 * radius, BLUE)
        low, reach = middle[1] + 0.6 * radius, 0.15 * radius
        arrow = [(middle[0] - reach, low), (middle[0], middle[1] - 0.6 * radius), (middle[0] + reach, low)]
        canvas.polygon(arrow, light.on(WHITE, FRONT))
    elif sign.style == "octagon":
        face(8, 0.5, 1.05 * radius, WHITE)
        face(8, 0.5, 0.92 * radius, RED)
        bar = 0.55 * radius
        canvas.line([(middle[0] - bar, middle[1]), (middle[0] + bar, middle[1])], 0.35 * radius, light.on(WHITE, FRONT))
    elif sign.style == "diamond":
        face(4, 0, 1.15 * radius, WHITE)
        face(4, 0, 0.85 * radius, YELLOW)
    else:
        face(16, 0, radius, GREY)


def paint_person(canvas: Canvas, person: Person, look: Look, light: Light, random: Random) -> None:
    """Someone walking: legs, coat, arms and head."""
    view = canvas.view
    depth = view.depth(person.x, person.z)
    unit = view.focal / depth * person.height
    surface = canvas.surface(PERSON, depth)
    (foot,) = view.project([(person.x, 0.0, person.z)])

    def at(across: float, up: float) -> Pixel:
        return foot[0] + across * unit, foot[1] - up * unit

    coat, trousers = random.choice(look.clothes), scaled(random.choice(look.clothes), random.uniform(0.5, 0.9))
    coat, trousers = light.on(coat, FRONT), light.on(trousers, FRONT)
    skin = light.on(random.choice(SKIN), FRONT)
    open_legs = 0.13 * person.stride if person.facing else 0.03
    shoulder = 0.09 if person.facing else 0.125
    swing = 0.12 * person.stride * person.facing

    for leg, tone in ((-1, 0.8), (1, 1.0)):
        toe = at((0.045 + open_legs) * leg, 0.02)
        canvas.line(
            [at(0.035 * leg, 0.5), at((0.05 + 0.5 * open_legs) * leg, 0.27), toe],
            0.085 * unit,
            scaled(skin if person.skirt else trousers, tone),
            surface,
        )
        shoe = [(toe[0], toe[1]), (toe[0] + (0.07 * (person.facing or leg * 0.4)) * unit, toe[1])]
        canvas.line(shoe, 0.045 * unit, (38, 34, 34), surface)
    canvas.line([at(-shoulder, 0.8), at(-shoulder - 0.03 - swing, 0.5)], 0.06 * unit, scaled(coat, 0.8), surface)
    hem = 0.34 if person.skirt else 0.47
    torso = [at(-shoulder, 0.8), at(-0.05, 0.845), at(0.05, 0.845), at(shoulder, 0.8), at(0.1, hem), at(-0.1, hem)]
    canvas.polygon(torso, coat, surface)
    canvas.polygon([torso[0], torso[1], at(-0.02, 0.845), at(-0.04, hem), torso[5]], scaled(coat, 0.86))
    canvas.line([at(shoulder, 0.79), at(shoulder + 0.03 + swing, 0.5)], 0.06 * unit, scaled(coat, 0.92), surface)
    canvas.disc(at(0.01 * person.facing, 0.915), max(0.066 * unit, 2), skin, surface)
    hair = light.on(random.choice(((44, 34, 30), (92, 66, 44), (176, 144, 92), (120, 116, 114))), FRONT)
    crown = [at(0.068 * math.cos(a), 0.925 + 0.07 * math.sin(a)) for a in (math.pi * k / 6 for k in range(7))]
    canvas.polygon(crown, hair, surface)
