from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_pca.data.augment import (
    Crop,
    apply_crop,
    check_crop,
    draw_crop,
)
from dist_pca.data.decode import resized_size
from dist_pca.data.randomness import Domain
from dist_pca.errors import UserError
from tests.support.shards import data_config, make_shards

SIZE = (60, 100)


def ramp() -> tuple[Image.Image, list[Image.Image]]:
    """An image whose red is twice the row and green twice the column, and labels that are the row and the column.

    Interpolation keeps straight ramps, so both must tell the same place after any resize.
    """
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.uint8)
    image = Image.fromarray(np.stack([2 * rows, 2 * columns, rows], axis=-1))
    return image, [Image.fromarray(rows), Image.fromarray(columns)]


crops = st.builds(
    lambda index, flip, seed: draw_crop(
        SIZE,
        data_config(shorter_edge=(40, 90), crop=(30, 50), flip=flip),
        seed=seed,
        domain="source",
        index=index,
    ),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2**32),
)


@given(crops)
def test_image_and_label_show_the_same_place(crop: Crop) -> None:
    image, labels = ramp()
    for channel, label in enumerate(labels):
        pixels, ids = apply_crop(image, label, crop)
        assert ids is not None
        assert (pixels.shape, ids.shape) == ((3, *crop.size), crop.size)
        assert (pixels.dtype, ids.dtype) == (np.uint8, np.uint8)
        assert np.abs(pixels[channel] / 2 - ids).max() <= 1


@given(crops)
def test_a_crop_is_a_window_of_the_whole_resized_image(crop: Crop) -> None:
    image, labels = ramp()
    height, width = crop.resized
    window = (slice(crop.top, crop.top + crop.size[0]), slice(crop.left, crop.left + crop.size[1]))
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)[window]
    for axis, label in enumerate(labels):
        pixels, ids = apply_crop(image, label, replace(crop, flip=False))
        assert np.abs(pixels.transpose(1, 2, 0) - whole).max() <= 1
        assert ids is not None
        # Half-pixel centres in whole numbers; a centre on the border of two pixels may take either.
        centre = (2 * np.mgrid[window][axis] + 1) * SIZE[axis]
        nearest, remainder = np.divmod(centre, 2 * crop.resized[axis])
        assert ((ids == nearest) | ((remainder == 0) & (ids == nearest - 1))).all()


@given(crops)
def test_a_flip_mirrors_image_and_label(crop: Crop) -> None:
    image, (label, _) = ramp()
    plain, mirrored = (apply_crop(image, label, replace(crop, flip=flip)) for flip in (False, True))
    for one, other in zip(plain, mirrored, strict=True):
        assert one is not None
        assert other is not None
        assert np.array_equal(one, other[..., ::-1])


@given(crops)
def test_a_crop_knows_how_many_columns_are_beside_it(crop: Crop) -> None:
    # Every column of the resized image has a value of its own.
    columns = np.arange(crop.resized[1], dtype=np.uint8)
    whole = columns[::-1] if crop.flip else columns
    shown, _ = apply_crop(Image.fromarray(np.tile(columns[:, None], (crop.resized[0], 1, 3))), None, crop)
    left, right = crop.beside
    assert np.array_equal(shown[0, 0], whole[left : len(whole) - right])


def test_an_image_without_label_is_cropped_alone() -> None:
    crop = Crop(resized=SIZE, top=10, left=20, size=(30, 40), flip=False)
    image, _ = ramp()
    pixels, label = apply_crop(image, None, crop)
    assert label is None
    assert np.array_equal(pixels, np.asarray(image)[10:40, 20:60].transpose(2, 0, 1))


def test_draws_cover_their_whole_range_and_nothing_else() -> None:
    config = data_config(shorter_edge=(30, 34), crop=(28, 48), flip=0.25)
    drawn = [draw_crop(SIZE, config, seed=0, domain="source", index=index) for index in range(4000)]
    assert {min(crop.resized) for crop in drawn} == {30, 31, 32, 33, 34}
    for edge in (30, 34):
        height, width = resized_size(SIZE, edge)
        places = [(crop.top, crop.left) for crop in drawn if crop.resized == (height, width)]
        assert {top for top, _ in places} == set(range(height - 28 + 1))
        assert {left for _, left in places} == set(range(width - 48 + 1))
    assert 0.22 < np.mean([crop.flip for crop in drawn]) < 0.28


def test_draws_depend_on_seed_domain_and_sample_index_alone() -> None:
    config = data_config(shorter_edge=(30, 90), crop=(28, 48))
    one = draw_crop(SIZE, config, seed=5, domain="source", index=9)
    assert draw_crop(SIZE, config, seed=5, domain="source", index=9) == one
    assert draw_crop(SIZE, config, seed=6, domain="source", index=9) != one
    assert draw_crop(SIZE, config, seed=5, domain="target", index=9) != one
    assert draw_crop(SIZE, config, seed=5, domain="source", index=10) != one


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), st.integers(1, 2000))
def test_resizing_sets_the_shorter_edge_and_keeps_proportions(size: tuple[int, int], edge: int) -> None:
    resized = resized_size(size, edge)
    assert min(resized) == edge
    assert abs(max(resized) - max(size) * edge / min(size)) <= 0.5


def test_a_crop_that_fits_nowhere_is_refused_with_the_image_that_is_too_small(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [2, 2])
    wide, narrow = manifest.shards
    manifest = replace(manifest, shards=(wide, replace(narrow, widths=[40, 30])))
    check_crop(manifest, data_config(shorter_edge=(48, 60), crop=(48, 60)), "target")
    with pytest.raises(UserError) as caught:
        check_crop(manifest, data_config(shorter_edge=(48, 60), crop=(48, 61)), "target")
    assert str(caught.value).startswith("data.crop: 48 x 61 does not fit")
    assert "'001-001' (24 x 30) measures 48 x 60 at a shorter edge of 48" in str(caught.value)


def test_a_crop_that_fits_the_targets_sizes_alone_is_refused_for_the_source_by_its_key(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path / "shards", [1])
    config = data_config(shorter_edge=(48, 60), source_shorter_edge=(40, 60), crop=(48, 60))
    check_crop(manifest, config, "target")
    with pytest.raises(UserError, match=r"shorter edge of 40; lower data\.crop or raise data\.source_shorter_edge$"):
        check_crop(manifest, config, "source")


@pytest.mark.parametrize(("domain", "edges"), [("source", {50, 51, 52, 53, 54}), ("target", {30, 31, 32, 33, 34})])
def test_each_domain_is_resized_to_its_own_range(domain: Domain, edges: set[int]) -> None:
    config = data_config(shorter_edge=(30, 34), source_shorter_edge=(50, 54), crop=(28, 48))
    drawn = {min(draw_crop(SIZE, config, seed=0, domain=domain, index=index).resized) for index in range(100)}
    assert drawn == edges
