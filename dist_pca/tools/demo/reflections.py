"""Wet ground: road and sidewalk mirror what stands on and above them, drawn out by the ground's roughness."""

from random import Random

import numpy as np
import numpy.typing as npt

from dist_pca.tools.demo.canvas import SUPERSAMPLING, Array, View
from dist_pca.tools.demo.light import Glow
from dist_pca.tools.demo.looks import Look, Texture
from dist_pca.tools.demo.textures import TEXELS_PER_METRE, TILE, tile
from dist_pca.tools.demo.world import ROAD, SIDEWALK

WATER = 0.03
"""Share of light that water reflects when looked at from straight above."""


def reflect(
    colour: Array,
    label: npt.NDArray[np.uint8],
    depth: Array,
    view: View,
    glows: list[Glow],
    look: Look,
    random: Random,
) -> Array:
    """Lay the mirror image of everything above the ground, and streaks under the lamps, on wet ground.

    Args:
        colour: H x W x 3 in 0..1.
        label: H x W, index into the classes.
        depth: H x W in metres.
        view: The camera, in pixels of the canvas.
        glows: The lamps that are on.
        look: The domain.
        random: Where the ground's puddles lie.

    Returns:
        H x W x 3; only road and sidewalk differ from what was given.
    """
    wet = (label == ROAD) | (label == SIDEWALK)
    image = _mirrored(colour, depth, wet, view) + _streaks(view, glows)
    share = (look.wetness * _reflectance(depth, view, random) * wet)[..., None]
    return np.asarray(colour + share * (image - colour), dtype=np.float32)


def _mirrored(colour: Array, depth: Array, wet: npt.NDArray[np.bool_], view: View) -> Array:
    """What a rough mirror at height 0 shows: every pixel goes as far below the foot of its surface as it is above."""
    height = len(depth)
    rows, columns = np.nonzero(~wet)
    feet = (view.horizon + view.focal * view.y / depth[rows, columns]) / SUPERSAMPLING
    below = np.rint(2 * feet - rows).astype(np.intp)
    kept = np.nonzero((below > rows) & (below < height))[0]
    # Far to near: of several surfaces that land on one pixel, the last one written stays.
    kept = kept[np.argsort(-depth[rows[kept], columns[kept]], kind="stable")]
    image = np.zeros((*depth.shape, 4), np.float32)
    # Lamps and lit windows are brighter than a picture can hold, and stay bright in a mirror that takes half of it.
    bright = np.minimum(colour[rows[kept], columns[kept]], 1)
    image[below[kept], columns[kept], :3] = bright * (1 + 1.2 * bright**3)
    image[below[kept], columns[kept], 3] = 1

    # Roughness smears a reflection along the column; gaps (what hides behind something nearer) take on what is around.
    smeared = 0.55 * _along_columns(image, max(height // 50, 1)) + 0.45 * _along_columns(image, height // 10)
    return np.asarray(smeared[..., :3] / np.maximum(smeared[..., 3:], 0.05), dtype=np.float32)


def _along_columns(image: Array, radius: int) -> Array:
    """Mean over 2 radius + 1 rows, fewer at the edges."""
    height = len(image)
    total = np.concatenate([np.zeros_like(image[:1]), image.cumsum(axis=0)])
    first, last = np.arange(height) - radius, np.arange(height) + radius + 1
    return np.asarray((total[last.clip(0, height)] - total[first.clip(0, height)]) / (2 * radius + 1))


def _streaks(view: View, glows: list[Glow]) -> Array:
    """Lamps' reflections, H x W x 3: long and narrow, around the mirror image of each lamp."""
    height, width = view.height // SUPERSAMPLING, view.width // SUPERSAMPLING
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None]
    image = np.zeros((height, width, 3), np.float32)
    for glow in glows:
        x, _, z = glow.point
        foot = (view.horizon + view.focal * view.y / view.depth(x, z)) / SUPERSAMPLING
        below = 2 * foot - glow.centre[1]
        length = 0.35 * (below - foot) + 0.02 * height
        breadth = max(0.3 * glow.radius, 0.8)
        along = np.exp(-(((rows - below) / length) ** 2)) * (rows > foot)
        across = np.exp(-(((columns - glow.centre[0]) / breadth) ** 2))
        image += 1.6 * (along * across)[..., None] * np.array(glow.colour, np.float32)
    return image


def _reflectance(depth: Array, view: View, random: Random) -> Array:
    """Share of light that wet ground reflects, H x W: Schlick's approximation, more in puddles, broken by the grain."""
    rows = np.arange(depth.shape[0], dtype=np.float32)[:, None]
    columns = np.arange(depth.shape[1], dtype=np.float32)[None]
    plane = view.plane((0, 0, 0), (1, 0, 0), (0, 0, 1)).astype(np.float32)
    x, z = (SUPERSAMPLING * (a * columns + b * rows) + c for a, b, c in plane[:2])
    across, along = (np.clip(axis * depth, -200, 200) * TEXELS_PER_METRE for axis in (x, z))
    left, top = random.randrange(TILE), random.randrange(TILE)

    def texture(kind: Texture, scale: float) -> Array:
        row, column = (along * scale + top).astype(np.intp), (across * scale + left).astype(np.intp)
        return np.asarray(tile(kind)[row % TILE, column % TILE])

    # Cosine of the angle to the ground's normal. Schlick's power is 5; waves, some of which lean away, make it about 4.
    slant = np.minimum(view.y / depth, 1)
    fresnel = WATER + (1 - WATER) * (1 - slant) ** 4
    puddles = 1 / (1 + np.exp(-(texture("plaster", 0.4) - 1.03) / 0.02))
    grain = 1 + 0.9 * (texture("asphalt", 1.0) - 1) / (1 + depth / 20)
    return np.asarray(np.clip(fresnel * (0.7 + 0.3 * puddles) * grain, 0, 0.95), dtype=np.float32)
