"""A pinhole view of a street and the canvas it is painted on, back to front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dist_pca.tools.demo.looks import RGB, Mount, Range
from dist_pca.tools.demo.world import World

SUPERSAMPLING = 2
NEAR = 0.6

Point = tuple[float, float, float]
Pixel = tuple[float, float]
Array = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]


def between(bounds: Range, share: float) -> float:
    """The value at a share (0..1) of a range."""
    return bounds[0] + share * (bounds[1] - bounds[0])


@dataclass(frozen=True)
class View:
    """A level pinhole camera; the horizon is set by shifting the lens, so that what is upright stays upright."""

    width: int
    height: int
    focal: float
    """In pixels."""
    horizon: float
    """Row of the horizon."""
    x: float
    """Metres right of the road's centre line."""
    y: float
    """Metres above the road."""
    yaw: float
    """Radians to the right."""

    def depth(self, x: float, z: float) -> float:
        """Metres in front of the camera."""
        return math.sin(self.yaw) * (x - self.x) + math.cos(self.yaw) * z

    def project(self, points: Sequence[Point]) -> list[Pixel]:
        """The polygon as pixels, cut off at the near plane; empty if all of it lies behind."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        seen = [
            (cos * (x - self.x) - sin * z, self.y - y, max(sin * (x - self.x) + cos * z, -1e3)) for x, y, z in points
        ]
        if any(z < NEAR for _, _, z in seen):
            seen = _cut(seen)
        return [(self.focal * x / z + self.width / 2, self.focal * y / z + self.horizon) for x, y, z in seen]

    def plane(self, origin: Point, across: Point, down: Point) -> Matrix:
        """3 x 3 matrix that takes (column, row, 1) to (u, v, 1) / depth of origin + u across + v down."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        turn = np.array([[cos, 0, -sin], [0, -1, 0], [sin, 0, cos]])
        lens = np.array([[self.focal, 0, self.width / 2], [0, self.focal, self.horizon], [0, 0, 1]])
        start = np.subtract(origin, (self.x, self.y, 0))
        return np.linalg.inv(lens @ turn @ np.stack([across, down, start], axis=1))


def view(world: World, mount: Mount, size: tuple[int, int]) -> View:
    """The view of a camera mounted like this, at SUPERSAMPLING times the size (height, width)."""
    height, width = (SUPERSAMPLING * edge for edge in size)
    tall, focal, horizon, yaw, across = world.gaze
    return View(
        width=width,
        height=height,
        focal=between(mount.focal, focal) * width,
        horizon=between(mount.horizon, horizon) * height,
        x=world.lane * (0.3 + 0.4 * across),
        y=between(mount.height, tall),
        yaw=math.radians(between(mount.yaw, yaw)),
    )


def _cut(points: list[Point]) -> list[Point]:
    kept: list[Point] = []
    for start, end in zip(points[-1:] + points[:-1], points, strict=True):
        if (start[2] < NEAR) != (end[2] < NEAR):
            share = (NEAR - start[2]) / (end[2] - start[2])
            kept.append((start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]), NEAR))
        if end[2] >= NEAR:
            kept.append(end)
    return kept


@dataclass
class Canvas:
    """Colour, and for every pixel the surface it shows; a surface has a label and a plane, hence a depth."""

    view: View
    labels: list[int] = field(default_factory=list)
    nearness: list[tuple[float, float, float]] = field(default_factory=list)
    """Per surface, (a, b, c) of 1 / depth = a column + b row + c."""

    def __post_init__(self) -> None:
        size = (self.view.width, self.view.height)
        self.colour = Image.new("RGB", size)
        self.surfaces = Image.new("I", size)
        self._brush = ImageDraw.Draw(self.colour)
        self._marker = ImageDraw.Draw(self.surfaces)

    def surface(self, label: int, depth: float) -> int:
        """Declare an upright surface that faces the camera at a depth in metres; its number."""
        return self._declare(label, (0.0, 0.0, 1 / max(depth, NEAR)))

    def slanted(self, label: int, plane: Matrix) -> int:
        """Declare a surface on a plane of `View.plane`; its number."""
        a, b, c = plane[2]
        return self._declare(label, (float(a), float(b), float(c)))

    def _declare(self, label: int, nearness: tuple[float, float, float]) -> int:
        self.labels.append(label)
        self.nearness.append(nearness)
        return len(self.labels) - 1

    def polygon(self, pixels: Sequence[Pixel], colour: RGB, surface: int | None = None) -> None:
        """Fill a polygon; without a surface it is paint on what is there."""
        if len(pixels) >= 3:
            self._brush.polygon(pixels, fill=ink(colour))
            if surface is not None:
                self._marker.polygon(pixels, fill=surface)

    def disc(self, centre: Pixel, radius: float, colour: RGB, surface: int | None = None) -> None:
        """Fill a disc."""
        box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
        self._brush.ellipse(box, fill=ink(colour))
        if surface is not None:
            self._marker.ellipse(box, fill=surface)

    def line(self, pixels: Sequence[Pixel], width: float, colour: RGB, surface: int | None = None) -> None:
        """Draw a line that, where it has a surface, is never thinner than two pixels of the finished label."""
        thick = max(round(width), 2 * SUPERSAMPLING if surface is not None else 1)
        self._brush.line(pixels, fill=ink(colour), width=thick)
        if surface is not None:
            self._marker.line(pixels, fill=surface, width=thick)

    def stamp(self, picture: Image.Image, mask: Image.Image, corner: tuple[int, int], surface: int) -> None:
        """Paste a picture where its mask is set."""
        box = (*corner, corner[0] + mask.width, corner[1] + mask.height)
        self.colour.paste(picture, box, mask)
        self.surfaces.paste(surface, box, mask)

    def decal(self, picture: Image.Image, texels: float, pixels: Sequence[Pixel], plane: Matrix, label: int) -> None:
        """Fill a polygon with a picture of so many texels per metre that lies on a plane of `View.plane`."""
        box = self._box(pixels)
        if box is None:
            return
        left, top, right, bottom = box
        mask = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=1)
        moved = np.diag([texels, texels, 1]) @ plane @ np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
        warp = (moved / moved[2, 2]).ravel()[:8]
        shape = Image.Transform.PERSPECTIVE
        warped = picture.transform(mask.size, shape, tuple(warp), resample=Image.Resampling.BILINEAR)
        self.stamp(warped, mask, (left, top), self.slanted(label, plane))

    def _box(self, pixels: Sequence[Pixel]) -> tuple[int, int, int, int] | None:
        if len(pixels) < 3:
            return None
        columns, rows = [x for x, _ in pixels], [y for _, y in pixels]
        left, top = max(math.floor(min(columns)), 0), max(math.floor(min(rows)), 0)
        right = min(math.ceil(max(columns)) + 1, self.view.width)
        bottom = min(math.ceil(max(rows)) + 1, self.view.height)
        return (left, top, right, bottom) if right > left and bottom > top else None

    def resolve(self) -> tuple[Array, npt.NDArray[np.uint8], Array]:
        """Colour (height x width x 3, 0..1), labels and depth (metres) at the finished size."""
        step = SUPERSAMPLING
        surface = np.asarray(self.surfaces)[::step, ::step]
        colour = np.asarray(self.colour.reduce(step), dtype=np.float32) / np.float32(255)
        a, b, c = np.array(self.nearness, dtype=np.float32).T
        rows, columns = np.float32(step) * np.indices(surface.shape, dtype=np.float32)
        nearness = a[surface] * columns + b[surface] * rows + c[surface]
        return colour, np.array(self.labels, dtype=np.uint8)[surface], 1 / np.maximum(nearness, 1e-3)


def ink(colour: RGB) -> tuple[int, int, int]:
    """The colour as Pillow takes it; Pillow clips to 0..255 itself."""
    return int(colour[0]), int(colour[1]), int(colour[2])
