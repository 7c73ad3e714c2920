import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_pca.classes import LABEL_SETS
from dist_pca.data.decode import decode_sample
from dist_pca.data.read import ShardReader
from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.images import Encoding, tile_boxes
from dist_pca.shards.index import index_shards
from dist_pca.shards.manifest import Manifest, describe_empty_classes, load_manifest
from dist_pca.shards.recipe import load_recipe
from dist_pca.shards.verify import verify
from tests.support.raw_data import (
    blocks,
    make_camvid,
    make_cityscapes,
    make_folder,
    make_gta5,
    make_synthia,
    png16,
    png_header,
    random_image,
    save,
    with_orientation,
)

CITYSCAPES_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
CITYSCAPES_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA_NAMES = {1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole", 8: "car"}
SYNTHIA_NAMES |= {9: "traffic sign", 10: "person", 11: "bicycle", 12: "motorcycle", 15: "traffic light", 17: "rider"}
SYNTHIA_NAMES |= {19: "bus", 21: "wall"}


def _samples(manifest: Manifest) -> Iterator[dict[str, bytes]]:
    """Every sample, read by its place in the manifest alone."""
    for shard in manifest.shards:
        content = (manifest.folder / shard.name).read_bytes()
        for key, offset, length in zip(shard.keys, shard.offsets, shard.lengths, strict=True):
            with tarfile.open(fileobj=io.BytesIO(content[offset : offset + length] + bytes(1024))) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            assert all(name.startswith(f"{key}.") for name in members)
            yield {name.removeprefix(f"{key}."): content for name, content in members.items()}


def _label(sample: dict[str, bytes]) -> list[list[int]]:
    labels: list[list[int]] = np.asarray(Image.open(io.BytesIO(sample["label.png"]))).tolist()
    return labels


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_gta5_palette_indices_become_cityscapes_train_ids(tmp_path: Path) -> None:
    ids = np.arange(35).reshape(5, 7)
    make_gta5(tmp_path / "raw", [ids])
    manifest = build_shards("gta5", tmp_path / "raw", tmp_path / "out", workers=1)
    (sample,) = _samples(manifest)
    assert _label(sample) == [[CITYSCAPES_IDS.get(raw, 255) for raw in row] for row in ids.tolist()]
    assert manifest.pixel_counts == [1] * 19
    assert tuple(info.name for info in manifest.classes) == LABEL_SETS["cityscapes_19"]


def test_synthia_channel_0_of_16_bits_becomes_16_train_ids(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(4, 6)
    make_synthia(tmp_path / "raw", [ids])
    manifest = build_shards("synthia", tmp_path / "raw", tmp_path / "out", workers=1)
    (sample,) = _samples(manifest)
    order = LABEL_SETS["synthia_16"].index
    assert _label(sample) == [
        [order(SYNTHIA_NAMES[raw]) if raw in SYNTHIA_NAMES else 255 for raw in row] for row in ids.tolist()
    ]


def test_cityscapes_splits_are_apart_and_test_has_no_labels(tmp_path: Path) -> None:
    ids = np.arange(34).reshape(2, 17)
    for split, city in (("train", "aachen"), ("val", "lindau"), ("test", "berlin")):
        make_cityscapes(tmp_path / "raw", split, city, [ids])
    for split, city in (("train", "aachen"), ("val", "lindau")):
        manifest = build_shards("cityscapes", tmp_path / "raw", tmp_path / split, split=split, workers=1)
        (sample,) = _samples(manifest)
        assert json.loads(sample["json"])["source"].startswith(f"leftImg8bit/{split}/{city}/")
        assert _label(sample) == [[CITYSCAPES_IDS.get(raw, 255) for raw in row] for row in ids.tolist()]
    test = build_shards("cityscapes", tmp_path / "raw", tmp_path / "test", split="test", workers=1)
    assert not test.labelled


def test_camvid_indices_are_train_ids_and_11_is_ignore(tmp_path: Path) -> None:
    make_camvid(tmp_path / "raw" / "day", [np.arange(12).reshape(3, 4)])
    manifest = build_shards("camvid", tmp_path / "raw", tmp_path / "out", workers=1)
    (sample,) = _samples(manifest)
    assert _label(sample) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255]]
    assert manifest.classes[10].name == "Bicyclist"


def test_images_are_stored_byte_for_byte_with_their_source_and_size(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", extension="jpg")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    for sample in _samples(manifest):
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
    assert len(list(_samples(manifest))) == 7


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


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=8)
    told: list[tuple[int, int, int]] = []
    alone = build_shards("folder", tmp_path / "raw", tmp_path / "one", workers=1, samples_per_shard=2)
    together = build_shards(
        "folder",
        tmp_path / "raw",
        tmp_path / "three",
        workers=3,
        samples_per_shard=2,
        progress=lambda *numbers: told.append(numbers),
    )
    assert _bytes(alone.folder) == _bytes(together.folder)
    assert told[0] == (0, 8, 0)
    assert told[-1] == (8, 8, sum(sum(shard.lengths) for shard in together.shards))


def test_unlabelled_leaves_labels_out_and_needs_no_class_table(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    with_table = build_shards("folder", tmp_path / "raw", tmp_path / "a", workers=1, unlabelled=True)
    assert not with_table.labelled
    assert len(with_table.classes) == 3
    assert all(set(sample) == {"png", "json"} for sample in _samples(with_table))
    (tmp_path / "raw/classes.yaml").unlink()
    assert build_shards("folder", tmp_path / "raw", tmp_path / "b", workers=1, unlabelled=True).classes == ()


def test_shrinking_shrinks_labels_without_mixing_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=1)
    label = np.full((12, 20), 2, np.uint8)
    label[:, :10] = 0
    save(Image.fromarray(label), tmp_path / "raw/labels/000.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, max_edge=10)
    (sample,) = _samples(manifest)
    assert _label(sample) == [[0] * 5 + [2] * 5] * 6
    assert Image.open(io.BytesIO(sample["png"])).size == (10, 6)
    assert (manifest.shards[0].heights, manifest.shards[0].widths) == ([6], [10])
    assert manifest.pixel_counts == [30, 0, 30]


def _damage_image(raw: Path) -> None:
    path = raw / "images/002.png"
    path.write_bytes(path.read_bytes()[:100])


def _shrink_label(raw: Path) -> None:
    save(Image.new("L", (20, 11)), raw / "labels/002.png")


def _foreign_id(raw: Path) -> None:
    save(Image.new("L", (20, 12), 77), raw / "labels/002.png")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_damage_image, r"images/002\.png: (damaged|unreadable) image"),
        (_shrink_label, r"labels/002\.png: 20 x 11 pixels where its image images/002\.png has 20 x 12"),
        (_foreign_id, r"labels/002\.png: label values outside the recipe's table: 77, 240 pixels"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_unfinished_is_left(
    tmp_path: Path, spoil: Callable[[Path], object], message: str, workers: int
) -> None:
    make_folder(tmp_path / "raw")
    spoil(tmp_path / "raw")
    with pytest.raises(UserError, match=message) as caught:
        build_shards("folder", tmp_path / "raw", tmp_path / "new/out", workers=workers, samples_per_shard=4)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_an_error_keeps_finished_shards_and_says_so(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    _damage_image(tmp_path / "raw")
    message = r"images/002\.png: .* image .*; finished shards are kept \(1 of 2\), building again resumes from there"
    with pytest.raises(UserError, match=message):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    assert not list((tmp_path / "out").glob(".building/*.part"))


def test_the_same_build_is_not_repeated(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    first = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    before = (tmp_path / "out/shard-000000.tar").stat()
    assert build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1) == first
    assert (tmp_path / "out/shard-000000.tar").stat() == before


def test_another_build_is_refused_without_force(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=1)
    before = _bytes(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another build; .* --force"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert _bytes(tmp_path / "out") == before
    forced = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, force=True)
    assert sorted(_bytes(tmp_path / "out")) == ["manifest.json", "shard-000000.tar"]
    assert load_manifest(tmp_path / "out") == forced


def test_shards_without_a_manifest_are_not_overwritten_without_force(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds shards without a manifest"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert _bytes(tmp_path / "out") == {"shard-000000.tar": b"precious"}


def test_a_forced_build_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    old = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    before = _bytes(tmp_path / "out")
    _damage_image(tmp_path / "raw")
    with pytest.raises(UserError):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, force=True)
    assert _bytes(tmp_path / "out") == before
    assert load_manifest(tmp_path / "out") == old


def test_an_interrupt_leaves_finished_shards_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")

    def interrupt(samples: int, total: int, stored: int) -> None:
        if samples == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=2, progress=interrupt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    assert len(list((tmp_path / "out").glob(".building/shard-*"))) == 2  # a tar and its description


def test_two_builds_do_not_write_to_one_folder_at_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")

    def build_again(samples: int, total: int, stored: int) -> None:
        with pytest.raises(UserError, match="another build is writing there"):
            build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, force=True)

    first = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, progress=build_again)
    assert len(list(_samples(load_manifest(first.folder)))) == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: build stopped: .*Not a directory"):
        build_shards("folder", tmp_path / "raw", tmp_path / "file/out", workers=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "raw")
    whole = Path.open

    def full(path: Path, mode: str = "r", *rest, **options):  # type: ignore[no-untyped-def]
        return whole(Path("/dev/full") if mode == "wb" else path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"out: build stopped: .*No space left"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


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
    recipe = load_recipe("folder").model_copy(update={"range": (0.0, 4080.0)})
    (sample,) = _samples(build_shards(recipe, tmp_path / "raw", tmp_path / "out", workers=1))
    stored = np.asarray(Image.open(io.BytesIO(sample["png"])))
    assert stored.dtype == np.uint8
    assert np.array_equal(stored[..., 0], np.rint(ramp[..., 0] / 16))
    with pytest.raises(UserError, match="holds another build"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)


def test_masks_of_0_and_255_are_a_warning_that_names_the_coding(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=2, classes=2)
    for number in range(2):
        mask = np.zeros((12, 20), np.uint8)
        mask[number:6] = 255
        save(Image.fromarray(mask), tmp_path / f"raw/labels/{number:03d}.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    warning = describe_empty_classes(manifest)
    assert "no label has a pixel of class 1;" in warning
    assert "`ids: {0: class 0, 255: class 1}`" in warning
    recipe = load_recipe("folder")
    coding = recipe.coding.model_copy(update={"ids": {0: "class 0", 255: "class 1"}})
    fixed = build_shards(recipe.model_copy(update={"coding": coding}), tmp_path / "raw", tmp_path / "b", workers=1)
    assert describe_empty_classes(fixed) == ""
    assert fixed.pixel_counts == [240 * 2 - 220, 220]


def test_labels_without_a_pixel_of_any_class_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=2)
    for path in (tmp_path / "raw/labels").iterdir():
        save(Image.new("L", (20, 12), 255), path)
    with pytest.raises(UserError, match=r"out: no label has a pixel of any class, all 2 are ignored"):
        build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    assert not (tmp_path / "out/manifest.json").exists()


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
    for sample in _samples(manifest):
        place = json.loads(sample["json"])
        top, left = place["top"], place["left"]
        window = (slice(top, top + 24), slice(left, left + 24))
        assert np.array_equal(_label(sample), label[window])
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


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    overlap=st.integers(0, 29),
)
def test_every_pixel_is_in_a_tile_of_the_wanted_size(
    size: tuple[int, int], tile: tuple[int, int], overlap: int
) -> None:
    encoding = Encoding(tile=tile, overlap=min(overlap, min(tile) - 1))
    boxes = tile_boxes(size, encoding)
    seen = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes:
        assert (bottom - top, right - left) == (min(tile[0], size[1]), min(tile[1], size[0]))
        seen[top:bottom, left:right] = True
    assert seen.all()
    assert len(set(boxes)) == len(boxes)


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


def test_what_is_passed_over_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "raw", samples=2)
    (tmp_path / "raw/images/001.heic").touch()
    (tmp_path / "raw/images/gone.png").symlink_to("nowhere.png")
    build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    (message,) = caplog.messages
    assert message.endswith("passed over 1 .heic file (images/001.heic), 1 link to nothing (images/gone.png)")


def test_the_room_does_not_import_torch() -> None:
    modules = "build, inspect, manifest, recipe, pool, writer"
    code = f"import sys; from dist_pca.shards import {modules}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
