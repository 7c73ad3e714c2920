from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.check import Check, check_raw
from dist_pca.shards.recipe import Recipe, load_recipe
from tests.support.raw_data import blocks, make_folder, png16, random_image, save, with_orientation


def two_splits() -> Recipe:
    recipe = load_recipe("folder").model_dump()
    label = {"match": r"(\w+)/images/(.+)\.[^./]+", "replace": r"\1/labels/\2.*"}
    splits = {name: {"images": [f"{name}/images/**/*"], "label": label} for name in ("train", "val")}
    return Recipe.model_validate(recipe | {"splits": splits})


def warnings(found: Check, words: str) -> list[str]:
    return [line for line in found.warnings if words in line]


def test_a_sound_folder_is_described_and_nothing_is_written(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=5)
    before = sorted(path for path in tmp_path.rglob("*"))
    found = check_raw("folder", tmp_path / "raw", workers=1)
    assert (found.problems, found.warnings) == ([], [])
    (split,) = found.splits
    assert (split.images, split.formats, split.sizes, split.smallest) == (5, {"PNG RGB": 5}, 1, (20, 12))
    assert {(entry.value, entry.meaning, entry.images) for entry in split.label_values} == {
        ("0", "class 0", 5),
        ("1", "class 1", 5),
        ("2", "class 2", 5),
        ("255", "ignore", 5),
    }
    assert [entry.share for entry in split.label_values] == [0.25] * 4
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_every_file_that_a_build_refuses_is_listed_with_the_builds_reason(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    make_folder(raw, samples=7)
    (raw / "images/000.png").write_bytes(b"nonsense")
    (raw / "labels/001.png").unlink()
    save(Image.new("L", (20, 12), 77), raw / "labels/002.png")
    save(Image.new("L", (20, 11)), raw / "labels/003.png")
    Image.new("L", (20, 12)).save(raw / "labels/004.png", "JPEG")
    (raw / "images/005.png").write_bytes(png16(np.full((12, 20, 1), 99)))
    found = check_raw("folder", raw, workers=1)
    assert [problem.file for problem in found.problems] == [f"images/{number:03d}.png" for number in range(6)]
    words = ["unreadable image", "no such file", "77, 240 pixels", "20 x 11 pixels", "in JPEG", "16-bit values 99"]
    for number, (problem, word) in enumerate(zip(found.problems, words, strict=True)):
        assert word in problem.problem
        assert str(tmp_path) not in problem.problem
        only = [f"images/{number:03d}.png"]
        with pytest.raises(UserError, match=word.replace("no such file", "have no label")):
            build_shards("folder", raw, tmp_path / "out", include=only, workers=1)


def test_what_may_be_meant_and_may_be_a_mistake_is_a_warning(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    make_folder(raw, samples=2, classes=2)
    for number in range(2):
        save(Image.fromarray(np.array([[0, 255]] * 2, np.uint8)), raw / f"labels/{number:03d}.png")
        save(Image.new("RGB", (2, 2), (9, 9, 9)), raw / f"images/{number:03d}.png")
    with_orientation(Image.new("RGB", (2, 2)), 3, raw / "images/000.png")
    (raw / "images/x.heic").touch()
    found = check_raw("folder", raw, workers=1)
    assert found.problems == []
    assert warnings(found, "passed over 1 .heic file (images/x.heic)")
    assert warnings(found, "no label has a pixel of class 1")
    assert warnings(found, "0 and 255 alone; if 255 is a class, name it in `coding.ids`")
    assert warnings(found, "1 images are turned upright")
    assert warnings(found, "no image is brighter than 9 of 255")
    assert found.splits[0].orientations == {3: 1}


def test_labels_of_nothing_are_a_problem_of_the_split(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=1)
    save(Image.new("L", (20, 12), 255), tmp_path / "labels/000.png")
    (problem,) = check_raw("folder", tmp_path, workers=1).problems
    assert (problem.file, problem.problem) == ("", "no label has a pixel of any class")


def test_images_of_one_split_that_look_like_one_of_another_are_counted(tmp_path: Path) -> None:
    for name in ("train", "val"):
        make_folder(tmp_path / name, samples=3)
    (tmp_path / "train/classes.yaml").rename(tmp_path / "classes.yaml")
    for name in ("train", "val"):
        for number in range(3):
            seed = number if name == "train" else 10 + number
            save(
                random_image(seed, 12, 16).resize((64, 48), Image.Resampling.BILINEAR),
                tmp_path / f"{name}/images/{number:03d}.png",
            )
            save(Image.new("L", (64, 48)), tmp_path / f"{name}/labels/{number:03d}.png")
    assert not warnings(check_raw(two_splits(), tmp_path, workers=1), "look like")
    copy = random_image(1, 12, 16).resize((96, 72), Image.Resampling.BILINEAR)
    save(copy, tmp_path / "val/images/002.jpg")
    (tmp_path / "val/images/002.png").unlink()
    save(Image.new("L", (96, 72)), tmp_path / "val/labels/002.png")
    (line,) = warnings(check_raw(two_splits(), tmp_path, workers=1), "look like")
    assert line == (
        "splits train and val: 1 images of val look like one of train, such as val/images/002.jpg and "
        "train/images/001.png"
    )


def test_flat_images_are_not_called_alike(tmp_path: Path) -> None:
    for name in ("train", "val"):
        make_folder(tmp_path / name, samples=1)
        save(Image.new("RGB", (64, 48), (7, 7, 7)), tmp_path / f"{name}/images/000.png")
        save(Image.new("L", (64, 48)), tmp_path / f"{name}/labels/000.png")
    (tmp_path / "train/classes.yaml").rename(tmp_path / "classes.yaml")
    assert not warnings(check_raw(two_splits(), tmp_path, workers=1), "look like")


def test_a_split_that_is_not_there_is_a_warning_where_others_are_and_an_error_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", samples=1)
    (tmp_path / "train/classes.yaml").rename(tmp_path / "classes.yaml")
    assert warnings(check_raw(two_splits(), tmp_path, workers=1), "no image matches val/images")
    with pytest.raises(UserError, match="no image matches val/images"):
        check_raw(two_splits(), tmp_path, split="val", workers=1)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=20)
    save(blocks(), tmp_path / "images/003.png")
    told: list[tuple[int, int, int]] = []
    alone = check_raw("folder", tmp_path, workers=1, progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (20, 20, 0)
    assert len(alone.problems) == 1
    assert check_raw("folder", tmp_path, workers=2) == alone


def colors_of_lossy_labels(tolerance: int) -> Recipe:
    recipe = load_recipe("folder").model_dump()
    names = [f"class {index}" for index in range(3)]
    colors = [{"name": name, "color": color} for name, color in zip(names, COLORS, strict=True)]
    coding = {"kind": "color", "colors": colors, "tolerance": tolerance, "other": "ignore"}
    return Recipe.model_validate(recipe | {"coding": coding})


COLORS = [[0, 0, 0], [200, 30, 30], [20, 220, 20]]


def test_colours_within_the_tolerance_count_as_the_class_that_a_build_makes_of_them(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=1)
    label = np.kron(np.array(COLORS, np.uint8), np.ones((1, 32, 1), np.uint8)).reshape(1, 96, 3).repeat(64, axis=0)
    save(blocks(), tmp_path / "images/000.png")
    Image.fromarray(label).save(tmp_path / "labels/000.jpg", quality=90)
    (tmp_path / "labels/000.png").unlink()
    recipe = colors_of_lossy_labels(60)
    (split,) = check_raw(recipe, tmp_path, workers=1).splits
    assert {(entry.value, entry.meaning) for entry in split.label_values} == {
        ("#000000", "class 0"),
        ("#c81e1e", "class 1"),
        ("#14dc14", "class 2"),
    }
    built = build_shards(recipe, tmp_path, tmp_path / "out", workers=1).pixel_counts
    shares = {entry.meaning: entry.share for entry in split.label_values}
    assert [shares[f"class {index}"] * 64 * 96 for index in range(3)] == pytest.approx(built)


def test_of_labels_that_are_photographs_a_few_values_are_kept_and_all_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=1)
    photograph = random_image(5)
    photograph.putpixel((3, 3), (200, 30, 30))
    save(photograph, tmp_path / "labels/000.png")
    recipe = colors_of_lossy_labels(0)
    (split,) = check_raw(recipe, tmp_path, workers=1).splits
    assert ("#c81e1e", "class 1", 1 / 240) in {
        (entry.value, entry.meaning, entry.share) for entry in split.label_values
    }
    assert len(split.label_values) < 100
    assert split.empty_classes == ["class 0", "class 2"]


def test_the_bound_on_pixels_is_an_option(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=1)
    (problem,) = check_raw("folder", tmp_path, workers=1, max_pixels=239).problems
    assert problem.problem.startswith("images/000.png: more than 239 pixels; raise the bound with --max-pixels")
    assert not check_raw("folder", tmp_path, workers=1, max_pixels=240).problems
