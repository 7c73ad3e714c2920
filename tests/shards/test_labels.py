import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pydantic import ValidationError

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.labels import TrainIds, encode_label, lookup_table, read_label
from dist_pca.shards.recipe import Coding
from tests.support.raw_data import palette_image, png16, tiff, with_orientation

CLASSES = (ClassInfo("road", (0, 0, 0)), ClassInfo("sky", (1, 1, 1)))
IDS = np.array([[7, 8, 9], [7, 7, 200]])
TRAIN_IDS = [[0, 1, 255], [0, 0, 255]]


def _read(path: Path, **coding: object) -> TrainIds:
    parsed = Coding.model_validate({"ids": {7: "road", 8: "sky", 9: "ignore"}, "other": "ignore"} | coding)
    return read_label(path, parsed, lookup_table(parsed, CLASSES))


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(IDS.astype(np.uint8)), palette_image(IDS), Image.fromarray(IDS.astype(np.uint16))],
    ids=["grey", "palette", "16-bit grey"],
)
def test_index_reads_ids_from_one_channel_or_a_palettes_index(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "label.png")
    assert _read(tmp_path / "label.png", kind="index").tolist() == TRAIN_IDS


def test_an_empty_table_means_train_ids_with_255_for_ignore(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "label.png")
    assert _read(tmp_path / "label.png", kind="index", ids={}, other="error").tolist() == [[0, 1, 255]]


def test_color_reads_colours_and_a_class_may_have_several(tmp_path: Path) -> None:
    colours = np.array([[[10, 20, 30], [40, 50, 60], [1, 2, 3], [9, 9, 9]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "label.png")
    table = [("road", (10, 20, 30)), ("sky", (40, 50, 60)), ("road", (1, 2, 3))]
    colors = [{"name": name, "color": color} for name, color in table]
    assert _read(tmp_path / "label.png", kind="color", ids={}, colors=colors).tolist() == [[0, 1, 0, 255]]


@given(
    arrays(np.uint16, array_shapes(min_dims=3, max_dims=3, max_side=6).map(lambda shape: (*shape[:2], 3))),
    st.integers(0, 2),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_channel_reads_all_16_bits_of_one_channel(
    tmp_path: Path, values: np.ndarray[tuple[int, ...], np.dtype[np.uint16]], channel: int
) -> None:
    (tmp_path / "label.png").write_bytes(png16(values))
    wanted = int(values[0, 0, channel])
    train_ids = _read(tmp_path / "label.png", kind="channel", channel=channel, ids={wanted: "sky"})
    assert ((train_ids == 1) == (values[..., channel] == wanted)).all()


def test_channel_reads_8_bit_images_too(tmp_path: Path) -> None:
    Image.fromarray(np.stack([IDS * 0, IDS, IDS * 0], axis=-1).astype(np.uint8)).save(tmp_path / "label.png")
    assert _read(tmp_path / "label.png", kind="channel", channel=1).tolist() == TRAIN_IDS


def test_ids_outside_the_table_are_named_where_the_recipe_forbids_them(tmp_path: Path) -> None:
    Image.fromarray(IDS.astype(np.uint8)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"label\.png: label values outside the recipe's table: 200, 1 pixels"):
        _read(tmp_path / "label.png", kind="index", other="error")


def test_colours_outside_the_table_are_named_in_hexadecimal(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1), (18, 52, 86)).save(tmp_path / "label.png")
    colors = [{"name": "road", "color": (0, 0, 0)}]
    with pytest.raises(UserError, match="#123456, 2 pixels"):
        _read(tmp_path / "label.png", kind="color", ids={}, colors=colors, other="error")


def test_colours_where_ids_are_expected_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match="image mode RGB, but the recipe's coding `index` needs one channel"):
        _read(tmp_path / "label.png", kind="index")


@pytest.mark.parametrize("image", [Image.new("L", (2, 2)), palette_image(IDS)], ids=["grey", "palette"])
def test_a_channel_that_is_not_there_is_refused(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "label.png")
    with pytest.raises(UserError, match="has no channel 1"):
        _read(tmp_path / "label.png", kind="channel", channel=1)


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2)))
def test_encoding_a_label_loses_nothing(train_ids: TrainIds) -> None:
    image = Image.open(io.BytesIO(encode_label(train_ids)))
    assert image.mode == "L"
    assert (np.asarray(image) == train_ids).all()


def _two_classes(path: Path, **coding: object) -> list[list[int]]:
    parsed = Coding.model_validate({"kind": "index"} | coding)
    found: list[list[int]] = read_label(path, parsed, lookup_table(parsed, CLASSES)).tolist()
    return found


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_masks_of_one_bit_hold_the_ids_0_and_1(tmp_path: Path, suffix: str) -> None:
    mask = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    path = tmp_path / f"mask.{suffix}"
    image = Image.fromarray(mask.astype(bool))
    if suffix == "gif":
        image = palette_image(mask)
    image.save(path)
    assert _two_classes(path) == mask.tolist()
    assert _two_classes(path, kind="channel") == mask.tolist() if suffix != "gif" else True


def test_gif_labels_hold_palette_indices(tmp_path: Path) -> None:
    palette_image(IDS).save(tmp_path / "label.gif", optimize=False)
    assert _read(tmp_path / "label.gif", kind="index").tolist() == TRAIN_IDS


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_values_of_a_few_bits_are_ids_and_not_shades(tmp_path: Path, bits: int) -> None:
    ids = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    packed = b"".join(
        b"\0" + int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits * 4 // 8, "big") for row in ids
    )
    content = bytearray(png16(np.zeros((2, 4, 1), np.uint16)))
    header = struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    (tmp_path / "label.png").write_bytes(bytes(content[:8]) + b"".join(body))
    coding = {"ids": {0: "road", 1: "sky", 2: "ignore", 3: "sky"}}
    assert _two_classes(tmp_path / "label.png", **coding) == [[0, 1, 255, 1], [1, 255, 1, 0]]


def test_a_label_is_upright_as_its_own_orientation_says(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    with_orientation(Image.fromarray(mask), 6, tmp_path / "label.png")
    assert _two_classes(tmp_path / "label.png") == mask.tolist()


@pytest.mark.parametrize("name", ["label.jpg", "label.png"])
@pytest.mark.parametrize("kind", ["index", "channel", "color"])
def test_a_label_in_jpeg_is_refused_whatever_its_name(tmp_path: Path, kind: str, name: str) -> None:
    Image.new("RGB" if kind == "color" else "L", (8, 8)).save(tmp_path / name, "JPEG")
    coding = {"colors": [{"name": "road", "color": (0, 0, 0)}]} if kind == "color" else {}
    remedy = "coding.tolerance" if kind == "color" else "PNG"
    with pytest.raises(UserError, match=rf"{name}: a label in JPEG, whose lossy compression .*{remedy}"):
        _two_classes(tmp_path / name, kind=kind, **coding)


def test_webp_labels_are_read_if_they_are_lossless(tmp_path: Path) -> None:
    colors = [{"name": "road", "color": (0, 0, 0)}, {"name": "sky", "color": (255, 255, 255)}]
    image = Image.new("RGB", (16, 16), "white")
    image.save(tmp_path / "label.webp", lossless=True)
    assert _two_classes(tmp_path / "label.webp", kind="color", colors=colors) == [[1] * 16] * 16
    image.save(tmp_path / "label.webp", quality=50)
    with pytest.raises(UserError, match="a label in WEBP"):
        _two_classes(tmp_path / "label.webp", kind="color", colors=colors)


COLORS = [{"name": "road", "color": (200, 30, 40)}, {"name": "sky", "color": (20, 60, 220)}]


def test_the_nearest_colour_is_taken_within_the_tolerance(tmp_path: Path) -> None:
    pixels = np.array([[[203, 27, 43], [20, 60, 220], [110, 45, 130], [23, 57, 200]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "label.png")
    coding = {"kind": "color", "colors": COLORS}
    assert _two_classes(tmp_path / "label.png", **coding, tolerance=3, other="ignore") == [[0, 1, 255, 255]]
    assert _two_classes(tmp_path / "label.png", **coding, tolerance=20, other="ignore") == [[0, 1, 255, 1]]
    with pytest.raises(UserError, match="#6e2d82, 1 pixels"):
        _two_classes(tmp_path / "label.png", **coding, tolerance=20)
    with pytest.raises(ValidationError, match="kind `index` takes ids as they are"):
        Coding.model_validate({"kind": "index", "tolerance": 3})


def test_colours_in_jpeg_are_the_classes_that_were_drawn_where_a_tolerance_is_given(tmp_path: Path) -> None:
    drawn = np.zeros((48, 64), int)
    drawn[:, 32:] = 1
    Image.fromarray(np.array([entry["color"] for entry in COLORS], np.uint8)[drawn]).save(
        tmp_path / "a.jpg", quality=90
    )
    read = np.array(_two_classes(tmp_path / "a.jpg", kind="color", colors=COLORS, tolerance=40, other="ignore"))
    assert ((read == drawn) | (read == 255)).all()
    assert (read == drawn).mean() > 0.95


@given(
    color=st.tuples(*[st.integers(0, 255)] * 3),
    tolerance=st.integers(1, 255),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_no_colour_further_off_than_the_tolerance_is_taken(
    tmp_path: Path, color: tuple[int, int, int], tolerance: int
) -> None:
    Image.new("RGB", (1, 1), color).save(tmp_path / "label.png")
    ((found,),) = _two_classes(tmp_path / "label.png", kind="color", colors=COLORS, tolerance=tolerance, other="ignore")
    distances = [np.abs(np.subtract(color, entry["color"])) for entry in COLORS]
    nearest = int(np.argmin([(distance**2).sum() for distance in distances]))
    assert found == (nearest if distances[nearest].max() <= tolerance else 255)


def test_ids_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "label.tif").write_bytes(tiff(np.array([[[-1], [70_000]]], np.int32), 2))
    with pytest.raises(UserError, match=r"label\.tif: has ids -1 to 70000; give ids from 0 to 65535"):
        _two_classes(tmp_path / "label.tif")
    (tmp_path / "label.tif").write_bytes(tiff(np.array([[[0.0], [1.0]]], np.float32), 3))
    with pytest.raises(UserError, match="image mode F"):
        _two_classes(tmp_path / "label.tif")
