"""Small raw data sets whose labels are shapes, in each of the forms that recipes read, and the labels' pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from dist_pca.shards.polygons import paint_polygon
from dist_pca.shards.recipe import Recipe
from tests.support.raw_data import random_image, save

WIDTH, HEIGHT = 20, 12
CLASSES = [{"name": name, "color": [90 * index, 0, 0]} for index, name in enumerate(("quay", "water", "boat"))]
KINDS = ("coco", "labelme", "cityscapes_polygons")
Shape = tuple[str, list[list[int]]]
"""Label name and vertices."""


def shapes(index: int) -> list[Shape]:
    """Objects of the image with this index: a boat on water, and a box that is nothing of interest."""
    return [
        ("sea", [[0, 4], [20, 3 + index], [20, 12], [0, 12]]),
        ("boat", [[4 + index, 5], [12, 6], [9, 10]]),
        ("box", [[1, 1], [4, 1], [4, 5], [1, 5]]),
    ]


def train_ids(index: int) -> npt.NDArray[np.uint8]:
    """Label of that image by the rule for pixel centres: quay where no object is, the box ignored."""
    codes = np.zeros((HEIGHT, WIDTH), np.uint8)
    for (_, points), train_id in zip(shapes(index), (1, 2, 255), strict=True):
        paint_polygon(codes, np.array(points, np.float64), train_id)
    return codes


def drawn_recipe(kind: str, **coding: Any) -> Recipe:
    """Recipe of a data set that `make_drawn` makes."""
    label = {"match": r"images/(.+)\.png", "replace": "labels.json" if kind == "coco" else r"labels/\1.json"}
    return Recipe.model_validate(
        {
            "name": "harbour",
            "version": 1,
            "classes": CLASSES,
            "coding": {
                "kind": kind,
                "names": {"sea": "water", "boat": "boat", "box": "ignore"},
                "background": "quay",
            }
            | coding,
            "splits": {"all": {"images": ["images/**/*"], "label": label}},
        }
    )


def make_drawn(root: Path, kind: str, samples: int = 5) -> None:
    """Write images and their labels as JSON of a kind."""
    names = [f"{index:03d}" for index in range(samples)]
    for index, name in enumerate(names):
        save(random_image(index, HEIGHT, WIDTH), root / f"images/{name}.png")
        if kind != "coco":
            write_json(root / f"labels/{name}.json", one_label(kind, shapes(index)))
    if kind == "coco":
        write_json(root / "labels.json", coco([(f"{name}.png", shapes(index)) for index, name in enumerate(names)]))


def one_label(kind: str, objects: list[Shape]) -> dict[str, Any]:
    """Label of one image as labelme or Cityscapes writes it."""
    if kind == "labelme":
        drawn = [{"label": name, "points": points, "shape_type": "polygon"} for name, points in objects]
        return {"version": "5.5.0", "shapes": drawn, "imageWidth": WIDTH, "imageHeight": HEIGHT, "imageData": None}
    return {
        "imgHeight": HEIGHT,
        "imgWidth": WIDTH,
        "objects": [{"label": name, "polygon": points} for name, points in objects],
    }


def coco(images: list[tuple[str, list[Shape]]]) -> dict[str, Any]:
    """Labels of images as COCO writes them, from file names and objects."""
    categories = {"sea": 7, "boat": 3, "box": 90}
    entries = [
        {"id": 100 + index, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for index, (name, _) in enumerate(images)
    ]
    annotations = [
        {"image_id": 100 + index, "category_id": categories[name], "segmentation": [np.ravel(points).tolist()]}
        for index, (_, objects) in enumerate(images)
        for name, points in objects
    ]
    return {
        "info": {"description": "piers [1, 2] {é}", "year": 2024},
        "images": entries,
        "annotations": [annotation | {"id": 1 + index} for index, annotation in enumerate(annotations)],
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def write_classes(path: Path) -> None:
    path.write_text(yaml.safe_dump(CLASSES))
