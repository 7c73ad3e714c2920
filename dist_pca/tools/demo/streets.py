"""Drawn streets with labels: three domains of one kind of world, with nothing to download."""

from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from rich.progress import track

from dist_pca.classes import CITYSCAPES_CLASSES, ClassInfo
from dist_pca.console import plain_console
from dist_pca.files import write_whole
from dist_pca.tools.demo.canvas import Canvas, view
from dist_pca.tools.demo.cars import paint_car
from dist_pca.tools.demo.houses import paint_building, paint_fence
from dist_pca.tools.demo.light import draw_light, shine
from dist_pca.tools.demo.looks import DAY, DUSK, NIGHT, Look
from dist_pca.tools.demo.reflections import reflect
from dist_pca.tools.demo.scenery import paint_ground, paint_sky, paint_skyline
from dist_pca.tools.demo.sensor import develop
from dist_pca.tools.demo.things import paint_lamp, paint_person, paint_sign, paint_tree
from dist_pca.tools.demo.world import CLASS_NAMES, Building, Car, Fence, Lamp, Person, Sign, Tree, draw_world

__all__ = ["CLASSES", "DAY", "DUSK", "NIGHT", "Look", "render_street", "write_streets"]

CLASSES: tuple[ClassInfo, ...] = tuple(info for name in CLASS_NAMES for info in CITYSCAPES_CLASSES if info.name == name)
"""Names and colours of the labels, by index."""


def render_street(
    index: int, look: Look, *, seed: int, size: tuple[int, int] = (160, 256)
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw one street.

    What stands where is a function of (seed, index) alone, so that two looks of one index differ in label only
    through `Look.mount`.

    Args:
        index: number of the street.
        look: the domain.
        seed: seed of all streets.
        size: height and width in pixels.

    Returns:
        The image, H x W x 3, and its label, H x W, an index into `CLASSES` at every pixel; both 8 bits.
    """
    world = draw_world(Random(f"world {seed} {index}"))
    random = Random(f"{look.name} {seed} {index}")
    light = draw_light(look, random)
    canvas = Canvas(view(world, look.mount, size))
    haze = paint_sky(canvas, look, random)
    paint_skyline(canvas, world, look, light, random)
    paint_ground(canvas, world, look, light, random)
    for thing in (*world.lots, *world.things):
        if isinstance(thing, Building):
            paint_building(canvas, thing, look, light, random)
        elif isinstance(thing, Fence):
            paint_fence(canvas, thing, look, light, random)
        elif canvas.view.depth(thing.x, thing.z) < 1.5:
            continue
        elif isinstance(thing, Tree):
            paint_tree(canvas, thing, look, light, random)
        elif isinstance(thing, Lamp):
            paint_lamp(canvas, thing, look, light, random)
        elif isinstance(thing, Sign):
            paint_sign(canvas, thing, look, light, random)
        elif isinstance(thing, Car):
            paint_car(canvas, thing, look, light, random)
        elif isinstance(thing, Person):
            paint_person(canvas, thing, look, light, random)
    colour, label, depth = canvas.resolve()
    if look.lamplight:
        colour = shine(colour, depth, canvas.view, light.glows, look)
    if look.wetness:
        colour = reflect(colour, label, depth, canvas.view, light.glows, look, random)
    return develop(colour, depth, light.glows, haze, look, random), label


def write_streets(
    root: Path, look: Look, *, split: str, indices: Iterable[int], seed: int, size: tuple[int, int] = (160, 256)
) -> None:
    """Draw streets into the folders that the shard recipe `folder` reads.

    Writes ROOT/images/NAME.png, ROOT/labels/NAME.png (class index per pixel) and ROOT/classes.yaml; NAME is
    SPLIT-INDEX. The same arguments write the same bytes.

    Args:
        root: the folder, made where missing.
        look: the domain.
        split: first part of the names.
        indices: numbers of the streets.
        seed: seed of all streets.
        size: height and width in pixels.
    """
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    table = [{"name": info.name, "color": list(info.color)} for info in CLASSES]
    write_whole(root / "classes.yaml", yaml.safe_dump(table, sort_keys=False, default_flow_style=None))
    for index in track(
        list(indices), console=plain_console(stderr=True), description=f"drawing {look.name} streets ({split})"
    ):
        image, label = render_street(index, look, seed=seed, size=size)
        name = f"{split}-{index:05d}.png"
        Image.fromarray(image).save(root / "images" / name, compress_level=3)
        Image.fromarray(label).save(root / "labels" / name)
