from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.classes import CITYSCAPES_CLASSES, ClassInfo, label_set
from dist_pca.evaluation.label_files import cityscapes_ids, overlay, prediction_names, save_label, save_whole
from tests.support.shards import make_shards, with_keys

CLASSES = (ClassInfo("road", (128, 64, 128)), ClassInfo("sky", (70, 130, 180)))
LABEL = np.array([[0, 1, 1], [1, 0, 255]], np.uint8)


def test_all_nineteen_classes_get_the_ids_of_cityscapes() -> None:
    table = cityscapes_ids(CITYSCAPES_CLASSES)
    assert table is not None
    official = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert table[:19].tolist() == official


def test_ids_go_by_name_and_not_by_place() -> None:
    table = cityscapes_ids(label_set("synthia_13"))
    assert table is not None
    assert table[:4].tolist() == [7, 8, 11, 19]


def test_a_class_that_is_not_of_cityscapes_leaves_no_table() -> None:
    assert cityscapes_ids((*CLASSES, ClassInfo("tree", (0, 0, 0)))) is None


def test_frames_of_cityscapes_are_called_as_their_files_and_others_as_their_keys(tmp_path: Path) -> None:
    key = "leftImg8bit_val_frankfurt_frankfurt_000000_000294_leftImg8bit"
    manifest = with_keys(make_shards(tmp_path / "shards", [3]), [key, "lindau_000001_000019_leftImg8bit", "other"])
    assert list(prediction_names(manifest).values()) == [
        "frankfurt_000000_000294_leftImg8bit",
        "lindau_000001_000019_leftImg8bit",
        "other",
    ]


def test_names_never_collide(tmp_path: Path) -> None:
    keys = [f"{copy}_ulm_000000_000001_leftImg8bit" for copy in "ab"]
    manifest = with_keys(make_shards(tmp_path / "shards", [2]), keys)
    assert prediction_names(manifest) == dict(zip(keys, keys, strict=True))


def test_a_label_file_holds_the_values_and_shows_the_colours(tmp_path: Path) -> None:
    save_label(tmp_path / "deep" / "label.png", LABEL, CLASSES)
    image = Image.open(tmp_path / "deep" / "label.png")
    assert np.array_equal(np.asarray(image), LABEL)
    assert np.asarray(image.convert("RGB"))[0].tolist() == [[128, 64, 128], [70, 130, 180], [70, 130, 180]]
    save_label(tmp_path / "grey.png", LABEL)
    grey = Image.open(tmp_path / "grey.png")
    assert grey.mode == "L"
    assert np.array_equal(np.asarray(grey), LABEL)


def test_an_overlay_is_half_image_and_half_colour() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    shown = np.asarray(overlay(image, LABEL, CLASSES)).astype(int)
    assert np.abs(shown[0, 0] - [114, 82, 114]).max() <= 1
    assert np.abs(shown[1, 2] - 50).max() <= 1


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, kind: str) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_whole(tmp_path / "a.png", Image.new("L", (2, 2)))
    assert not list(tmp_path.iterdir())
