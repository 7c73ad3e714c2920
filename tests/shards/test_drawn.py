"""Labels that are drawn from JSON: their pixels, the builds of them, and files that are damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dist_pca.shards.build import build_part, build_shards, merge_parts
from dist_pca.shards.check import check_raw
from dist_pca.shards.recipe import load_recipe
from dist_pca.shards.verify import verify
from tests.shards.drawn_builds import built, edited, first, refusal
from tests.support.drawn_data import (
    HEIGHT,
    KINDS,
    WIDTH,
    coco,
    drawn_recipe,
    make_drawn,
    one_label,
    shapes,
    train_ids,
    write_classes,
    write_json,
)
from tests.support.raw_data import random_image, save, with_orientation


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_shapes_give_the_shards_of_masks_of_the_same_shapes(tmp_path: Path, kind: str) -> None:
    make_drawn(tmp_path / "drawn", kind)
    for index in range(5):
        image = f"images/{index:03d}.png"
        save(Image.open(tmp_path / "drawn" / image), tmp_path / "masks" / image)
        save(Image.fromarray(train_ids(index)), tmp_path / f"masks/labels/{index:03d}.png")
    write_classes(tmp_path / "masks/classes.yaml")
    build_shards("folder", tmp_path / "masks", tmp_path / "a", workers=1)
    build_shards(drawn_recipe(kind), tmp_path / "drawn", tmp_path / "b", workers=1)
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    for name, content in contents(tmp_path / "a").items():
        if name.endswith(".tar"):
            assert content == contents(tmp_path / "b")[name]
    assert verify(tmp_path / "b", deep=True, workers=1).problems == []


def test_cityscapes_polygons_are_drawn_as_by_the_data_sets_own_tool(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "cityscapes_polygons", samples=2)
    gone = {"label": "sea", "polygon": [[0, 0], [9, 0], [9, 9]], "deleted": 1}
    edited(tmp_path / "raw/labels/000.json", lambda content: content["objects"].append(gone))
    for index, label in enumerate(built(drawn_recipe("cityscapes_polygons"), tmp_path / "raw")):
        canvas = Image.new("L", (WIDTH, HEIGHT))
        for (_, points), train_id in zip(shapes(index), (1, 2, 255), strict=True):
            ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points], fill=train_id)
        np.testing.assert_array_equal(label, np.asarray(canvas))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_two_processes_and_parts_give_the_same_shards(tmp_path: Path, kind: str) -> None:
    raw, recipe = tmp_path / "raw", drawn_recipe(kind)
    make_drawn(raw, kind)
    build_shards(recipe, raw, tmp_path / "one", workers=1, samples_per_shard=2)
    build_shards(recipe, raw, tmp_path / "two", workers=2, samples_per_shard=2)
    for task in (1, 0):
        build_part(recipe, raw, tmp_path / "parts", task=task, tasks=2, workers=2, samples_per_shard=2)
    merge_parts(tmp_path / "parts")
    assert len(contents(tmp_path / "one")) > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "parts")


@pytest.mark.parametrize("kind", KINDS)
def test_check_shows_label_names_with_their_meaning_and_share(tmp_path: Path, kind: str) -> None:
    make_drawn(tmp_path / "raw", kind, samples=2)
    recipe = drawn_recipe(kind, names={"sea": "water", "boat": "boat"}, other="ignore")
    found = check_raw(recipe, tmp_path / "raw", workers=1)
    assert (found.problems, found.warnings) == ([], [])
    values = {entry.value: entry for entry in found.splits[0].label_values}
    assert {name: entry.meaning for name, entry in values.items()} == {
        "sea": "water",
        "boat": "boat",
        "box": "not in the coding",
        "(no object)": "quay",
    }
    assert sum(entry.share for entry in values.values()) == pytest.approx(1)
    if kind != "cityscapes_polygons":
        assert values["box"].share == pytest.approx(12 / (WIDTH * HEIGHT))


@pytest.mark.parametrize("kind", KINDS)
def test_names_outside_the_table_are_an_error_or_ignored(tmp_path: Path, kind: str) -> None:
    make_drawn(tmp_path / "raw", kind, samples=1)
    names = {"sea": "water", "boat": "boat"}
    assert "values outside the recipe's table: 'box', " in refusal(drawn_recipe(kind, names=names), tmp_path / "raw")
    (ignored,) = built(drawn_recipe(kind, names=names, other="ignore"), tmp_path / "raw")
    (mapped,) = built(drawn_recipe(kind), tmp_path / "raw")
    np.testing.assert_array_equal(ignored, mapped)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_objects_and_an_open_background_leave_what_is_there(tmp_path: Path, kind: str) -> None:
    make_drawn(tmp_path / "raw", kind, samples=1)
    (label,) = built(drawn_recipe(kind, skip=["box"], background=None), tmp_path / "raw")
    (whole,) = built(drawn_recipe(kind, names={"sea": "water", "boat": "boat", "box": "quay"}), tmp_path / "raw")
    assert label[2, 2] == 255
    assert whole[2, 2] == 0
    assert label[4, 2] == 1
    assert whole[4, 2] == 0


def test_names_may_be_those_of_the_classes(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "labelme", samples=1)
    objects = [("water", [[0, 0], [20, 0], [20, 6], [0, 6]])]
    write_json(tmp_path / "raw/labels/000.json", one_label("labelme", objects))
    (label,) = built(drawn_recipe("labelme", names={}, background=None), tmp_path / "raw")
    assert np.unique(label[:6]).tolist() == [1]
    assert np.unique(label[6:]).tolist() == [255]


def test_labelme_draws_rectangles_and_circles(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "labelme", samples=1)
    drawn = [
        {"label": "sea", "shape_type": "rectangle", "points": [[9, 8], [2.4, 1]]},
        {"label": "boat", "shape_type": "circle", "points": [[12, 6], [14.5, 6]]},
    ]
    content = one_label("labelme", []) | {"shapes": drawn, "imageWidth": None, "imageHeight": None}
    write_json(tmp_path / "raw/labels/000.json", content)
    (label,) = built(drawn_recipe("labelme"), tmp_path / "raw")
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[1:8, 2:9] = 1
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    expected[(rows - 6) ** 2 + (columns - 12) ** 2 <= 2.5**2] = 2
    np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_keep_to_the_upright_image(tmp_path: Path, kind: str) -> None:
    make_drawn(tmp_path / "raw", kind, samples=1)
    (label,) = built(drawn_recipe(kind), tmp_path / "raw")
    with_orientation(random_image(0, HEIGHT, WIDTH), 6, tmp_path / "raw/images/000.png")
    (upright,) = built(drawn_recipe(kind), tmp_path / "raw")
    np.testing.assert_array_equal(label, upright)
    save(random_image(0, WIDTH, HEIGHT), tmp_path / "raw/images/000.png")
    words = "20 x 12 pixels where the upright image images/000.png has 12 x 20, which labels keep to"
    name = "labels.json: image 100: " if kind == "coco" else "labels/000.json: "
    assert f"{name}{words}" in refusal(drawn_recipe(kind), tmp_path / "raw")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", '{"images": [', '{"images": []} {}', "\0", "\xff" * 9])
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_not_such_json_are_refused_in_one_line(tmp_path: Path, kind: str, text: str) -> None:
    make_drawn(tmp_path / "raw", kind, samples=1)
    path = tmp_path / "raw" / ("labels.json" if kind == "coco" else "labels/000.json")
    path.write_text(text, encoding="latin-1")
    assert refusal(drawn_recipe(kind), tmp_path / "raw").startswith(f"{path}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_json_that_is_nested_too_deep_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    make_drawn(tmp_path / "raw", kind, samples=1)
    path = tmp_path / "raw" / ("labels.json" if kind == "coco" else "labels/000.json")
    path.write_text('{"images": [' + '{"id":[' * 200_000)
    assert f"{path}: nested too deeply" in refusal(drawn_recipe(kind), tmp_path / "raw")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"points": [[0, 0], [1, 1]]}, "0: a shape of 2 points"),
        ({"points": [[0, 0], [1, 1], [float("inf"), 1]]}, "0: coordinate inf is not within"),
        ({"points": None}, "0: the points of a shape must be"),
        ({"label": None}, "0: has no label"),
        ({"label": ""}, "0: has no label"),
        ({"points": [[0, 0]] * 3, "shape_type": "circle"}, "0: a rectangle or circle of 3 points"),
        ({"points": [[0, 0]], "shape_type": "rectangle"}, "0: a shape of 1 points, and at least 2"),
        ({"shape_type": "line\n"}, "0: shape_type 'line\\n' is no polygon"),
        ({"shape_type": []}, "0: shape_type [] is no polygon"),
    ],
)
def test_a_damaged_shape_is_refused_in_one_line_that_names_it(
    tmp_path: Path, shape: dict[str, Any], words: str
) -> None:
    make_drawn(tmp_path / "raw", "labelme", samples=1)
    edited(tmp_path / "raw/labels/000.json", first("shapes", **shape))
    assert f"labels/000.json: shape {words}" in refusal(drawn_recipe("labelme"), tmp_path / "raw")


@pytest.mark.parametrize(
    "values", [{"polygon": [[0, 0], [1, 1]]}, {"polygon": [[0, 0], [1, 1], [1e308, 1]]}, {"label": 3}]
)
def test_a_damaged_polygon_of_cityscapes_is_refused_in_one_line_that_names_it(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    make_drawn(tmp_path / "raw", "cityscapes_polygons", samples=1)
    edited(tmp_path / "raw/labels/000.json", first("objects", **values))
    assert "labels/000.json: object 0: " in refusal(drawn_recipe("cityscapes_polygons"), tmp_path / "raw")


def test_keys_of_other_kinds_are_refused() -> None:
    for kind, key, value in (
        ("labelme", "ids", {1: "quay"}),
        ("coco", "tolerance", 3),
        ("index", "background", "quay"),
        ("labelme", "crowd", "class"),
        ("coco", "background", "sky"),
    ):
        coding: dict[str, Any] = {"names": {}, "background": None, key: value}
        with pytest.raises(ValueError, match=r"kind `|no class 'sky'"):
            drawn_recipe(kind, **coding)


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_recipes_of_shapes_read_their_layout(tmp_path: Path, kind: str) -> None:
    raw, recipe = tmp_path / "raw", load_recipe(kind)
    objects = [("car", [[0, 0], [20, 0], [20, 12], [0, 12]]), ("license plate", [[1, 1], [9, 1], [9, 9]])]
    for split, rules in recipe.splits.items():
        image, label = {
            "coco": (f"{split}2017/1.jpg", f"annotations/instances_{split}2017.json"),
            "labelme": ("day/1.jpg", "day/1.json"),
            "cityscapes_polygons": (
                f"leftImg8bit/{split}/ulm/ulm_0_0_leftImg8bit.png",
                f"gtFine/{split}/ulm/ulm_0_0_gtFine_polygons.json",
            ),
        }[kind]
        save(random_image(0, HEIGHT, WIDTH), raw / image)
        if rules.label is None:
            continue
        if kind == "coco":
            content = coco([("1.jpg", [("boat", objects[0][1])])])
        else:
            content = one_label(kind, objects if kind == "cityscapes_polygons" else [("boat", objects[0][1])])
        write_json(raw / label, content)
        write_classes(raw / "classes.yaml")
        (drawn,) = built(kind, raw, split=split)
        assert np.unique(drawn).tolist() == [13 if kind == "cityscapes_polygons" else 2]
