import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dist_pca.errors import UserError
from dist_pca.shards.build import build_shards
from dist_pca.shards.inspect import grid, render, save_grid, summarise
from dist_pca.shards.sample import read_sample
from tests.support.raw_data import make_folder, random_image, save


def _printed(folder_summary: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(folder_summary)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_summary_counts_samples_sizes_and_shares(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=3)
    save(random_image(9, 30, 40), tmp_path / "raw/images/009.png")
    save(Image.new("L", (40, 30), 1), tmp_path / "raw/labels/009.png")
    summary = summarise(build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, samples_per_shard=3))
    assert (summary.samples, summary.shards) == (4, 2)
    assert (summary.smallest, summary.largest) == ((20, 12), (40, 30))
    assert [info.images for info in summary.classes] == [3, 4, 3]
    assert [info.pixels for info in summary.classes] == [180, 1380, 180]
    assert sum(info.share for info in summary.classes) == pytest.approx(1)
    assert summary.ignored_share == pytest.approx(180 / 1920)
    text = _printed(render(summary))
    assert "20 x 12 to 40 x 30" in text
    assert "class 2" in text
    assert "79.31%" in text


def test_without_labels_there_are_no_shares(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    summary = summarise(build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, unlabelled=True))
    assert summary.ignored_share is None
    text = _printed(render(summary))
    assert "without labels" in text
    assert "%" not in text


def test_one_sample_is_read_by_its_place(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    members = read_sample(manifest, manifest.shards[0], 2)
    assert set(members) == {"png", "label.png", "json"}
    assert members["png"] == (tmp_path / "raw/images/002.png").read_bytes()


def test_the_grid_lays_class_colours_over_labelled_pixels_only(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=1)
    save(Image.new("RGB", (20, 12)), tmp_path / "raw/images/000.png")
    label = np.full((12, 20), 255, np.uint8)
    label[:, 10:] = 2
    save(Image.fromarray(label), tmp_path / "raw/labels/000.png")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    picture = np.asarray(grid(manifest, samples=5)).astype(int)
    assert (picture[100, 100] == 0).all()
    tint = picture[100, 400]
    assert (abs(tint - np.array(manifest.classes[2].color) * tint[2] / 200) <= 1).all()
    assert tint[2] > 50


def test_the_grid_has_a_legend_in_every_class_colour(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=7, classes=6)
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    pixels = np.asarray(grid(manifest, samples=6))
    assert all((pixels == info.color).all(axis=2).any() for info in manifest.classes)


def test_the_grid_of_unlabelled_shards_is_their_images(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=2, extension="jpg")
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1, unlabelled=True)
    assert grid(manifest).width > grid(manifest, samples=1).width


def test_a_grid_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "raw", samples=1)
    manifest = build_shards("folder", tmp_path / "raw", tmp_path / "out", workers=1)
    for name in ("nowhere/grid.png", "grid.nonsense"):
        with pytest.raises(UserError, match=r"not written \(.*\); give a \.png file"):
            save_grid(manifest, tmp_path / name)
