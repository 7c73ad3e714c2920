"""What decides how a street looks: its light, its materials, its air and the camera that sees it.

Colours are RGB in 0..255 as a picture stores them; ranges are (low, high) and are drawn from uniformly.
"""

from dataclasses import dataclass
from typing import Literal

RGB = tuple[float, float, float]
Range = tuple[float, float]
Texture = Literal["asphalt", "brick", "cobbles", "foliage", "panels", "plaster", "slabs", "stone", "tiles"]


@dataclass(frozen=True)
class Mount:
    """Where the camera sits and what it takes in: the only part of a look that moves labels."""

    height: Range
    """Metres above the road."""
    focal: Range
    """Focal length over the image's width."""
    horizon: Range
    """Height of the horizon over the image's height, from the top."""
    yaw: Range
    """Degrees to the right of the road's direction."""


@dataclass(frozen=True)
class Sensor:
    """What the camera does to the light it receives."""

    exposure: Range
    """Gain."""
    warmth: Range
    """Gain of red over that of blue, as the logarithm."""
    blur: Range
    """Radius of the Gaussian blur over the image's height."""
    noise: Range
    """Standard deviation of the noise at mid grey, in 0..1."""
    vignette: Range
    """Light lost in the corners, in 0..1."""


@dataclass(frozen=True)
class Look:
    """One domain."""

    name: str
    mount: Mount
    sensor: Sensor
    sun_elevation: Range
    """Degrees above the ground."""
    sun: RGB
    """Light of the sun on a surface that faces it; 255 returns the surface's own colour."""
    ambient: RGB
    """Light of the sky on every surface."""
    sky_top: tuple[RGB, ...]
    sky_bottom: tuple[RGB, ...]
    cloud: tuple[RGB, ...]
    fog: Range
    """Share of light lost per metre."""
    walls: tuple[tuple[Texture, RGB], ...]
    roofs: tuple[RGB, ...]
    road: tuple[RGB, ...]
    road_texture: Texture
    sidewalk: tuple[RGB, ...]
    sidewalk_texture: Texture
    ground_grain: float
    """Contrast of the ground's texture."""
    wall_grain: float
    """Contrast of the walls' texture."""
    foliage: tuple[RGB, ...]
    bark: RGB
    metal: tuple[RGB, ...]
    fences: tuple[RGB, ...]
    paints: tuple[RGB, ...]
    clothes: tuple[RGB, ...]
    frames: tuple[RGB, ...]
    glass: RGB
    lit_windows: float
    """Share of windows with the light on."""
    lamps_on: bool
    """Whether street lamps and cars have their lights on."""
    halo: float = 1.0
    """Gain of the radius of a lamp's halo."""
    lamplight: float = 0.0
    """Light of a street lamp on a surface a metre away, over the light of the sky."""
    headlights: float = 0.0
    """Light of the camera's own car on a surface just ahead, over the light of the sky."""
    retroreflection: float = 1.0
    """Gain of traffic signs, which send headlights back to where they come from."""
    wetness: float = 0.0
    """Share of the ground's mirror image that a film of water would give; 0 is dry."""


DAY = Look(
    name="day",
    mount=Mount(height=(1.4, 1.8), focal=(0.58, 0.7), horizon=(0.44, 0.54), yaw=(-6, 6)),
    sensor=Sensor(
        exposure=(0.98, 1.18), warmth=(-0.05, 0.08), blur=(0, 0.002), noise=(0.004, 0.012), vignette=(0, 0.1)
    ),
    sun_elevation=(42, 66),
    sun=(168, 158, 138),
    ambient=(130, 136, 148),
    sky_top=((82, 138, 206), (98, 156, 220), (70, 122, 192), (128, 162, 200)),
    sky_bottom=((190, 212, 232), (204, 220, 232), (180, 206, 236)),
    cloud=((246, 246, 246), (236, 238, 242)),
    fog=(0.0005, 0.002),
    walls=(
        ("plaster", (226, 206, 168)),
        ("plaster", (216, 186, 146)),
        ("plaster", (232, 222, 202)),
        ("plaster", (204, 160, 128)),
        ("plaster", (198, 204, 196)),
        ("plaster", (222, 176, 150)),
        ("brick", (178, 110, 84)),
        ("stone", (196, 184, 160)),
    ),
    roofs=((162, 84, 62), (146, 96, 78), (120, 106, 100)),
    road=((104, 104, 106), (114, 112, 110), (96, 98, 102)),
    road_texture="asphalt",
    sidewalk=((172, 166, 156), (186, 180, 172), (160, 156, 150)),
    sidewalk_texture="slabs",
    ground_grain=0.8,
    wall_grain=0.8,
    foliage=((84, 128, 52), (70, 116, 48), (104, 142, 60), (62, 104, 56)),
    bark=(112, 90, 70),
    metal=((112, 116, 120), (84, 92, 92), (66, 72, 76)),
    fences=((148, 112, 78), (86, 92, 92), (196, 190, 178)),
    paints=((196, 40, 36), (232, 232, 230), (40, 70, 140), (176, 180, 186), (52, 54, 58), (214, 170, 48)),
    clothes=((190, 60, 56), (46, 72, 130), (228, 222, 210), (216, 168, 60), (60, 60, 66), (94, 140, 112)),
    frames=((240, 238, 232), (226, 222, 212), (110, 84, 64)),
    glass=(78, 96, 112),
    lit_windows=0.0,
    lamps_on=False,
)

DUSK = Look(
    name="dusk",
    mount=Mount(height=(1.15, 1.9), focal=(0.52, 0.76), horizon=(0.4, 0.56), yaw=(-9, 9)),
    sensor=Sensor(
        exposure=(0.95, 1.35), warmth=(-0.12, 0.12), blur=(0.001, 0.004), noise=(0.01, 0.025), vignette=(0.1, 0.4)
    ),
    sun_elevation=(9, 20),
    sun=(120, 76, 46),
    ambient=(112, 108, 130),
    sky_top=((84, 96, 150), (104, 100, 150), (76, 92, 136), (116, 112, 146)),
    sky_bottom=((222, 150, 112), (202, 136, 126), (170, 140, 150), (228, 172, 120)),
    cloud=((150, 104, 112), (96, 88, 118), (210, 140, 116)),
    fog=(0.004, 0.014),
    walls=(
        ("brick", (150, 92, 78)),
        ("brick", (126, 84, 72)),
        ("brick", (168, 124, 100)),
        ("stone", (142, 138, 134)),
        ("stone", (164, 150, 128)),
        ("panels", (150, 152, 156)),
        ("panels", (122, 128, 136)),
        ("plaster", (188, 176, 156)),
    ),
    roofs=((84, 84, 92), (104, 82, 78), (70, 74, 80)),
    road=((88, 88, 96), (112, 104, 100), (76, 80, 90)),
    road_texture="cobbles",
    sidewalk=((132, 124, 122), (150, 136, 124), (118, 116, 120)),
    sidewalk_texture="brick",
    ground_grain=1.0,
    wall_grain=1.0,
    foliage=((92, 102, 52), (76, 92, 56), (134, 104, 48), (66, 82, 58)),
    bark=(78, 70, 66),
    metal=((84, 86, 90), (58, 66, 64), (120, 118, 114)),
    fences=((74, 76, 80), (108, 84, 66), (132, 130, 124)),
    paints=((140, 36, 36), (196, 196, 200), (36, 52, 96), (130, 134, 142), (36, 38, 44), (90, 96, 84)),
    clothes=((66, 56, 60), (52, 64, 92), (130, 124, 116), (120, 60, 56), (44, 46, 52), (90, 94, 76)),
    frames=((196, 192, 186), (92, 88, 88), (70, 58, 52)),
    glass=(58, 62, 82),
    lit_windows=0.4,
    lamps_on=True,
)

NIGHT = Look(
    name="night",
    mount=Mount(height=(1.7, 2.5), focal=(0.5, 0.82), horizon=(0.34, 0.52), yaw=(-10, 10)),
    sensor=Sensor(
        exposure=(0.8, 1.2), warmth=(-0.3, -0.05), blur=(0.003, 0.008), noise=(0.035, 0.06), vignette=(0.25, 0.6)
    ),
    sun_elevation=(30, 60),
    sun=(10, 13, 20),
    ambient=(40, 44, 58),
    sky_top=((8, 11, 26), (12, 16, 36), (6, 8, 18), (16, 18, 34)),
    sky_bottom=((78, 60, 56), (54, 52, 70), (92, 70, 54), (40, 44, 64)),
    cloud=((48, 42, 50), (30, 32, 46), (84, 66, 56)),
    fog=(0.008, 0.024),
    walls=DUSK.walls,
    roofs=DUSK.roofs,
    road=((74, 74, 80), (84, 82, 82), (64, 66, 74)),
    road_texture="asphalt",
    sidewalk=((110, 106, 106), (124, 116, 110), (98, 98, 102)),
    sidewalk_texture="slabs",
    ground_grain=1.0,
    wall_grain=1.0,
    foliage=((70, 84, 46), (58, 76, 50), (92, 80, 46), (52, 68, 52)),
    bark=DUSK.bark,
    metal=DUSK.metal,
    fences=DUSK.fences,
    paints=DUSK.paints,
    clothes=DAY.clothes,
    frames=DUSK.frames,
    glass=(40, 46, 64),
    lit_windows=0.5,
    lamps_on=True,
    halo=1.4,
    lamplight=85.0,
    headlights=2.0,
    retroreflection=2.5,
    wetness=1.0,
)
