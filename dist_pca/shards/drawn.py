"""Labels that are shapes with names: COCO, labelme, and the polygons of Cityscapes and IDD.

Objects are drawn in the order of the file, later ones over earlier ones. Which pixels a shape covers is said in
`polygons`; the polygons of an annotation of COCO are joined, so holes need run lengths. For Cityscapes and IDD, whose
vertices are whole pixels and belong to the polygon, Pillow draws as in the data sets' own tools.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dist_pca.errors import UserError
from dist_pca.shards.coco import json_errors, read_annotations
from dist_pca.shards.polygons import Points, as_points, paint_circle, paint_polygon, run_length_mask
from dist_pca.shards.recipe import IGNORE, Coding
from dist_pca.shards.scan import RawSample

NO_OBJECT = ""
"""Stands in place of a label name where no object is."""
_REMEDY = "correct it, or leave the image out with --exclude or --on-error skip"


@dataclass
class Drawing:
    """A label that is being drawn: codes (height x width), each the place of a label name in `names`."""

    codes: npt.NDArray[np.int32]
    names: list[str] = field(default_factory=lambda: [NO_OBJECT])

    def code(self, name: str) -> int:
        """Code of a label name, a new one if it is the name's first object."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)


def draw_label(root: Path, raw: RawSample, coding: Coding, size: tuple[int, int]) -> Drawing:
    """Draw the label of a sample.

    Args:
        root: The data set's folder.
        raw: A sample with a label.
        coding: A coding of a kind that is drawn.
        size: Width and height of the upright image, which the label must state.

    Raises:
        UserError: the file or an object in it is damaged, or the label is of another size.
    """
    path = root / str(raw.label)
    if coding.kind == "coco":
        return _draw_coco(path, raw, coding, size)
    content = _load(path)
    if coding.kind == "labelme":
        return _draw_labelme(path, raw, content, coding, size)
    return _draw_cityscapes(path, raw, content, coding, size)


def _load(path: Path) -> dict[str, Any]:
    with json_errors(path, _REMEDY):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise UserError(f"{path}: its JSON is no object with shapes; {_REMEDY}")
    return content


def _draw_coco(path: Path, raw: RawSample, coding: Coding, size: tuple[int, int]) -> Drawing:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_REMEDY}")
    if raw.coco is None:
        raise UserError(f"{path}: has no entry for {raw.image}; add it, or leave the image out with --exclude")
    where = f"{path}: image {raw.coco.id}"
    _check_size(where, raw, (raw.coco.width, raw.coco.height), size)
    drawing = _blank(size)
    for annotation in read_annotations(path, raw.coco):
        with _named(f"{where}: annotation {annotation.get('id')!r:.40}"):
            number = annotation.get("category_id")
            if type(number) is not int or number not in raw.coco.categories:
                raise ValueError(f"category_id {number!r:.40} is not in `categories`")
            name = raw.coco.categories[number]
            if name in coding.skip:
                continue
            crowd = annotation.get("iscrowd") and coding.crowd == "ignore"
            _draw_segmentation(drawing, annotation.get("segmentation"), IGNORE if crowd else name)
    return drawing


def _draw_segmentation(drawing: Drawing, segmentation: Any, name: str) -> None:
    if isinstance(segmentation, dict):
        height, width = drawing.codes.shape
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"run lengths of size {segmentation.get('size')!r:.40}, not [{height}, {width}]")
        drawing.codes[run_length_mask(segmentation.get("counts"), height, width)] = drawing.code(name)
        return
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("segmentation holds neither polygons nor run lengths")
    for flat in segmentation:
        if not isinstance(flat, list) or len(flat) % 2:
            raise ValueError("a polygon must be a list of an even number of coordinates")
        points = as_points([flat[at : at + 2] for at in range(0, len(flat), 2)])
        paint_polygon(drawing.codes, points, drawing.code(name))


def _draw_labelme(
    path: Path, raw: RawSample, content: dict[str, Any], coding: Coding, size: tuple[int, int]
) -> Drawing:
    stated = (content.get("imageWidth"), content.get("imageHeight"))
    if stated != (None, None):  # labelme may leave it open
        _check_size(str(path), raw, stated, size)
    drawing = _blank(size)
    for number, shape in enumerate(_objects(path, content, "shapes")):
        with _named(f"{path}: shape {number}"):
            name = _name(shape)
            if name in coding.skip:
                continue
            kind, points = shape.get("shape_type", "polygon"), shape.get("points")
            if kind == "polygon":
                paint_polygon(drawing.codes, as_points(points), drawing.code(name))
            elif kind == "rectangle":
                (left, top), (right, bottom) = _two(points)
                corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
                paint_polygon(drawing.codes, corners, drawing.code(name))
            elif kind == "circle":
                center, rim = _two(points)
                paint_circle(drawing.codes, center, float(np.hypot(*(rim - center))), drawing.code(name))
            else:
                raise ValueError(f"shape_type {kind!r:.40} is no polygon, rectangle or circle")
    return drawing


def _draw_cityscapes(
    path: Path, raw: RawSample, content: dict[str, Any], coding: Coding, size: tuple[int, int]
) -> Drawing:
    _check_size(str(path), raw, (content.get("imgWidth"), content.get("imgHeight")), size)
    drawing = _blank(size)
    canvas = Image.new("I", size)
    pen = ImageDraw.Draw(canvas)
    for number, shape in enumerate(_objects(path, content, "objects")):
        with _named(f"{path}: object {number}"):
            name = _name(shape)
            # Files of IDD hold objects without vertices, which have no pixel.
            if not shape.get("deleted") and name not in coding.skip and shape.get("polygon") != []:
                points = as_points(shape.get("polygon"))
                pen.polygon([tuple(point) for point in points.tolist()], fill=drawing.code(name))
    return replace(drawing, codes=np.array(canvas))


def _blank(size: tuple[int, int]) -> Drawing:
    return Drawing(np.zeros(size[::-1], np.int32))


def _objects(path: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(shape, dict) for shape in found):
        raise UserError(f"{path}: has no list of objects in `{key}`; {_REMEDY}")
    return found


def _name(shape: dict[str, Any]) -> str:
    name = shape.get("label")
    if not isinstance(name, str) or not name:
        raise ValueError("has no label")
    return name


def _two(points: Any) -> Points:
    found = as_points(points, fewest=2)
    if len(found) != 2:
        raise ValueError(f"a rectangle or circle of {len(found)} points, not 2")
    return found


def _check_size(where: str, raw: RawSample, stated: tuple[Any, Any], size: tuple[int, int]) -> None:
    if stated != size:
        turned = ", which labels keep to" if stated == size[::-1] else ""
        shown = " x ".join(f"{edge!r:.20}" for edge in stated)
        raise UserError(
            f"{where}: {shown} pixels where the upright image {raw.image} has {size[0]} x {size[1]}{turned}; give "
            "labels of the image's size or leave both out with --exclude"
        )


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {error}; {_REMEDY}") from None
