"""Shards of images of other than three bands, from raw files to the manifest and back."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.check import check_raw
from dist_pca.shards.index import index_shards
from dist_pca.shards.inspect import grid, summarise
from dist_pca.shards.manifest import Manifest, load_manifest, save_manifest
from dist_pca.shards.plan import make_plan
from dist_pca.shards.recipe import load_recipe
from dist_pca.shards.sample import read_sample
from dist_pca.shards.verify import verify
from tests.support.raw_data import make_band_folder, make_folder, random_image, tiff
from tests.support.shards import CLASSES

pytest.importorskip("tifffile", reason="tifffile is in the extra `bands`")


@pytest.fixture
def built(tmp_path: Path) -> Manifest:
    make_band_folder(tmp_path / "raw", 4)
    return build_shards(tmp_path / "raw/recipe.yaml", tmp_path / "raw", tmp_path / "out", workers=1)


def stored(manifest: Manifest, index: int) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = np.load(io.BytesIO(read_sample(manifest, manifest.shards[0], index)["npy"]))
    return array


@pytest.mark.parametrize(("bands", "dtype"), [(1, np.uint8), (4, np.uint8), (10, np.uint16)])
def test_bands_are_stored_without_loss_as_arrays_that_numpy_reads(tmp_path: Path, bands: int, dtype: type) -> None:
    values = make_band_folder(tmp_path / "raw", bands, dtype=dtype)
    manifest = build_shards(tmp_path / "raw/recipe.yaml", tmp_path / "raw", tmp_path / "out", workers=1)
    for index, array in enumerate(values):
        expected = array if dtype is np.uint8 else np.rint(array / 4095 * 255).astype(np.uint8)
        assert np.array_equal(stored(manifest, index), expected)
    assert manifest.bands == bands
    assert load_manifest(tmp_path / "out") == manifest
    assert verify(tmp_path / "out", deep=True, workers=1).problems == []
    assert summarise(manifest).bands == bands


def test_only_manifests_of_other_bands_have_the_new_version(tmp_path: Path, built: Manifest) -> None:
    make_folder(tmp_path / "rgb")
    build_shards("folder", tmp_path / "rgb", tmp_path / "plain", workers=1)
    plain, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "out"))
    assert (plain["version"], "bands" in plain, load_manifest(tmp_path / "plain").bands) == (1, False, 3)
    assert (other["version"], other["bands"]) == (2, 4)


def test_three_chosen_bands_are_stored_as_a_png(tmp_path: Path) -> None:
    values = make_band_folder(tmp_path / "raw", 5)
    recipe = load_recipe("folder").model_copy(update={"bands": (5, 1, 2)})
    manifest = build_shards(recipe, tmp_path / "raw", tmp_path / "out", workers=1)
    pixels = np.asarray(Image.open(io.BytesIO(read_sample(manifest, manifest.shards[0], 1)["png"])))
    assert np.array_equal(pixels, values[1][..., [4, 0, 1]])
    assert manifest.bands == 3


def test_what_differs_from_the_manifest_in_its_bands_is_found(built: Manifest) -> None:
    save_manifest(replace(built, bands=5))
    problems = [entry.problem for entry in verify(built.folder, deep=True, workers=1).problems]
    assert problems == ["npy: 4 bands where manifest.json lists 5"] * 4


@pytest.mark.parametrize("bands", [0, 1001])
def test_a_manifest_of_no_or_too_many_bands_is_refused(built: Manifest, bands: int) -> None:
    save_manifest(replace(built, bands=bands))
    with pytest.raises(UserError, match=r"manifest\.json: bands: not from 1 to 1000"):
        load_manifest(built.folder)


def test_the_same_shards_are_indexed_by_the_name_of_their_member(built: Manifest) -> None:
    classes = CLASSES
    with pytest.raises(UserError, match=r"no image .* among its members, which are .*npy; .*--image-member"):
        index_shards(built.folder, classes=classes, force=True, workers=1)
    indexed = index_shards(built.folder, classes=classes, image_member="npy", force=True, workers=1)
    assert (indexed.bands, indexed.image_member) == (4, "npy")
    assert indexed.shards == built.shards


def test_images_of_unlike_bands_are_not_indexed_together(tmp_path: Path, built: Manifest) -> None:
    make_band_folder(tmp_path / "two", 2)
    (tmp_path / "two/images").rename(tmp_path / "two/others")
    recipe = load_recipe(tmp_path / "two/recipe.yaml")
    others = recipe.splits["all"].model_copy(update={"images": ("others/*",), "label": None})
    recipe = recipe.model_copy(update={"splits": {"all": others}})
    other = build_shards(recipe, tmp_path / "two", tmp_path / "second", workers=1)
    (other.folder / other.shards[0].name).rename(built.folder / "shard-000009.tar")
    with pytest.raises(UserError, match=r"shard-000009\.tar: its images have 2 bands, those of .* have 4"):
        index_shards(built.folder, classes=CLASSES, image_member="npy", force=True, workers=1)


def test_tiles_and_smaller_images_have_all_bands(tmp_path: Path) -> None:
    values = make_band_folder(tmp_path / "raw", 4, samples=1)
    recipe = tmp_path / "raw/recipe.yaml"
    tiles = build_shards(recipe, tmp_path / "raw", tmp_path / "tiles", workers=1, tile=(12, 10))
    assert [stored(tiles, index).tolist() for index in range(2)] == [
        values[0][:, :10].tolist(),
        values[0][:, 10:].tolist(),
    ]
    small = build_shards(recipe, tmp_path / "raw", tmp_path / "small", workers=1, max_edge=10)
    assert stored(small, 0).shape == (6, 10, 4)
    with pytest.raises(UserError, match="--image-format jpg: images of 4 bands are stored as arrays"):
        make_plan(recipe, tmp_path / "raw", image_format="jpg")


def test_empty_tiles_of_several_bands_are_left_out(tmp_path: Path) -> None:
    make_band_folder(tmp_path / "raw", 4, samples=1)
    array = np.zeros((12, 20, 4), np.uint8)
    array[0, 15, 3] = 1
    (tmp_path / "raw/images/000.tif").write_bytes(tiff(array))
    options = {"tile": (12, 10), "unlabelled": True, "workers": 1}
    tiles = build_shards(tmp_path / "raw/recipe.yaml", tmp_path / "raw", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert tiles.shards[0].keys == ["images_000_1"]


def test_files_that_lack_a_band_are_found_by_check_and_can_be_skipped(tmp_path: Path) -> None:
    make_band_folder(tmp_path / "raw", 4)
    (tmp_path / "raw/images/001.tif").write_bytes(tiff(np.zeros((12, 20, 2), np.uint8)))
    recipe, raw = tmp_path / "raw/recipe.yaml", tmp_path / "raw"
    found = check_raw(recipe, raw, workers=1)
    assert [(entry.file, entry.problem.partition(";")[0]) for entry in found.problems] == [
        ("images/001.tif", "images/001.tif: has 2 bands, and `bands` of the recipe wants 4")
    ]
    assert found.splits[0].formats == {"TIFF 4 x uint8": 3}
    with pytest.raises(UserError, match=r"images/001\.tif: has 2 bands"):
        build_shards(recipe, raw, tmp_path / "out", workers=1)
    assert build_shards(recipe, raw, tmp_path / "out", workers=1, on_error="skip").samples == 3


def test_near_duplicates_of_several_bands_are_noticed(tmp_path: Path) -> None:
    values = make_band_folder(tmp_path / "raw", 4)
    (tmp_path / "raw/again").mkdir()
    (tmp_path / "raw/again/copy.tif").write_bytes(tiff(values[2]))
    recipe = load_recipe(tmp_path / "raw/recipe.yaml")
    again = recipe.splits["all"].model_copy(update={"images": ("again/*",), "label": None})
    found = check_raw(
        recipe.model_copy(update={"splits": {**recipe.splits, "again": again}}), tmp_path / "raw", workers=1
    )
    assert any("look like one of all, such as again/copy.tif and images/002.tif" in line for line in found.warnings)


def test_arrays_are_images_only_where_bands_are_named(tmp_path: Path) -> None:
    values = make_band_folder(tmp_path / "raw", 4, samples=1)
    np.save(tmp_path / "raw/images/000.npy", values[0])
    (tmp_path / "raw/images/000.tif").unlink()
    random_image(3).save(tmp_path / "raw/images/000.png")
    plain = make_plan("folder", tmp_path / "raw")
    assert [sample.image for sample in plain.samples] == ["images/000.png"]
    (tmp_path / "raw/images/000.png").unlink()
    manifest = build_shards(tmp_path / "raw/recipe.yaml", tmp_path / "raw", tmp_path / "out", workers=1)
    assert np.array_equal(stored(manifest, 0), values[0])


def test_recipes_without_bands_give_the_builds_of_before(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.tif").write_bytes(tiff(np.zeros((12, 20, 3), np.uint8)))
    plan = make_plan("folder", tmp_path, unlabelled=True)
    assert plan.fingerprint == "7591f077ecce272ff1c9d66c820d5d3a9e158989944541dae5b4504c5942bf32"


def test_the_picture_of_some_samples_shows_the_first_three_bands(tmp_path: Path) -> None:
    values = make_band_folder(tmp_path / "raw", 4, samples=1)
    raw, out = tmp_path / "raw", tmp_path / "out"
    picture = grid(build_shards(raw / "recipe.yaml", raw, out, workers=1, unlabelled=True))
    expected = Image.fromarray(values[0][..., :3]).resize((480, 288), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(picture)[8:296, 8:488], np.asarray(expected))
