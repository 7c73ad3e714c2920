import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.images import Reading, ValueRange, describe_file, open_image
from tests.support.raw_data import png16, tiff

tifffile = pytest.importorskip("tifffile", reason="tifffile is in the extra `bands`")
BANDS = np.random.default_rng(0).integers(0, 256, (12, 20, 10), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 4096, (12, 20, 4), dtype=np.uint16)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def planar(values: npt.NDArray[Any], path: Path, **options: Any) -> Path:
    """Write each band as a plane of its own."""
    layout = {"photometric": "minisblack", "planarconfig": "separate"}
    tifffile.imwrite(path, np.moveaxis(values, -1, 0), **layout | options)
    return path


def chunky(values: npt.NDArray[Any], path: Path, **options: Any) -> Path:
    """Write the bands of each pixel side by side."""
    tifffile.imwrite(path, values, **{"photometric": "minisblack", "planarconfig": "contig"} | options)
    return path


WAYS: dict[str, Any] = {
    "plain": lambda path: written(path, tiff(BANDS)),
    "planar": lambda path: planar(BANDS, path),
    "tiled, compressed, predicted": lambda path: chunky(BANDS, path, tile=(16, 16), compression="lzw", predictor=True),
    "planar and compressed": lambda path: planar(BANDS, path, compression="zlib"),
    "BigTIFF, big-endian": lambda path: chunky(BANDS, path, bigtiff=True, byteorder=">"),
    "a page for each band": lambda path: planar(BANDS, path, planarconfig=None, metadata=None),
    "RGB with others": lambda path: chunky(BANDS, path, photometric="rgb"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_named_bands_of_a_tiff_are_read_in_their_order(tmp_path: Path, way: str) -> None:
    path = WAYS[way](tmp_path / "a.tif")
    found = open_image(path, Reading(bands=(8, 1, 3, 10)))
    assert np.array_equal(np.asarray(found), BANDS[..., [7, 0, 2, 9]])
    assert np.array_equal(np.asarray(open_image(path, Reading(bands=tuple(range(1, 11)), exact=True))), BANDS)


def test_arrays_and_all_channels_of_pictures_are_bands(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BANDS)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.npy", Reading(bands=(2, 9)))), BANDS[..., [1, 8]])
    np.save(tmp_path / "flat.npy", BANDS[..., 0])
    assert np.array_equal(np.asarray(open_image(tmp_path / "flat.npy", Reading(bands=(1,)))), BANDS[..., :1])
    Image.fromarray(BANDS[..., :4], "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", Reading(bands=(4, 1)))), BANDS[..., [3, 0]])
    Image.fromarray(BANDS[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "grey.png", Reading(bands=(1,)))), BANDS[..., :1])
    Image.fromarray(BANDS[..., 0] > 127).save(tmp_path / "mask.png")
    mask = np.asarray(open_image(tmp_path / "mask.png", Reading(bands=(1,))))
    assert np.array_equal(mask, np.where(BANDS[..., :1] > 127, 255, 0))


def test_a_palette_gives_the_bands_of_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png", Reading(bands=(3, 1))))[0, 0].tolist() == [30, 10]


def test_three_bands_are_an_rgb_image_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    found = open_image(written(tmp_path / "a.tif", tiff(BANDS)), Reading(bands=(4, 3, 2)))
    assert isinstance(found, Image.Image)
    assert np.array_equal(np.asarray(found), BANDS[..., [3, 2, 1]])


def test_without_bands_an_image_with_alpha_is_rgb_as_ever(tmp_path: Path) -> None:
    Image.fromarray(BANDS[..., :4], "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), BANDS[..., :3])
    with pytest.raises(UserError, match=r"b\.tif: is a TIFF of 10 bands of 8 bits.*`bands` in the recipe"):
        open_image(written(tmp_path / "b.tif", tiff(BANDS)))


@pytest.mark.parametrize(("tag", "turn"), [(2, "FLIP_LEFT_RIGHT"), (6, "ROTATE_270"), (7, "TRANSVERSE")])
def test_bands_are_upright(tmp_path: Path, tag: int, turn: str) -> None:
    path = chunky(BANDS, tmp_path / "a.tif", extratags=[(274, 3, 1, tag, True)], metadata=None)
    found = np.asarray(open_image(path, Reading(bands=(1, 5))))
    for place, band in enumerate((0, 4)):
        expected = Image.fromarray(BANDS[..., band]).transpose(Image.Transpose[turn])
        assert np.array_equal(found[..., place], np.asarray(expected))
    assert describe_file(path, Reading(bands=(1,))) == ("TIFF 10 x uint8", tag)


@pytest.mark.parametrize("name", ["a.tif", "a.npy", "a.png"])
def test_deep_bands_need_a_range_and_each_may_have_its_own(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, DEEP)
    else:
        written(path, tiff(DEEP) if name == "a.tif" else png16(DEEP))
    with pytest.raises(UserError, match=rf"{name}: has values .* of type uint16 in band 4, not of 8 bits; .*`range"):
        open_image(path, Reading(bands=(4, 2)))
    one = np.asarray(open_image(path, Reading((ValueRange(0, 4095),), bands=(4, 2))))
    assert np.abs(one - DEEP[..., [3, 1]] / 4095 * 255).max() <= 0.5
    each = Reading((ValueRange(0, 4095), ValueRange(-1000, 9000)), bands=(4, 2))
    assert np.abs(np.asarray(open_image(path, each))[..., 1] - (DEEP[..., 1] + 1000.0) / 10_000 * 255).max() <= 0.5
    narrow = (ValueRange(0, 4095), ValueRange(0, 99))
    with pytest.raises(UserError, match=r"in band 2 outside the recipe's range 0 to 99"):
        open_image(path, Reading(narrow, bands=(4, 2)))


def test_floats_that_are_no_numbers_are_refused_by_band(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([np.zeros((4, 6)), np.full((4, 6), np.nan)], axis=-1))
    with pytest.raises(UserError, match=r"a\.npy: has values that are not numbers \(NaN\) in band 2"):
        open_image(tmp_path / "a.npy", Reading((ValueRange(0, 1),), bands=(1, 2)))


@pytest.mark.parametrize(
    ("reading", "fault"),
    [
        (Reading(bands=(1, 11)), "has 10 bands, and `bands` of the recipe names band 11"),
        (Reading(bands=(1, 2, 3, 4), exact=True), "has 10 bands, and `bands` of the recipe wants 4"),
    ],
)
def test_bands_that_a_file_does_not_have_are_refused(tmp_path: Path, reading: Reading, fault: str) -> None:
    with pytest.raises(UserError, match=rf"a\.tif: {fault}; [^\n]*$"):
        open_image(written(tmp_path / "a.tif", tiff(BANDS)), reading)


def test_damaged_files_and_those_of_no_single_image_are_refused_in_one_line(tmp_path: Path) -> None:
    compressed = chunky(BANDS, tmp_path / "c.tif", compression="zlib").read_bytes()
    np.save(tmp_path / "whole.npy", BANDS)
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((3, 4, 12, 20), np.uint8), photometric="minisblack")
    palette = Image.fromarray(BANDS[..., 0]).convert("P")
    palette.save(tmp_path / "palette.tif")
    np.save(tmp_path / "deep.npy", np.zeros((2, 3, 4, 5), np.uint8))
    np.save(tmp_path / "complex.npy", np.zeros((2, 3, 4), np.complex64))
    np.save(tmp_path / "object.npy", np.array([[{}]], dtype=object))
    faults = {
        written(tmp_path / "cut.tif", tiff(BANDS)[:-500]): "TIFF",
        written(tmp_path / "header.tif", tiff(BANDS)[:40]): "unreadable TIFF",
        written(tmp_path / "zip.tif", compressed[: len(compressed) // 2]): "TIFF",
        written(tmp_path / "cut.npy", (tmp_path / "whole.npy").read_bytes()[:-9]): "unreadable array",
        tmp_path / "object.npy": "unreadable array",
        tmp_path / "deep.tif": r"a TIFF of shape \(3, 4, 12, 20\)",
        tmp_path / "palette.tif": "a TIFF whose values are PALETTE",
        tmp_path / "deep.npy": r"an array of shape \(2, 3, 4, 5\)",
        tmp_path / "complex.npy": "has values of type complex64 in band 1",
        tmp_path / "nowhere.tif": "no such file",
    }
    for path, fault in faults.items():
        with pytest.raises(UserError, match=rf"{path.name}: [^\n]*{fault}[^\n]*$"):
            open_image(path, Reading(bands=(1,)))


def test_a_huge_image_of_several_bands_is_refused_before_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BANDS)
    for path in (written(tmp_path / "a.tif", tiff(BANDS)), tmp_path / "a.npy"):
        with pytest.raises(UserError, match=rf"{path.name}: more than 239 pixels"):
            open_image(path, Reading(bands=(1,)), max_pixels=239)
        assert open_image(path, Reading(bands=(1,)), max_pixels=240).size == (20, 12)


def test_without_tifffile_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"a\.tif: [^\n]*pip install 'dist-pca\[bands\]'$"):
        open_image(written(tmp_path / "a.tif", tiff(BANDS)), Reading(bands=(1,)))
