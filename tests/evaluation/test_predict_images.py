import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.evaluation.inference import predict
from dist_pca.evaluation.predict_images import Predicted, predict_images
from tests.support.networks import CLASSES, run_config, segmenter

NETWORK = segmenter()


def image(path: Path, size: tuple[int, int] = (40, 24), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def run(images: list[Path], out: Path, **options: Any) -> Predicted:
    return predict_images(NETWORK, images, out, CLASSES, run_config(), device="cpu", **options)


def written(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_each_image_gets_a_label_and_an_overlay_of_its_own_size(tmp_path: Path) -> None:
    files = [image(tmp_path / "a" / "1.png"), image(tmp_path / "b" / "1.png", (33, 50), "L")]
    out = tmp_path / "out"
    assert run(files, out) == Predicted(2, ())
    assert written(out) == ["classes.json", "labels/a/1.png", "labels/b/1.png", "overlays/a/1.png", "overlays/b/1.png"]
    for kind in ("labels", "overlays"):
        assert [Image.open(out / kind / name / "1.png").size for name in "ab"] == [(40, 24), (33, 50)]
    assert [info["name"] for info in json.loads((out / "classes.json").read_text())] == ["road", "sky", "car"]


def test_labels_are_the_networks_train_ids(tmp_path: Path) -> None:
    path = image(tmp_path / "1.png")
    run([path], tmp_path / "out", overlays=False)
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    expected = predict(NETWORK, pixels, (24, 40), (24, 40))[0]
    label = np.asarray(Image.open(tmp_path / "out" / "labels" / "1.png"))
    assert np.array_equal(label, expected.numpy())
    assert len(np.unique(label)) > 1
    assert not (tmp_path / "out" / "overlays").exists()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2000, 3)])
def test_images_of_any_size_pass(tmp_path: Path, size: tuple[int, int]) -> None:
    run([image(tmp_path / "1.png", size)], tmp_path / "out")
    assert Image.open(tmp_path / "out" / "labels" / "1.png").size == size


def test_an_unreadable_image_ends_all_or_is_named_and_left_out(tmp_path: Path) -> None:
    files = [image(tmp_path / "1.png"), tmp_path / "2.png", image(tmp_path / "3.png")]
    files[1].write_text("not an image")
    with pytest.raises(UserError, match=r"2\.png: unreadable image .*--on-error skip$"):
        run(files, tmp_path / "first")
    done = run(files, tmp_path / "second", on_error="skip", overlays=False)
    assert done.written == 2
    (said,) = done.skipped
    assert "2.png: unreadable image" in said
    assert "skip" not in said
    assert written(tmp_path / "second") == ["classes.json", "labels/1.png", "labels/3.png"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"^--out .*out: cannot be written"):
        run([image(tmp_path / "1.png")], tmp_path / "out")


def test_progress_counts_images(tmp_path: Path) -> None:
    told: list[int] = []
    run([image(tmp_path / f"{index}.png") for index in range(3)], tmp_path / "out", progress=told.append)
    assert told == [0, 1, 2, 3]
