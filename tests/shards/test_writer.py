"""What shards hold: images and labels as they are stored, upright, shrunk or in tiles."""

import io
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dist_pca.data.decode import decode_sample
from dist_pca.data.read import ShardReader
from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.index import index_shards
from dist_pca.shards.recipe import load_recipe
from dist_pca.shards.staging import read_skipped
from dist_pca.shards.verify import verify
from tests.support.raw_data import blocks, make_folder, png16, png_header, random_image, save, with_orientation
from tests.support.shards import label_of, stored_samples


def test_images_are_stored_byte_for_byte_with_their_source_and_size(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", extension="jpg")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    for sample in stored_samples(manifest):
        description = json.loads(sample["json"])
        assert sample["jpg"] == (tmp_path / "raw" / description["source"]).read_bytes()
        assert (description["height"], description["width"]) == (12, 20)


def test_slices_of_samples_lie_end_to_end(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=7)
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=3)
    assert [len(shard.keys) for shard in manifest.shards] == [3, 3, 1]
    for shard in manifest.shards:
        ends = [offset + length for offset, length in zip(shard.offsets, shard.lengths, strict=True)]
        assert shard.offsets == [0, *ends[:-1]]
        assert ends[-1] <= shard.bytes
    assert len(list(stored_samples(manifest))) == 7


def test_webdataset_itself_reads_the_shards(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=5)
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=3)
    urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
    raw = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["png"] for sample in raw] == [
        (tmp_path / f"raw/images/{number:03d}.png").read_bytes() for number in range(5)
    ]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [key for shard in manifest.shards for key in shard.keys]
    for number, sample in enumerate(read):
        assert (np.asarray(sample["png"]) == np.asarray(random_image(number))).all()
        assert np.asarray(sample["label.png"]).shape[:2] == (12, 20)
        assert sample["json"]["source"] == f"images/{number:03d}.png"


def test_unlabelled_leaves_labels_out_and_needs_no_class_table(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    with_table = build_shards("folder", tmp_path / "raw", tmp_path / "a", workers=1, unlabelled=True)
    assert not with_table.labelled
    assert len(with_table.classes) == 3
    assert all(set(sample) == {"png", "json"} for sample in stored_samples(with_table))
    (tmp_path / "raw/classes.yaml").unlink()
    assert build_shards("folder", tmp_path / "raw", tmp_path / "b", workers=1, unlabelled=True).classes == ()


def test_shrinking_shrinks_labels_without_mixing_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=1)
    label = np.full((12, 20), 2, np.uint8)
    label[:, :10] = 0
    save(Image.fromarray(label), tmp_path / "raw/labels/000.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, max_edge=10)
    (sample,) = stored_samples(manifest)
    assert label_of(sample) == [[0] * 5 + [2] * 5] * 6
    assert Image.open(io.BytesIO(sample["png"])).size == (10, 6)
    assert (manifest.shards[0].heights, manifest.shards[0].widths) == ([6], [10])
    assert manifest.pixel_counts == [30, 0, 30]


@pytest.mark.parametrize("extension", ["jpg", "tif", "png"])
def test_images_that_the_camera_turned_fit_labels_of_the_upright_image(tmp_path: Path, extension: str) -> None:
    make_folder(tmp_path / "raw", samples=0)
    label = np.zeros((64, 96), np.uint8)
    label[:, 48:] = 1
    for tag in range(1, 9):
        with_orientation(blocks(), tag, tmp_path / f"raw/images/{tag}.{extension}")
        save(Image.fromarray(label), tmp_path / f"raw/labels/{tag}.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert {*manifest.shards[0].heights, *manifest.shards[0].widths} == {64, 96}
    with closing(ShardReader(manifest, keep_open=1)) as reader:
        for index in range(8):
            image, train_ids = decode_sample(reader.read(0, index), label_member="label.png")
            assert np.abs(np.asarray(image).astype(int) - np.asarray(blocks())).mean() < 8
            assert np.array_equal(np.asarray(train_ids), label)
            half, _ = decode_sample(reader.read(0, index), label_member=None, minimum_size=(32, 48))
            assert half.size in ((48, 32), (96, 64))
    assert verify(tmp_path / "out", deep=True, workers=1).problems == []
    indexed = index_shards(tmp_path / "out", classes=manifest.classes, force=True, workers=1)
    assert indexed.shards == manifest.shards


def test_a_label_of_the_turned_pixels_is_refused_with_the_orientation(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=0)
    with_orientation(blocks(), 6, tmp_path / "raw/images/1.jpg")
    save(Image.new("L", (64, 96)), tmp_path / "raw/labels/1.png")
    message = r"labels/1\.png: 64 x 96 .* has 96 x 64 once its EXIF orientation, 6, turns it upright, .* remove the"
    with pytest.raises(UserError, match=message) as refused:
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert "--exclude" not in str(refused.value)


def test_a_recipe_states_the_range_of_deep_images(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=1)
    ramp = np.arange(240, dtype=np.uint16).reshape(12, 20, 1) * 17
    (tmp_path / "raw/images/000.png").write_bytes(png16(ramp))
    with pytest.raises(UserError, match=r"images/000\.png: has 16-bit values 0 to 4063.*`range: \[low, high\]`"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    recipe = load_recipe("folder").model_copy(update={"range": ((0.0, 4080.0),)})
    (sample,) = stored_samples(build_shards(recipe, tmp_path / "raw", tmp_path / "out", workers=1))
    stored = np.asarray(Image.open(io.BytesIO(sample["png"])))
    assert stored.dtype == np.uint8
    assert np.array_equal(stored[..., 0], np.rint(ramp[..., 0] / 16))
    with pytest.raises(UserError, match="holds another build"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)


def test_tiles_cover_an_image_with_its_labels_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    make_folder(raw, samples=0)
    label = np.zeros((50, 70), np.uint8)
    label[:24, :24] = 255
    label[:, 40:] = 1
    with_orientation(random_image(4, 50, 70), 6, raw / "images/a.png")
    save(Image.fromarray(label), raw / "labels/a.png")
    manifest = build_shards("folder", raw, tmp_path / "out", workers=1, tile=(24, 24), overlap=4)
    seen = np.zeros((50, 70), bool)
    for sample in stored_samples(manifest):
        place = json.loads(sample["json"])
        top, left = place["top"], place["left"]
        window = (slice(top, top + 24), slice(left, left + 24))
        assert np.array_equal(label_of(sample), label[window])
        stored = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert np.array_equal(stored, np.asarray(random_image(4, 50, 70))[window])
        seen[window] = True
    assert manifest.shards[0].keys == [f"images_a_{number}" for number in range(1, 12)]
    assert (seen | (label == 255)).all()
    assert verify(tmp_path / "out", deep=True, workers=1).problems == []
    for options in ({"tile": (8, 8), "overlap": 8}, {"overlap": 2}, {"tile": (8, 8), "max_edge": 9}):
        with pytest.raises(UserError, match="--overlap"):
            build_shards("folder", raw, tmp_path / "no", workers=1, **options)


def test_unlabelled_tiles_of_one_colour_are_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=0)
    image = Image.new("RGB", (20, 10), (9, 9, 9))
    image.paste(random_image(0, 10, 10), (10, 0))
    save(image, tmp_path / "raw/images/a.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, tile=(10, 10), unlabelled=True)
    assert manifest.shards[0].keys == ["images_a_1"]


def test_the_bound_on_pixels_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "raw", samples=1)
    arguments = ("folder", tmp_path / "raw", tmp_path / "out")
    with pytest.raises(UserError, match=r"images/000\.png: more than 239 pixels; raise the bound with --max-pixels"):
        build_shards(*arguments, workers=1, max_pixels=239)
    assert build_shards(*arguments, workers=1, max_pixels=240).samples == 1
    (tmp_path / "raw/images/000.png").write_bytes(png_header(13_500, 13_500))
    with pytest.raises(UserError, match=r"000\.png: damaged image"):  # beyond Pillow's own bound, and not refused by it
        build_shards(*arguments, workers=1, max_pixels=200_000_000, force=True)
    monkeypatch.setattr("dist_pca.shards.writer.MAX_PIXELS", 100)
    save(random_image(0), tmp_path / "raw/images/000.png")
    with pytest.raises(UserError, match=r"000\.png: 240 pixels, and shards hold up to 100; cut images with --tile"):
        build_shards(*arguments, workers=1, max_pixels=200_000_000, force=True)
    assert build_shards(*arguments, workers=1, tile=(10, 10), force=True).samples == 4


def test_a_skipped_file_whose_name_is_not_utf_8_is_reported_with_its_bytes(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=3)
    (tmp_path / "raw/images/001.png").write_bytes(b"nonsense")
    for folder in ("images", "labels"):
        (tmp_path / f"raw/{folder}/001.png").rename(tmp_path / f"raw/{folder}/caf\udce9.png")
    build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, on_error="skip")
    (skipped,) = read_skipped(tmp_path / "out")
    assert skipped.image == "images/caf\\xe9.png"
