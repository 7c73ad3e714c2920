"""Tileable grey textures: 512 x 512 texels, mean near mid grey, one made per kind and then kept."""

from functools import cache

import numpy as np
import numpy.typing as npt

from dist_pca.tools.demo.looks import Texture

TILE = 512
TEXELS_PER_METRE = 20

Array = npt.NDArray[np.float32]


@cache
def tile(kind: Texture) -> Array:
    """The texture as 512 x 512 factors around 1; rows run down a wall, or along a road."""
    random = np.random.default_rng(list(kind.encode()))
    rough, soft = cloudy(random, slope=0.5), cloudy(random, slope=1.3)
    if kind == "asphalt":
        values = 1 + 0.13 * rough + 0.03 * soft
    elif kind == "plaster":
        values = 1 + 0.03 * rough + 0.07 * soft
    elif kind == "foliage":
        clumps = cloudy(random, slope=0.9)
        values = 0.95 + 0.32 * np.tanh(1.4 * clumps) + 0.08 * rough
    elif kind == "brick":
        values = _courses(random, width=8, height=4, tone=0.14, joint=0.8) + 0.05 * rough + 0.05 * soft
    elif kind == "stone":
        values = _courses(random, width=16, height=8, tone=0.09, joint=0.78) + 0.06 * rough + 0.05 * soft
    elif kind == "cobbles":
        values = _courses(random, width=4, height=4, tone=0.17, joint=0.7) + 0.04 * rough + 0.08 * soft
    elif kind == "slabs":
        values = _courses(random, width=16, height=16, tone=0.05, joint=0.8) + 0.04 * rough + 0.04 * soft
    elif kind == "tiles":
        values = _courses(random, width=4, height=8, tone=0.1, joint=0.7) + 0.05 * soft
    else:
        values = _courses(random, width=32, height=64, tone=0.06, joint=0.75) + 0.03 * rough + 0.09 * soft
    return np.asarray(values, dtype=np.float32)


def cloudy(random: np.random.Generator, slope: float) -> Array:
    """Periodic noise of all octaves whose amplitude falls as frequency to the power -slope; mean 0, variance 1."""
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.standard_normal((TILE, TILE))) / frequency**slope
    values = np.fft.irfft2(spectrum, s=(TILE, TILE))
    return np.asarray(values / values.std(), dtype=np.float32)


def _courses(random: np.random.Generator, width: int, height: int, tone: float, joint: float) -> Array:
    """Blocks laid in courses, every other course moved by half a block; `joint` is the mortar's factor."""
    row, column = np.mgrid[:TILE, :TILE]
    course = row // height
    along = column + (course % 2) * (width // 2)
    tones = 1 + tone * random.standard_normal((TILE // height, TILE // width + 1))
    values = tones[course, along // width % (TILE // width)]
    return np.where((row % height == 0) | (along % width == 0), joint, values).astype(np.float32)
