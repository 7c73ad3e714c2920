import io
import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.classes import ClassInfo, label_set
from dist_pca.data.decode import decode_sample
from dist_pca.data.read import ShardReader
from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.index import class_table, index_shards
from dist_pca.shards.inspect import grid
from dist_pca.shards.manifest import describe_empty_classes, load_manifest
from dist_pca.shards.verify import verify
from tests.support.foreign_shards import label, sample, write
from tests.support.raw_data import blocks, make_folder, png16, with_orientation

CLASSES = tuple(ClassInfo(name, (0, 0, index)) for index, name in enumerate("abc"))


def test_shards_of_webdatasets_writer_become_a_folder_that_is_read_by_place(tmp_path: Path) -> None:
    samples = [sample(f"run/{number:03d}", height=12 + number) for number in range(5)]
    folder = write(tmp_path / "theirs", samples)
    manifest = index_shards(folder, classes=CLASSES, workers=1)
    assert load_manifest(folder) == manifest
    assert [shard.keys for shard in manifest.shards] == [["run/000", "run/001"], ["run/002", "run/003"], ["run/004"]]
    assert [height for shard in manifest.shards for height in shard.heights] == [12, 13, 14, 15, 16]
    assert {width for shard in manifest.shards for width in shard.widths} == {20}
    assert manifest.shards[0].pixel_counts == [[60, 60, 60], [65, 65, 65]]
    reader = ShardReader(manifest, keep_open=1)
    for number, written in enumerate(samples):
        read = reader.read(*divmod(number, 2))
        assert {name: value for name, value in read.items() if not name.startswith("__")} == {
            name: value for name, value in written.items() if name != "__key__"
        }
    reader.close()
    assert verify(folder, deep=True, workers=1).problems == []


def test_our_own_shards_indexed_are_as_built(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=5)
    built = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=2)
    indexed = index_shards(tmp_path / "out", classes=built.classes, force=True, workers=1)
    assert indexed.shards == built.shards
    assert (indexed.labelled, indexed.classes) == (built.labelled, built.classes)


def test_labels_may_have_another_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", [sample("0", "seg.png")])
    manifest = index_shards(folder, classes=CLASSES, label_member="seg.png", workers=1)
    assert (manifest.labelled, manifest.label_member) == (True, "seg.png")
    assert load_manifest(folder).label_member == "seg.png"
    assert not index_shards(folder, classes=CLASSES, force=True, workers=1).labelled


def test_without_labels_no_class_table_is_needed(tmp_path: Path) -> None:
    manifest = index_shards(write(tmp_path / "theirs", [sample("0", None)]), workers=1)
    assert (manifest.labelled, manifest.classes, manifest.shards[0].pixel_counts) == (False, (), [])


def test_labels_without_a_class_table_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", [sample("0")])
    with pytest.raises(UserError, match=r"theirs-0000\.tar: sample '0' has a label\.png; .*--classes or --label-set"):
        index_shards(folder, workers=1)


@pytest.mark.parametrize("lacking", [0, 1, 2, 3])
def test_the_first_sample_without_labels_among_others_is_named(tmp_path: Path, lacking: int) -> None:
    samples = [sample(f"{number}", None if number >= lacking and number != 2 else "label.png") for number in range(4)]
    folder = write(tmp_path / "theirs", samples)
    first = {0: 0, 1: 1, 2: 3, 3: 3}[lacking]
    message = rf"theirs-000{first // 2}\.tar: sample '{first}' has no label\.png while others have"
    with pytest.raises(UserError, match=message):
        index_shards(folder, classes=CLASSES, workers=1)
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"label.png": label(np.full((12, 20), 3, np.uint8))}, r"label values outside the 3 classes: 3, 240 pixels"),
        ({"label.png": label(np.zeros((11, 20), np.uint8))}, "20 x 11 pixels where the image has 20 x 12"),
        ({"label.png": b"nonsense"}, "unreadable image"),
        ({"label.png": label(np.zeros((12, 20), np.uint8))[:45]}, "damaged image"),
        ({"label.png": sample("0")["jpg"]}, "unreadable image"),
        ({"jpg": b"nonsense"}, "unreadable image"),
        ({"jpg": None, "txt": b"a"}, r"no image \(jpg, jpeg, png, webp\)"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(tmp_path: Path, members: dict[str, bytes | None], message: str) -> None:
    bad = {name: value for name, value in {**sample("1"), **members}.items() if value is not None}
    folder = write(tmp_path / "theirs", [sample("0"), bad])
    with pytest.raises(UserError, match=rf"theirs-0000\.tar: sample '1': .*{message}") as caught:
        index_shards(folder, classes=CLASSES, workers=1)
    assert "\n" not in str(caught.value)
    assert not (folder / "manifest.json").exists()


def test_labels_keep_to_the_upright_image(tmp_path: Path) -> None:
    upright = {
        **sample("1", height=64, width=96),
        "jpg": with_orientation(blocks(), 8, tmp_path / "a.jpg").read_bytes(),
    }
    manifest = index_shards(write(tmp_path / "theirs", [upright]), classes=CLASSES, workers=1)
    assert (manifest.shards[0].heights, manifest.shards[0].widths) == ([64], [96])
    lying = {**upright, "label.png": label(np.zeros((96, 64), np.uint8))}
    message = r"'1': label\.png: 64 x 96 pixels where the image has 96 x 64 when upright, which labels keep to"
    with pytest.raises(UserError, match=message):
        index_shards(write(tmp_path / "lying", [lying]), classes=CLASSES, workers=1)


def test_deep_images_that_are_not_of_the_full_range_are_refused(tmp_path: Path) -> None:
    dark: dict[str, bytes | str] = {"__key__": "1", "png": png16(np.full((12, 20, 1), 4095))}
    with pytest.raises(UserError, match="sample '1': png: 16-bit values 4095 to 4095"):
        index_shards(write(tmp_path / "theirs", [dark]), workers=1)


def test_labels_of_nothing_are_refused_and_an_empty_class_is_a_warning(tmp_path: Path) -> None:
    nothing = {**sample("1"), "label.png": label(np.full((12, 20), 255, np.uint8))}
    with pytest.raises(UserError, match="theirs: no label has a pixel of any class"):
        index_shards(write(tmp_path / "theirs", [nothing]), classes=CLASSES, workers=1)
    assert not (tmp_path / "theirs/manifest.json").exists()
    two = {**sample("1"), "label.png": label(np.full((12, 20), 1, np.uint8))}
    manifest = index_shards(write(tmp_path / "two", [two]), classes=CLASSES, workers=1)
    assert "no label has a pixel of a, c; check that their values" in describe_empty_classes(manifest)


def test_members_of_any_name_are_indexed_read_and_verified(tmp_path: Path) -> None:
    theirs = sample("1")
    named = {"__key__": "1", "input.jpg": theirs["jpg"], "mask.png": theirs["label.png"], "thumb.png": b"no image"}
    folder = write(tmp_path / "theirs", [named])
    message = (
        r"sample '1': no image \(jpg.*\) among its members, which are input\.jpg, mask\.png, thumb\.png; name .*--i"
    )
    with pytest.raises(UserError, match=message):
        index_shards(folder, classes=CLASSES, workers=1)
    manifest = index_shards(folder, classes=CLASSES, image_member="Input.jpg", label_member="mask.png", workers=1)
    assert load_manifest(folder) == manifest
    with closing(ShardReader(manifest, keep_open=1)) as reader:
        image, train_ids = decode_sample(reader.read(0, 0), label_member="mask.png")
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(named["input.jpg"]))))  # type: ignore[arg-type]
    assert train_ids is not None
    assert verify(folder, deep=True, workers=1).problems == []
    assert grid(manifest).size[0] > 0
    with pytest.raises(UserError, match=r"no image \(photo\.jpg\) among its members, which are input\.jpg"):
        index_shards(folder, classes=CLASSES, image_member="photo.jpg", force=True, workers=1)


def test_a_member_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for member in ("jpg", "label.png"):
        folder = write(tmp_path / member, [sample("0"), {**sample("1"), member: b"nonsense"}])
        with pytest.raises(UserError, match=rf"sample '1': {member}: unreadable image"):
            index_shards(folder, classes=CLASSES, workers=1)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", [sample("0", None), sample("1", None), sample("0", None)])
    with pytest.raises(UserError, match=r"theirs-0001\.tar: sample '0' is in theirs-0000\.tar too"):
        index_shards(folder, workers=1)


def test_what_is_no_folder_of_shards_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        index_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.tar in it"):
        index_shards(tmp_path)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UserError, match=r"a\.tar\.gz: compressed"):
        index_shards(tmp_path)


def test_a_manifest_is_replaced_with_force_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", [sample("0", None)])
    (folder / "manifest.json").write_text("precious")
    with pytest.raises(UserError, match="replace it with --force"):
        index_shards(folder, workers=1)
    assert (folder / "manifest.json").read_text() == "precious"
    index_shards(folder, workers=1, force=True)
    assert json.loads((folder / "manifest.json").read_text())["recipe"] == "index"


def test_class_tables_come_from_a_file_or_a_named_set(tmp_path: Path) -> None:
    make_folder(tmp_path, samples=1)
    assert class_table(None, None) is None
    assert class_table(None, "synthia_16") == label_set("synthia_16")
    table = class_table(tmp_path / "classes.yaml", None)
    assert table is not None
    assert [info.name for info in table] == ["class 0", "class 1", "class 2"]
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        class_table(tmp_path / "nowhere.yaml", None)
    with pytest.raises(UserError, match="cityscapes_19, synthia_16, synthia_13"):
        class_table(None, "cityscapes")
    with pytest.raises(UserError, match="give only one of them"):
        class_table(tmp_path / "classes.yaml", "synthia_16")


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", [sample(f"{number}") for number in range(6)])
    alone = index_shards(folder, classes=CLASSES, workers=1)
    shutil.copy(folder / "manifest.json", tmp_path)
    assert index_shards(folder, classes=CLASSES, workers=2, force=True) == alone
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "manifest.json").read_bytes()
