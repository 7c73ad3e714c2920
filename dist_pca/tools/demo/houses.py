"""Buildings and fences: flat pictures drawn in metres, then laid on their planes."""

import math
from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from dist_pca.tools.demo.canvas import NEAR, Canvas, Point, ink
from dist_pca.tools.demo.light import Light, mixed, scaled
from dist_pca.tools.demo.looks import RGB, Look, Texture
from dist_pca.tools.demo.textures import TEXELS_PER_METRE, tile
from dist_pca.tools.demo.world import BUILDING, FENCE, Building, Fence

Box = Callable[[float, float, float, float, RGB], None]

STOREY = 3.0
DOWN = (0.0, -1.0, 0.0)
TOWARDS_CAMERA = (0.0, 0.0, -1.0)
LAMPLIGHT = ((255, 206, 120), (255, 224, 160), (240, 180, 96), (226, 232, 240))
BANNERS = ((176, 48, 44), (40, 92, 72), (38, 62, 112), (206, 160, 60), (88, 52, 76))


def paint_building(canvas: Canvas, building: Building, look: Look, light: Light, random: Random) -> None:
    """A facade along the street, the wall that faces the camera, and a roof."""
    view = canvas.view
    x, z0, z1, height = building.x, building.z0, building.z1, building.height
    side = math.copysign(1, x)
    texture, colour = random.choice(look.walls)
    colour = scaled(colour, random.uniform(0.88, 1.08))
    detail = _detail(view.depth(x, max(z0, NEAR)))
    back = x + side * building.depth
    ridge = (x + back) / 2
    roof = random.choice(look.roofs)

    end: list[Point] = [(x, 0.0, z0), (x, height, z0), (back, height, z0), (back, 0.0, z0)]
    if building.gabled:
        end.insert(2, (ridge, height + 2.6, z0))
        slope = math.hypot(building.depth / 2, 2.6)
        tiles = _plain("tiles", z1 - z0, slope, light.on(roof, (-side * 0.5, 0.8, 0.0)), look, random, detail)
        down = ((x - ridge) / slope, -2.6 / slope, 0.0)
        corners = [(ridge, height + 2.6, z0), (ridge, height + 2.6, z1), (x, height, z1), (x, height, z0)]
        plane = view.plane(corners[0], (0, 0, 1), down)
        canvas.decal(tiles, detail, view.project(corners), plane, BUILDING)
    if view.depth(x, z0) > NEAR:
        wall = _plain(texture, building.depth, height + 3, light.on(colour, TOWARDS_CAMERA), look, random, detail)
        plane = view.plane((x, height + 3, z0), (side, 0, 0), DOWN)
        canvas.decal(wall, detail, view.project(end), plane, BUILDING)

    picture = _facade(building, look, light, random, texture, light.on(colour, (-side, 0, 0)), detail)
    front = [(x, height, z0), (x, height, z1), (x, 0.0, z1), (x, 0.0, z0)]
    canvas.decal(picture, detail, view.project(front), view.plane(front[0], (0, 0, 1), DOWN), BUILDING)


def paint_fence(canvas: Canvas, fence: Fence, look: Look, light: Light, random: Random) -> None:
    """Bars and rails in front of a hedge."""
    view = canvas.view
    side = math.copysign(1, fence.x)
    detail = _detail(view.depth(fence.x, max(fence.z0, NEAR)))
    hedge = light.on(scaled(random.choice(look.foliage), 0.55), (-side, 0, 0))
    picture = _plain("foliage", fence.z1 - fence.z0, fence.height, hedge, look, random, detail)
    draw = ImageDraw.Draw(picture)
    bar = ink(light.on(random.choice(look.fences), (-side, 0, 0)))
    step = fence.pitch * detail
    for place in np.arange(0, picture.width, step):
        draw.rectangle((place, 0.06 * detail, place + 0.45 * step, picture.height), fill=bar)
    for share in (0.1, 0.75):
        top = share * picture.height
        draw.rectangle((0, top, picture.width, top + 0.1 * detail), fill=bar)
    z0, z1, height = fence.z0, fence.z1, fence.height
    corners = [(fence.x, height, z0), (fence.x, height, z1), (fence.x, 0.0, z1), (fence.x, 0.0, z0)]
    canvas.decal(picture, detail, view.project(corners), view.plane(corners[0], (0, 0, 1), DOWN), FENCE)


def _facade(
    building: Building, look: Look, light: Light, random: Random, texture: Texture, wall: RGB, detail: int
) -> Image.Image:
    width, height = building.z1 - building.z0, building.height
    normal = (-math.copysign(1, building.x), 0.0, 0.0)
    picture = _plain(texture, width, height, wall, look, random, detail)
    draw = ImageDraw.Draw(picture)

    def box(u: float, v: float, wide: float, high: float, colour: RGB) -> None:
        """A rectangle in metres from the facade's upper left corner."""
        left, top = round(u * detail), round(v * detail)
        right, bottom = round((u + wide) * detail) - 1, round((v + high) * detail) - 1
        draw.rectangle((left, top, max(right, left), max(bottom, top)), fill=ink(colour))

    frame = light.on(random.choice(look.frames), normal)
    trim = scaled(wall, random.choice((0.72, 1.18, 1.25)))
    wide, tall = building.bay * random.uniform(0.36, 0.56), random.uniform(1.35, 1.9)
    shutters = light.on(random.choice(BANNERS), normal) if random.random() < 0.25 else None
    storeys, bays = int(height // STOREY), round(width / building.bay)
    box(0, height - 0.6, width, 0.6, scaled(wall, 0.72))
    for storey in range(1 if building.shop else 0, storeys):
        top = height - STOREY * (storey + 1) + (STOREY - tall) * 0.45
        for bay in range(bays):
            u = bay * building.bay + (building.bay - wide) / 2
            if storey == 0 and bay == bays // 2:
                box(u, height - 2.4, 1.1, 2.4, frame)
                box(u + 0.1, height - 2.25, 0.9, 2.25, light.on(scaled(random.choice(BANNERS), 0.8), normal))
                continue
            if detail > 5:
                box(u - 0.14, top + tall, wide + 0.28, 0.16, trim)
            box(u - 0.1, top - 0.1, wide + 0.2, tall + 0.12, frame)
            _pane(box, u, top, wide, tall, look, light, random)
            if detail > 5:
                box(u + wide / 2 - 0.05, top, 0.1, tall, frame)
                box(u, top + tall * 0.35, wide, 0.09, frame)
            if shutters is not None:
                box(u - 0.52, top, 0.4, tall, shutters)
                box(u + wide + 0.12, top, 0.4, tall, shutters)
    if building.shop:
        banner = light.on(random.choice(BANNERS), normal)
        box(0.3, height - 3.1, width - 0.6, 0.6, banner)
        for bay in range(bays):
            u = bay * building.bay + 0.2
            box(u, height - 2.45, building.bay - 0.4, 2.0, frame)
            _pane(box, u + 0.12, height - 2.35, building.bay - 0.64, 1.8, look, light, random)
    box(0, 0, width, 0.35, trim)
    box(0, 0.35, width, 0.2, scaled(wall, 0.68))
    return picture


def _pane(box: Box, u: float, v: float, wide: float, tall: float, look: Look, light: Light, random: Random) -> None:
    if random.random() < look.lit_windows:
        lamp = scaled(random.choice(LAMPLIGHT), random.uniform(0.65, 1))
        box(u, v, wide, tall, lamp)
        box(u, v + tall * 0.6, wide, tall * 0.4, scaled(lamp, 0.8))
        return
    glass = mixed(look.glass, look.sky_bottom[0], random.choice((0.0, 0.1, 0.2, 0.45)))
    box(u, v, wide, tall, scaled(glass, 0.85))
    box(u, v, wide, tall * random.uniform(0.2, 0.6), glass)
    if random.random() < 0.35:
        box(u, v, wide * 0.28, tall, mixed(glass, light.ambient, 0.7))


def _plain(
    texture: Texture, width: float, height: float, colour: RGB, look: Look, random: Random, detail: int
) -> Image.Image:
    """A wall of one texture and colour, width x height in metres, at so many texels per metre."""
    grey = _grey(texture, look.wall_grain, detail)
    shifted = ImageChops.offset(grey, random.randrange(grey.width), random.randrange(grey.height))
    size = (max(round(width * detail), 1), max(round(height * detail), 1))
    patch = shifted.crop((0, 0, *size))
    patch.putpalette(np.clip(np.outer(np.arange(256) / 128, colour), 0, 255).astype(np.uint8).tobytes())
    return patch.convert("RGB")


@lru_cache(maxsize=64)
def _grey(texture: Texture, grain: float, detail: int) -> Image.Image:
    values = 128 * (1 + grain * (tile(texture) - 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).reduce(TEXELS_PER_METRE // detail)


def _detail(depth: float) -> int:
    """Texels per metre worth drawing at a depth."""
    return TEXELS_PER_METRE if depth < 14 else TEXELS_PER_METRE // 2 if depth < 32 else TEXELS_PER_METRE // 4
