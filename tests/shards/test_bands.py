import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dist_pca.shards.bands import BandImage, as_picture, decode_npy, encode_npy, npy_shape, shown

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 5), dtype=np.uint8)


def picture(pixels: npt.NDArray[np.uint8] = PIXELS) -> BandImage:
    found = as_picture([Image.fromarray(pixels[..., band]) for band in range(pixels.shape[-1])])
    assert isinstance(found, BandImage)
    return found


def saved(array: npt.NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_an_array_is_decoded_as_it_was_encoded_and_numpy_reads_it() -> None:
    content = encode_npy(picture())
    assert np.array_equal(np.load(io.BytesIO(content)), PIXELS)
    assert np.array_equal(np.asarray(decode_npy(content)), PIXELS)
    assert npy_shape(content) == (12, 20, 5)


@pytest.mark.parametrize("array", [PIXELS[..., 0], np.asfortranarray(PIXELS), PIXELS[..., :1], PIXELS[..., :3]])
def test_arrays_of_other_writers_are_read_whatever_their_order(array: npt.NDArray[np.uint8]) -> None:
    assert np.array_equal(np.asarray(decode_npy(saved(array))), array.reshape(12, 20, -1))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "unreadable array"),
        (b"\x93NUMPY\x01\x00\x05\x00{a: 1", "unreadable array"),
        (saved(PIXELS.astype(np.float32)), "an array of float32"),
        (saved(np.array([{}], dtype=object)), "an array of object"),
        (saved(PIXELS[np.newaxis]), r"of shape \(1, 12, 20, 5\)"),
        (saved(PIXELS[:0]), r"of shape \(0, 20, 5\)"),
        (saved(np.zeros((1, 1, 1001), np.uint8)), r"of shape \(1, 1, 1001\)"),
        (encode_npy(picture())[:-1], r"damaged array \(1199 bytes for a shape of \(12, 20, 5\)\)"),
        (encode_npy(picture()).replace(b"(12, 20, 5)", b"(9999999999, 99, 5)"), "array"),
    ],
)
def test_what_is_no_array_of_bytes_is_refused(content: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        decode_npy(content)


def test_each_band_is_resized_cropped_and_turned_as_a_grey_image_is() -> None:
    part = (1.5, 2, 17, 11.25)
    resized = np.asarray(picture().resize((9, 6), Image.Resampling.BICUBIC, part))
    cropped = np.asarray(picture().crop((2, 3, 9, 8)))
    turned = np.asarray(picture().transpose(Image.Transpose.ROTATE_90))
    for band in range(5):
        grey = Image.fromarray(PIXELS[..., band])
        assert np.array_equal(resized[..., band], np.asarray(grey.resize((9, 6), Image.Resampling.BICUBIC, part)))
    assert np.array_equal(cropped, PIXELS[3:8, 2:9])
    assert np.array_equal(turned, np.rot90(PIXELS))


@pytest.mark.parametrize(("bands", "seen"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_the_first_three_bands_are_shown_or_the_first_as_grey(bands: int, seen: list[int]) -> None:
    pixels = PIXELS[..., :bands]
    assert np.array_equal(shown(pixels), PIXELS[..., seen])
    found = as_picture([Image.fromarray(pixels[..., band]) for band in range(bands)])
    assert np.array_equal(np.asarray(found.convert("RGB")), PIXELS[..., seen])
