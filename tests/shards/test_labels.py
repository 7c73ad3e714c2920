import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from dist_pca.classes import ClassInfo
from dist_pca.errors import UserError
from dist_pca.shards.labels import TrainIds, encode_label, lookup_table, read_label
from dist_pca.shards.recipe import Coding
from tests.support.raw_data import palette_image, png16

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
