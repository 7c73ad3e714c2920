"""Labels in one JSON file of COCO's kind: which entry is an image's, what is drawn, and files that are damaged."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_pca.shards.build import build_shards
from dist_pca.shards.plan import make_plan
from tests.shards.drawn_builds import Edit, built, edited, first, refusal
from tests.support.drawn_data import (
    HEIGHT,
    WIDTH,
    coco,
    drawn_recipe,
    make_drawn,
    shapes,
    train_ids,
    write_json,
)
from tests.support.raw_data import random_image, save


def test_a_coco_file_is_parsed_once_in_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_drawn(tmp_path / "raw", "coco")
    path = tmp_path / "raw/labels.json"
    edited(path, lambda content: content["info"].update(description="x" * 200_000))
    whole: list[Path] = []
    parts: list[int] = []
    read, decode = Path.read_bytes, json.loads

    def counted_read(file: Path) -> bytes:
        whole.append(file)
        return read(file)

    def counted_decode(text: bytes) -> Any:
        parts.append(len(text))
        return decode(text)

    monkeypatch.setattr(Path, "read_bytes", counted_read)
    monkeypatch.setattr(json, "loads", counted_decode)
    build_shards(drawn_recipe("coco"), tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=1)
    assert whole.count(path) == 1
    assert max(parts) < 10_000


def test_a_coco_file_counts_in_shards_by_the_part_that_is_about_an_image(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "coco")
    edited(tmp_path / "raw/labels.json", lambda content: content["info"].update(description="x" * 200_000))
    plan = make_plan(drawn_recipe("coco"), tmp_path / "raw", shard_size=20_000)
    assert len(plan.shards) == 1


def test_an_edited_annotation_or_category_changes_the_shards_that_it_is_in(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "coco")
    path, recipe = tmp_path / "raw/labels.json", drawn_recipe("coco")

    def digests() -> list[str]:
        return make_plan(recipe, tmp_path / "raw", samples_per_shard=1).shard_digests

    before = digests()
    edited(path, lambda content: content["annotations"][3].update(category_id=3))
    assert [old == new for old, new in zip(before, digests(), strict=True)] == [True, False, True, True, True]
    edited(path, lambda content: content["categories"][0].update(name="lea"))
    assert not set(before) & set(digests())


def test_run_lengths_have_holes_and_polygons_of_one_annotation_are_joined(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "coco", samples=1)
    ring = np.zeros((HEIGHT, WIDTH), np.uint8)
    ring[2:10, 2:10], ring[4:8, 4:8] = 1, 0
    flat = ring.T.ravel()
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]).tolist()
    inner = [[2, 2, 10, 2, 10, 10, 2, 10], [4, 4, 8, 4, 8, 8, 4, 8]]
    for segmentation, hole in (({"size": [HEIGHT, WIDTH], "counts": counts}, 0), (inner, 2)):
        one = {"id": 1, "image_id": 100, "category_id": 3, "segmentation": segmentation}
        write_json(tmp_path / "raw/labels.json", coco([("000.png", [])]) | {"annotations": [one]})
        (label,) = built(drawn_recipe("coco"), tmp_path / "raw")
        np.testing.assert_array_equal(label == 2, ring.astype(bool) if hole == 0 else (ring == 1) | (label == hole))
        assert np.unique(label[4:8, 4:8]).tolist() == [hole]


def test_crowds_are_ignored_unless_asked_for(tmp_path: Path) -> None:
    make_drawn(tmp_path / "raw", "coco", samples=1)
    edited(tmp_path / "raw/labels.json", lambda content: content["annotations"][1].update(iscrowd=1))
    (ignored,), (drawn,) = (built(drawn_recipe("coco", crowd=crowd), tmp_path / "raw") for crowd in ("ignore", "class"))
    np.testing.assert_array_equal(drawn, train_ids(0))
    np.testing.assert_array_equal(ignored, np.where(drawn == 2, 255, drawn))


def test_an_images_entry_is_the_one_whose_name_ends_its_path(tmp_path: Path) -> None:
    raw, recipe = tmp_path / "raw", drawn_recipe("coco")
    for index, name in enumerate(("a/1", "b/1", "ä")):
        save(random_image(index, HEIGHT, WIDTH), raw / f"images/{name}.png")
    named = [("b/1.png", shapes(2)), ("images/a/1.png", shapes(1)), ("./ä.png", shapes(3)), ("other.png", shapes(0))]
    write_json(raw / "labels.json", coco(named))
    for index, label in enumerate(built(recipe, raw), start=1):
        np.testing.assert_array_equal(label, train_ids(index))
    write_json(raw / "labels.json", coco([("1.png", shapes(0)), ("ä.png", shapes(0))]))
    assert "image 100: its name '1.png' is the end of both images/a/1.png and images/b/1.png" in refusal(recipe, raw)
    write_json(raw / "labels.json", coco(named[1:]))
    assert "1 of 3 images have no entry, the first is images/b/1.png" in refusal(recipe, raw)
    assert len(built(recipe, raw, on_error="skip")) == 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (first("images", file_name="/images/000.png"), "image 100: file_name '/images/000.png' is absolute"),
        (first("images", file_name="C:\\000.png"), "image 100: file_name .* is absolute"),
        (first("images", file_name="../000.png"), "image 100: file_name '../000.png' is absolute or outside"),
        (first("images", file_name="a\\..\\..\\0.png"), "image 100: file_name .* is absolute or outside"),
        (first("images", file_name="001.png"), "image 101: its id or its name '001.png' is listed twice"),
        (first("images", id=101), "image 101: its id or its name '001.png' is listed twice"),
        (first("images", id=99), "image 100: has annotations but is not in `images`"),
        (first("images", id="a\nb"), "no id, a number or a short text, in the object at byte"),
        (first("images", width=2.5), "image 100: its width and height are no whole numbers"),
        (first("images", width=10**9), "image 100: 1000000000 x 12 pixels where the upright image"),
        (first("categories", id=3), "category 3: listed twice"),
        (first("annotations", category_id=8), "image 100: annotation 1: category_id 8 is not in `categories`"),
        (first("annotations", image_id=[1]), "no image_id, a number or a short text"),
        (first("annotations", segmentation=[[0, 0, 1, 1]]), "image 100: annotation 1: a shape of 2 points"),
        (first("annotations", segmentation=[[0, 0, 1, 1, 2]]), "annotation 1: a polygon must be a list of an even"),
        (first("annotations", segmentation=[[0, 0, 1, 1, 2, float("nan")]]), "annotation 1: coordinate nan"),
        (first("annotations", segmentation=[[0, 0, 1, 1, 2, 1e308]]), r"annotation 1: coordinate 1e\+308"),
        (first("annotations", segmentation=[]), "annotation 1: segmentation holds neither"),
        (
            first("annotations", segmentation={"size": [12, 20], "counts": [1, 2]}),
            "annotation 1: run lengths that add",
        ),
        (
            first("annotations", segmentation={"size": [20, 12], "counts": [240]}),
            r"of size \[20, 12\], not \[12, 20\]",
        ),
        (lambda content: content.update(images={}), "'\\[' expected at byte"),
        (lambda content: content["images"].append(4), "images has an element that is no object"),
    ],
)
def test_a_damaged_coco_file_is_refused_in_one_line_that_names_the_image(
    tmp_path: Path, edit: Edit, words: str
) -> None:
    make_drawn(tmp_path / "raw", "coco", samples=2)
    edited(tmp_path / "raw/labels.json", edit)
    message = refusal(drawn_recipe("coco"), tmp_path / "raw")
    assert message.startswith(f"{tmp_path / 'raw/labels.json'}: ")
    assert re.search(words, message)
