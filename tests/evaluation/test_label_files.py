from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.evaluation.label_files import overlay, save_label, save_whole

CLASSES = (ClassInfo("road", (128, 64, 128)), ClassInfo("sky", (70, 130, 180)))
LABEL = np.array([[0, 1, 1], [1, 0, 255]], np.uint8)


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


def test_an_overlay_of_many_rows_is_that_of_each() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (3000, 2, 3), dtype=np.uint8)
    label = generator.integers(0, 3, (3000, 2)).astype(np.uint8)
    whole = np.asarray(overlay(image, label, CLASSES))
    for row in (0, 1023, 1024, 2999):
        assert np.array_equal(
            whole[row : row + 1], np.asarray(overlay(image[row : row + 1], label[row : row + 1], CLASSES))
        )


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, kind: str) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_whole(tmp_path / "a.png", Image.new("L", (2, 2)))
    assert not list(tmp_path.iterdir())
