from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from PIL import Image

from dist_pca.shards.recipe import load_recipe
from dist_pca.tools.demo.streets import CLASSES, DAY, DUSK, NIGHT, Look, render_street, write_streets

LOOKS = pytest.mark.parametrize("look", [DAY, DUSK, NIGHT], ids=lambda look: look.name)

FINGERPRINTS = [
    (
        DAY,
        [
            [95.98, 148.011, 114.27, 115.927],
            [59.516, 122.879, 67.03, 91.198],
            [83.565, 95.577, 109.261, 70.794],
            [105.116, 111.11, 118.852, 160.642],
        ],
    ),
    (
        DUSK,
        [
            [96.682, 153.178, 98.083, 99.509],
            [62.583, 134.235, 64.506, 97.874],
            [75.025, 98.448, 78.824, 65.685],
            [44.082, 48.02, 53.138, 63.299],
        ],
    ),
]
"""Mean value of the blocks of a 4 x 4 grid over street 0 of seed 0."""


@LOOKS
def test_a_street_is_the_same_every_time_it_is_drawn(look: Look) -> None:
    first, again = (render_street(3, look, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_a_street_does_not_depend_on_those_drawn_before_it() -> None:
    alone, _ = render_street(5, DUSK, seed=1)
    render_street(4, DAY, seed=1)
    np.testing.assert_array_equal(render_street(5, DUSK, seed=1)[0], alone)


@pytest.mark.parametrize("look", [DUSK, NIGHT], ids=lambda look: look.name)
@pytest.mark.parametrize("index", range(12))
def test_looks_that_share_a_camera_mount_share_every_label(index: int, look: Look) -> None:
    _, by_day = render_street(index, DAY, seed=2)
    _, label = render_street(index, replace(look, mount=DAY.mount), seed=2)
    np.testing.assert_array_equal(label, by_day)


def test_the_mounts_of_the_looks_differ() -> None:
    day, dusk, night = (render_street(0, look, seed=2)[1] for look in (DAY, DUSK, NIGHT))
    assert not any(np.array_equal(a, b) for a, b in ((day, dusk), (day, night), (dusk, night)))


@pytest.mark.parametrize(("look", "rows"), FINGERPRINTS, ids=["day", "dusk"])
def test_a_look_keeps_its_pictures_from_version_to_version(look: Look, rows: list[list[float]]) -> None:
    image, _ = render_street(0, look, seed=0)
    means = image.reshape(4, 40, 4, 64, 3).mean((1, 3, 4))
    # Another noise would move some means by five times this or more; rounding on another processor, hardly at all.
    np.testing.assert_allclose(means, rows, atol=0.01)


@LOOKS
def test_a_look_has_ranges_in_order_and_colours_in_bytes(look: Look) -> None:
    for part in (look.mount, look.sensor):
        for each in fields(part):
            low, high = getattr(part, each.name)
            assert low <= high, each.name
    several = (*look.sky_top, *look.sky_bottom, *look.cloud, *look.roofs, *look.road, *look.sidewalk, *look.foliage)
    materials = (*look.metal, *look.fences, *look.paints, *look.clothes, *look.frames, look.bark, look.glass)
    walls = tuple(colour for _, colour in look.walls)
    assert all(0 <= value <= 255 for colour in (*several, *materials, *walls) for value in colour)


def test_another_index_or_seed_is_another_street() -> None:
    labels = [render_street(index, DAY, seed=seed)[1] for index, seed in ((0, 0), (1, 0), (0, 1))]
    assert all((labels[a] != labels[b]).mean() > 0.05 for a, b in ((0, 1), (0, 2), (1, 2)))


@cache
def _streets(look: Look) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images and labels of enough streets to hold every class."""
    streets = [render_street(index, look, seed=0) for index in range(24)]
    return np.stack([image for image, _ in streets]), np.stack([label for _, label in streets])


@LOOKS
def test_every_class_occurs_and_no_other_value(look: Look) -> None:
    _, labels = _streets(look)
    assert set(np.unique(labels)) == set(range(len(CLASSES)))


@pytest.mark.parametrize("size", [(160, 256), (96, 200)])
def test_size_is_height_and_width(size: tuple[int, int]) -> None:
    image, label = render_street(0, DAY, seed=0, size=size)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.dtype(np.uint8)


def test_thin_things_are_two_pixels_wide() -> None:
    pole = [info.name for info in CLASSES].index("pole")
    widths = []
    for index in range(10):
        _, label = render_street(index, DAY, seed=0)
        edges = np.diff(np.pad((label == pole).astype(np.int8), ((0, 0), (1, 1))), axis=1)
        widths += (np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]).tolist()
    # What stands in front may leave a narrower strip of a few.
    assert np.mean(np.array(widths) >= 2) > 0.9


def _brightness_and_noise(look: Look) -> tuple[float, float]:
    """Mean value, and mean step between neighbours in the sky, where the street itself is smooth."""
    sky = [info.name for info in CLASSES].index("sky")
    images, labels = _streets(look)
    inside = (labels[..., 1:] == sky) & (labels[..., :-1] == sky)
    return float(images.mean()), float(np.abs(np.diff(images.astype(float), axis=2))[inside].mean())


def test_dusk_is_darker_and_noisier_than_day() -> None:
    (day, clean), (dusk, noisy) = _brightness_and_noise(DAY), _brightness_and_noise(DUSK)
    assert dusk < 0.85 * day
    assert noisy > 1.3 * clean


def test_night_is_darker_and_noisier_than_dusk() -> None:
    (dusk, noise), (night, noisier) = _brightness_and_noise(DUSK), _brightness_and_noise(NIGHT)
    assert night < 0.75 * dusk
    assert noisier > 1.2 * noise


def test_no_class_of_the_night_is_lost_in_the_dark() -> None:
    images, labels = _streets(NIGHT)
    for index, info in enumerate(CLASSES):
        if info.name != "sky":
            assert images[labels == index].mean() > 20, info.name


def test_written_streets_are_images_with_labels_of_the_same_name(tmp_path: Path) -> None:
    write_streets(tmp_path, DUSK, split="val", indices=[7, 9], seed=3)
    names = ["val-00007.png", "val-00009.png"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == names
    image, label = render_street(9, DUSK, seed=3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / names[1])), image)
    with Image.open(tmp_path / "labels" / names[1]) as stored:
        assert stored.mode == "L"
        np.testing.assert_array_equal(np.asarray(stored), label)


def test_written_class_table_is_in_label_order(tmp_path: Path) -> None:
    write_streets(tmp_path, DAY, split="train", indices=[], seed=0)
    table = yaml.safe_load((tmp_path / "classes.yaml").read_text())
    assert table == [{"name": info.name, "color": list(info.color)} for info in CLASSES]


def test_the_folder_recipe_reads_what_is_written(tmp_path: Path) -> None:
    write_streets(tmp_path, DAY, split="train", indices=[], seed=0)
    assert load_recipe("folder").class_table(tmp_path) == CLASSES


def test_the_same_streets_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    trees = []
    for name in ("first", "second"):
        write_streets(tmp_path / name, DUSK, split="train", indices=range(2), seed=0)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        trees.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert len(trees[0]) == 5
    assert trees[0] == trees[1]
