from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.recipe import Recipe, load_recipe
from dist_pca.shards.scan import RawSample, scan, unique_keys
from tests.support.raw_data import make_camvid, make_cityscapes, make_folder, random_image, save

LABEL = np.zeros((4, 6), np.uint8)


def _with_list(recipe: Recipe, list_file: str) -> Recipe:
    split = recipe.splits["all"].model_copy(update={"list_file": list_file})
    return recipe.model_copy(update={"splits": {"all": split}})


def test_images_are_paired_with_labels_in_the_order_of_their_paths(tmp_path: Path) -> None:
    make_cityscapes(tmp_path, "val", "munster", [LABEL])
    make_cityscapes(tmp_path, "val", "lindau", [LABEL])
    make_cityscapes(tmp_path, "train", "aachen", [LABEL])
    assert [sample.label for sample in scan(load_recipe("cityscapes"), tmp_path, "val").samples] == [
        "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png",
        "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png",
    ]


def test_camvid_takes_one_sequence_or_a_folder_of_several(tmp_path: Path) -> None:
    make_camvid(tmp_path / "day", [LABEL])
    make_camvid(tmp_path / "dusk", [LABEL])
    recipe = load_recipe("camvid")
    assert [sample.image for sample in scan(recipe, tmp_path, "all").samples] == [
        "day/images/day_f00000.png",
        "dusk/images/dusk_f00000.png",
    ]
    assert [*scan(recipe, tmp_path / "day", "all").samples] == [
        RawSample("images_day_f00000", "images/day_f00000.png", "labels/day_f00000.png")
    ]


def test_selection_by_glob_splits_a_sequence_in_two(tmp_path: Path) -> None:
    make_camvid(tmp_path / "day", [LABEL] * 12)
    recipe = load_recipe("camvid")
    late = scan(recipe, tmp_path, "all", include=["*_f0001[01].png"]).samples
    early = scan(recipe, tmp_path, "all", exclude=["*_f0001[01].png"]).samples
    assert (len(early), len(late)) == (10, 2)
    assert not {sample.image for sample in early} & {sample.image for sample in late}


def test_what_the_recipe_excludes_is_left_out_and_counted(tmp_path: Path) -> None:
    make_camvid(tmp_path / "day", [LABEL] * 12)
    recipe = load_recipe("camvid")
    split = recipe.splits["all"].model_copy(update={"exclude": ("*_f0001[01].png", "absent/*")})
    found = scan(recipe.model_copy(update={"splits": {"all": split}}), tmp_path, "all")
    assert len(found.samples) == 10
    assert found.passed_over == "2 images that the recipe excludes"


def test_a_recipe_that_excludes_every_image_is_refused(tmp_path: Path) -> None:
    make_camvid(tmp_path / "day", [LABEL])
    recipe = load_recipe("camvid")
    split = recipe.splits["all"].model_copy(update={"exclude": ("*",)})
    with pytest.raises(UserError, match=r"recipe camvid: splits\.all\.exclude leaves none of 1 images"):
        scan(recipe.model_copy(update={"splits": {"all": split}}), tmp_path, "all")


def test_a_glob_that_matches_nothing_is_refused_with_an_example(tmp_path: Path) -> None:
    make_camvid(tmp_path / "day", [LABEL])
    with pytest.raises(
        UserError, match=r"--include 'night/\*': matches none of 1 images, such as day/images/day_f00000"
    ):
        scan(load_recipe("camvid"), tmp_path, "all", include=["night/*"])


def test_a_selection_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    make_camvid(tmp_path / "day", [LABEL])
    with pytest.raises(UserError, match="leave none of 1 images"):
        scan(load_recipe("camvid"), tmp_path, "all", exclude=["day/*"])


@pytest.mark.parametrize("line", ["images/001.png", "images/001", "001.png", "001"])
def test_a_split_list_names_images_by_path_or_its_end(tmp_path: Path, line: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "train.txt").write_text(f"# chosen\n\n{line}\n")
    samples = scan(_with_list(load_recipe("folder"), "train.txt"), tmp_path, "all").samples
    assert [sample.image for sample in samples] == ["images/001.png"]


def test_a_split_list_may_be_written_by_an_editor_of_windows(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfimages/001.png\r\n002\r\n")
    samples = scan(_with_list(load_recipe("folder"), "train.txt"), tmp_path, "all").samples
    assert [sample.image for sample in samples] == ["images/001.png", "images/002.png"]


@pytest.mark.parametrize("content", [b"caf\xe9.png\n", "001\n".encode("utf-16")])
def test_a_split_list_that_is_not_utf_8_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    make_folder(tmp_path)
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"\A[^\n]*train\.txt: not readable as UTF-8 text [^\n]*\Z"):
        scan(_with_list(load_recipe("folder"), "train.txt"), tmp_path, "all")


@pytest.mark.parametrize(
    ("text", "message"), [("001\n777\n", "1 of 2 lines match no image, the first is '777'"), ("\n", "lists no image")]
)
def test_a_split_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        scan(_with_list(load_recipe("folder"), "train.txt"), tmp_path, "all")


def test_a_missing_split_list_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(UserError, match=r"train\.txt: no such file"):
        scan(_with_list(load_recipe("folder"), "train.txt"), tmp_path, "all")


def test_any_image_extension_at_any_depth_is_found_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.JPG", "b/c.webp", "b/d/e.bmp"):
        save(random_image(0), tmp_path / "images" / name)
        save(Image.fromarray(LABEL), tmp_path / "labels" / Path(name).with_suffix(".png"))
    (tmp_path / "images/Thumbs.db").touch()
    labels = [sample.label for sample in scan(load_recipe("folder"), tmp_path, "all").samples]
    assert labels == ["labels/a.png", "labels/b/c.png", "labels/b/d/e.png"]


def test_images_without_a_label_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=4)
    (tmp_path / "labels/001.png").unlink()
    (tmp_path / "labels/003.png").unlink()
    with pytest.raises(UserError, match=r"2 of 4 images have no label, the first is images/001\.png"):
        scan(load_recipe("folder"), tmp_path, "all")
    assert len(scan(load_recipe("folder"), tmp_path, "all", unlabelled=True).samples) == 4


def test_a_missing_root_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        scan(load_recipe("gta5"), tmp_path / "nowhere", "all")
    with pytest.raises(UserError, match=r"no image matches images/\*\.png"):
        scan(load_recipe("gta5"), tmp_path, "all")


PATHS = st.lists(st.text(st.sampled_from("ab._-/é"), min_size=1, max_size=120), unique=True, max_size=20)


@given(PATHS)
def test_keys_are_unique_and_fit_a_tar_header_without_dots(paths: list[str]) -> None:
    images = [f"{path}.{extension}" for path in paths for extension in ("png", "jpg")]
    keys = unique_keys(images)
    assert len(set(keys)) == len(images)
    assert all(len(f"{key}.label.png") <= 100 and "." not in key and "/" not in key for key in keys)
    assert all(key.isascii() for key in keys)


def test_labels_have_the_extension_that_is_found(tmp_path: Path) -> None:
    for number, extension in enumerate(("png", "gif", "TIF", "bmp")):
        save(random_image(0), tmp_path / f"images/a/{number}.jpg")
        save(Image.fromarray(LABEL), tmp_path / f"labels/a/{number}.{extension}")
    (tmp_path / "labels/a/0.txt").touch()
    (tmp_path / "labels/a/._0.png").touch()
    labels = [sample.label for sample in scan(load_recipe("folder"), tmp_path, "all").samples]
    assert labels == ["labels/a/0.png", "labels/a/1.gif", "labels/a/2.TIF", "labels/a/3.bmp"]
    (tmp_path / "labels/a/1.png").touch()
    with pytest.raises(UserError, match=r"labels 1\.gif and 1\.png in labels/a are of the same image"):
        scan(load_recipe("folder"), tmp_path, "all")


def test_a_folder_of_unreadable_formats_says_so(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"images/{number}.heic").parent.mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.heic").touch()
    with pytest.raises(UserError, match=r"no image matches images/\*\*/\*.* 6 \.heic file .*format that can be read"):
        scan(load_recipe("folder"), tmp_path, "all")


@pytest.mark.parametrize("replace", ["/etc/passwd", r"../../\1.png", r"labels/../../\1.png"])
def test_a_label_outside_the_root_is_refused(tmp_path: Path, replace: str) -> None:
    make_folder(tmp_path)
    recipe = load_recipe("folder")
    pairing = recipe.splits["all"].label.model_copy(update={"replace": replace})  # type: ignore[union-attr]
    split = recipe.splits["all"].model_copy(update={"label": pairing})
    with pytest.raises(UserError, match="outside the root"):
        scan(recipe.model_copy(update={"splits": {"all": split}}), tmp_path, "all")
