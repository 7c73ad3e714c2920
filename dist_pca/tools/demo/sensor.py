"""The air between the street and the camera, and the camera itself."""

import math
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from dist_pca.tools.demo.canvas import Array, between
from dist_pca.tools.demo.light import Glow
from dist_pca.tools.demo.looks import RGB, Look, Sensor


def develop(
    colour: Array, depth: Array, glows: list[Glow], haze: RGB, look: Look, random: Random
) -> npt.NDArray[np.uint8]:
    """The picture a camera takes: fog, glow, exposure, vignette, blur and noise.

    Args:
        colour: H x W x 3 in 0..1.
        depth: H x W in metres.
        glows: the lamps that are on.
        haze: colour of distant air, in 0..255.
        look: the domain.
        random: where in its ranges this picture lies.

    Returns:
        H x W x 3, 8 bits.
    """
    thickness = np.float32(between(look.fog, random.random()))
    clear = np.exp(-thickness * np.minimum(depth, np.float32(160)))[..., None]
    air = np.array(haze, np.float32) / np.float32(255)
    image = air + clear * (colour - air)
    # The sky is painted with its own air.
    image[depth > 500] = colour[depth > 500]
    for glow in glows:
        _shine(image, glow)
    return _expose(image, look.sensor, random)


def _shine(image: Array, glow: Glow) -> None:
    height, width, _ = image.shape
    (x, y), reach = glow.centre, 2.5 * glow.radius
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, width)
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, height)
    if left >= right or top >= bottom:
        return
    across = (np.arange(left, right, dtype=np.float32) - x) / glow.radius
    down = (np.arange(top, bottom, dtype=np.float32) - y) / glow.radius
    halo = np.exp(-1.5 * np.hypot(down[:, None], across[None]) ** 1.2) - math.exp(-1.5 * 2.5**1.2)
    part = image[top:bottom, left:right]
    part += np.maximum(halo, 0)[..., None] * np.array(glow.colour, np.float32) * (1 - np.clip(part, 0, 1))


def _expose(image: Array, sensor: Sensor, random: Random) -> npt.NDArray[np.uint8]:
    height, width, _ = image.shape
    warmth = between(sensor.warmth, random.random()) / 2
    balance = between(sensor.exposure, random.random()) * np.exp([warmth, 0, -warmth])
    rows, columns = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shade = 1 - between(sensor.vignette, random.random()) * (rows**2 + columns**2) / 2
    image = image * balance.astype(np.float32) * shade[..., None].astype(np.float32)

    radius = between(sensor.blur, random.random()) * height
    soft = Image.fromarray(_bytes(image)).filter(ImageFilter.GaussianBlur(radius))
    image = np.asarray(soft, dtype=np.float32) / np.float32(255)
    grain = np.random.default_rng(random.getrandbits(64)).standard_normal(image.shape, dtype=np.float32)
    strength = np.float32(between(sensor.noise, random.random()))
    return _bytes(image + strength * np.sqrt(np.float32(0.3) + image) * grain)


def _bytes(image: Array) -> npt.NDArray[np.uint8]:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
