"""Sky, skyline and ground: what is painted first."""

import math
from functools import lru_cache, partial
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dist_pca.tools.demo.canvas import SUPERSAMPLING, Array, Canvas, Pixel
from dist_pca.tools.demo.light import Light, mixed, scaled
from dist_pca.tools.demo.looks import RGB, Look, Texture
from dist_pca.tools.demo.textures import TEXELS_PER_METRE, TILE, cloudy, tile
from dist_pca.tools.demo.world import (
    BUILDING,
    ROAD,
    SIDEWALK,
    SKY,
    VEGETATION,
    Building,
    Car,
    Lamp,
    Person,
    Sign,
    Tree,
    World,
)

END = 125.0
UP = (0.0, 1.0, 0.0)


def paint_sky(canvas: Canvas, look: Look, random: Random) -> RGB:
    """Fill the canvas with sky; returns the colour at the horizon, in 0..255, which distant air takes on."""
    top, bottom = random.choice(look.sky_top), random.choice(look.sky_bottom)
    view = canvas.view
    rows, columns = int(view.horizon) // SUPERSAMPLING + 2, view.width // SUPERSAMPLING
    height = np.linspace(1, 0, rows, dtype=np.float32)[:, None]
    shade = np.array(bottom, np.float32) + (height**0.8)[..., None] * np.subtract(top, bottom, dtype=np.float32)

    left, first = random.randrange(TILE), random.randrange(TILE)
    # Clouds are seen at a slant: the lower they stand, the more of the tile a row skips.
    row = (first + 260 * np.sqrt(np.linspace(0, 1, rows))[::-1]).astype(int) % TILE
    clouds = _clouds()[np.ix_(row, (left + np.arange(columns)) % TILE)]
    cover = np.clip((clouds - random.uniform(-0.6, 1.4)) * 0.7, 0, 0.85)[..., None] * np.sqrt(height)[..., None]
    shade = shade + cover * (np.array(random.choice(look.cloud), np.float32) - shade)

    picture = Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8)).resize((view.width, rows * SUPERSAMPLING))
    canvas.colour.paste(picture)
    canvas.surfaces.paste(canvas.surface(SKY, 1000.0), (0, 0, view.width, view.height))
    return bottom


@lru_cache(maxsize=1)
def _clouds() -> Array:
    return cloudy(np.random.default_rng(0), slope=1.7)


def paint_skyline(canvas: Canvas, world: World, look: Look, light: Light, random: Random) -> None:
    """Close the street's far end with houses and trees."""
    scale = canvas.view.focal / END
    for x0, x1, height, trees in world.skyline:
        surface = canvas.surface(VEGETATION if trees else BUILDING, END)
        corners = [(x0, 0.0, END), (x0, height, END), (x1, height, END), (x1, 0.0, END)]
        if trees:
            colour = light.on(scaled(random.choice(look.foliage), random.uniform(0.75, 1)), (0.3, 0.8, -0.5))
            canvas.polygon(canvas.view.project(corners), colour, surface)
            for step in range(5):
                x = x0 + (x1 - x0) * step / 4
                (centre,) = canvas.view.project([(x, height, END)])
                canvas.disc(centre, scale * (x1 - x0) * (0.14 + 0.05 * (step % 2)), scaled(colour, 1.05), surface)
        else:
            _, wall = random.choice(look.walls)
            canvas.polygon(canvas.view.project(corners), light.on(wall, (0, 0, -1)), surface)


def paint_ground(canvas: Canvas, world: World, look: Look, light: Light, random: Random) -> None:
    """Lawn, sidewalks, road and its marks; then their texture, and the shadows and light that fall on them."""
    plane = canvas.view.plane((0, 0, 0), (1, 0, 0), (0, 0, 1))
    lawn, sidewalk, road = (canvas.slanted(label, plane) for label in (VEGETATION, SIDEWALK, ROAD))
    rectangle = partial(_rectangle, canvas)
    tarmac = light.on(scaled(random.choice(look.road), random.uniform(0.9, 1.1)), UP)
    paving = light.on(scaled(random.choice(look.sidewalk), random.uniform(0.9, 1.1)), UP)
    paint = light.on((222, 220, 212), UP)
    rectangle(-150, 150, 0, END, light.on(random.choice(look.foliage), UP), lawn)
    rectangle(world.left - world.sidewalk_left, world.right + world.sidewalk_right, 0, END, paving, sidewalk)
    rectangle(world.left - 0.2, world.right + 0.2, 0, END, scaled(paving, 1.12), sidewalk)
    rectangle(world.left, world.right, 0, END, tarmac, road)
    for x, inwards in ((world.left, 0.3), (world.right, -0.3)):
        rectangle(min(x, x + inwards), max(x, x + inwards), 0, END, scaled(tarmac, 0.8))
    for x0, z0, x1, z1 in world.patches:
        rectangle(x0, x1, z0, z1, scaled(tarmac, random.choice((0.78, 0.86, 1.12))))
    _paint_marks(canvas, world, mixed(tarmac, paint, random.uniform(0.6, 0.95)))
    _shade_ground(canvas, world, look, light, random, (lawn, sidewalk, road))


def _rectangle(
    canvas: Canvas, x0: float, x1: float, z0: float, z1: float, colour: RGB, surface: int | None = None
) -> None:
    """A rectangle on the ground."""
    corners = [(x0, 0.0, z0), (x0, 0.0, z1), (x1, 0.0, z1), (x1, 0.0, z0)]
    canvas.polygon(canvas.view.project(corners), colour, surface)


def _paint_marks(canvas: Canvas, world: World, paint: RGB) -> None:
    rectangle = partial(_rectangle, canvas)
    z = 0.0
    while z < 90:
        rectangle(-0.07, 0.07, z, z + (3.0 if world.dashed else 90.0), paint)
        z += 7.5 if world.dashed else 90.0
    for x in (world.left + 2.4, world.right - 2.4):
        if abs(x) > 2.5:
            rectangle(x - 0.05, x + 0.05, 0, 90, paint)
    if world.crossing is not None:
        x = world.left + 0.4
        while x < world.right - 0.6:
            rectangle(x, x + 0.5, world.crossing, world.crossing + 2.8, paint)
            x += 1.0


def _shade_ground(
    canvas: Canvas, world: World, look: Look, light: Light, random: Random, grounds: tuple[int, int, int]
) -> None:
    view = canvas.view
    first = max(math.floor(view.horizon), 0) + 1
    matrix = view.plane((0, 0, 0), (1, 0, 0), (0, 0, 1)).astype(np.float32)
    columns = np.arange(view.width, dtype=np.float32)[None]
    rows = np.arange(first, view.height, dtype=np.float32)[:, None]
    u, v, nearness = (a * columns + b * rows + c for a, b, c in matrix)
    depth = 1 / np.maximum(nearness, 1 / END)
    across = (u * depth * TEXELS_PER_METRE).astype(np.int32)
    along = (v * depth * TEXELS_PER_METRE).astype(np.int32)

    kind = np.zeros(max(grounds) + 1, np.intp)
    kind[list(grounds)] = np.arange(1, 4)
    surface = np.asarray(canvas.surfaces)[first:]
    ground = surface <= grounds[-1]
    ground &= surface >= grounds[0]
    kinds = kind[np.where(ground, surface, grounds[0])]
    stack = _ground_textures(("plaster", "foliage", look.sidewalk_texture, look.road_texture))
    start = random.randrange(TILE)
    grain = stack[kinds, (along + start) % TILE, across % TILE] - 1
    worn = stack[0, (along // 6 + start) % TILE, (across // 6 + start) % TILE] - 1
    factor = 1 + look.ground_grain * (grain / (1 + depth / 30) + worn)

    shadow, lamplight = (np.asarray(layer)[first:, :, None] for layer in _fallen_light(canvas, world, look, light))
    full = np.add(light.ambient, np.multiply(light.sun, light.towards[1]))
    dimmed = 1 - shadow / np.float32(255) * (1 - np.divide(light.ambient, full)).astype(np.float32)
    lamp = 1 + lamplight / np.float32(255) * np.array((1.1, 0.8, 0.4), np.float32)
    pixels = np.asarray(canvas.colour)[first:]
    shaded = np.clip(pixels * factor[..., None] * dimmed * lamp, 0, 255).astype(np.uint8)
    canvas.colour.paste(Image.fromarray(shaded), (0, first), Image.fromarray(ground))


@lru_cache(maxsize=4)
def _ground_textures(kinds: tuple[Texture, ...]) -> Array:
    return np.stack([tile(kind) for kind in kinds])


def _fallen_light(canvas: Canvas, world: World, look: Look, light: Light) -> tuple[Image.Image, Image.Image]:
    """Two 8-bit layers over the canvas: how much of the sun is lost, and how much lamplight falls."""
    view = canvas.view
    shadow, lamplight = (Image.new("L", (view.width, view.height)) for _ in range(2))
    dark, bright = ImageDraw.Draw(shadow), ImageDraw.Draw(lamplight)

    def strip(x0: float, x1: float, z0: float, z1: float, height: float) -> None:
        """Shadow of an upright wall that stands on the line (x0, z0) to (x1, z1)."""
        dx, dz = light.shadow(height)
        corners = [(x0, 0.0, z0), (x1, 0.0, z1), (x1 + dx, 0.0, z1 + dz), (x0 + dx, 0.0, z0 + dz)]
        _fill(dark, view.project(corners), 255)

    def pool(draw: ImageDraw.ImageDraw, x: float, z: float, radius: float, value: int) -> None:
        around = [math.tau * step / 14 for step in range(14)]
        ring = [(x + radius * math.cos(angle), 0.0, z + radius * math.sin(angle)) for angle in around]
        _fill(draw, view.project(ring), value)

    for lot in world.lots:
        if isinstance(lot, Building):
            strip(lot.x, lot.x, lot.z0, lot.z1, lot.height)
            far = lot.x + math.copysign(lot.depth, lot.x)
            strip(lot.x, far, lot.z0, lot.z0, lot.height)
            strip(lot.x, far, lot.z1, lot.z1, lot.height)
    for thing in world.things:
        x, z = thing.x, thing.z
        if isinstance(thing, Car):
            half = thing.width / 2
            for z0, z1 in ((z, z), (z + thing.length, z + thing.length)):
                strip(x - half, x + half, z0, z1, 0.75 * thing.height)
            for side in (-half, half):
                strip(x + side, x + side, z, z + thing.length, 0.75 * thing.height)
            corners = [(x - half, 0.0, z), (x - half, 0.0, z + thing.length), (x + half, 0.0, z + thing.length)]
            _fill(dark, view.project([*corners, (x + half, 0.0, z)]), 255)
        elif isinstance(thing, Tree):
            dx, dz = light.shadow(thing.trunk + thing.reach)
            strip(x - 0.12, x + 0.12, z, z, thing.trunk)
            pool(dark, x + dx, z + dz, 0.9 * thing.reach, 230)
        elif isinstance(thing, Person):
            strip(x - 0.2, x + 0.2, z, z, thing.height)
            pool(dark, x, z, 0.25, 255)
        elif isinstance(thing, Lamp | Sign):
            strip(x - 0.06, x + 0.06, z, z, thing.height)
            if look.lamps_on and isinstance(thing, Lamp) and thing.arm:
                for radius, value in ((4.5, 50), (3.2, 110), (1.8, 170)):
                    pool(bright, x + thing.arm, z, radius, value)
    return shadow.filter(ImageFilter.BoxBlur(1)), lamplight.filter(ImageFilter.BoxBlur(5))


def _fill(draw: ImageDraw.ImageDraw, pixels: list[Pixel], value: int) -> None:
    if len(pixels) >= 3:
        draw.polygon(pixels, fill=value)
