"""Images of any number of bands: as pictures beside Pillow's, as `.npy` members of shards, and as RGB to be shown."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format
from PIL import Image

NPY = "npy"
"""Extension of members that hold images of other than three bands: uint8, height x width x bands, as NumPy saves it."""
MAX_BANDS = 1000
"""Most bands of an image."""
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BandImage:
    """An image of other than three bands, with those methods of Pillow's images that both are used by.

    `np.asarray` gives height x width x bands.
    """

    bands: tuple[Image.Image, ...]
    """One 8-bit grey image for each band, all of one size."""
    format: None = None
    """No file's own bytes are this image."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.bands[0].size

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.size[1]

    def getbands(self) -> tuple[str, ...]:
        """Names of the bands, which are their numbers from 1."""
        return tuple(str(number) for number in range(1, len(self.bands) + 1))

    def getextrema(self) -> tuple[tuple[float, float], ...]:
        """Lowest and highest value of each band."""
        return tuple(band.getextrema() for band in self.bands)  # type: ignore[misc]

    def crop(self, box: tuple[int, int, int, int]) -> "BandImage":
        """Copy the part between left, top, right and bottom."""
        return BandImage(tuple(band.crop(box) for band in self.bands))

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling,
        box: tuple[float, float, float, float] | None = None,
    ) -> "BandImage":
        """Resize the part inside `box`, or all of it, to a width and height."""
        return BandImage(tuple(band.resize(size, resample, box) for band in self.bands))

    def transpose(self, method: Image.Transpose) -> "BandImage":
        """Turn or mirror it."""
        return BandImage(tuple(band.transpose(method) for band in self.bands))

    def convert(self, mode: str) -> Image.Image:
        """Convert what is shown of it, the first three bands or the first, to a mode of Pillow."""
        chosen = [self.bands[index] for index in _shown_bands(len(self.bands))]
        return Image.merge("RGB", chosen).convert(mode)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        stacked: npt.NDArray[Any] = np.stack([np.asarray(band) for band in self.bands], axis=-1)
        return stacked if dtype is None else stacked.astype(dtype)


Picture = Image.Image | BandImage
"""An upright 8-bit image: RGB of Pillow, or of another number of bands."""


def as_picture(bands: Sequence[Image.Image]) -> Picture:
    """Join 8-bit grey images of one size as bands; three of them become an RGB image."""
    return Image.merge("RGB", list(bands)) if len(bands) == 3 else BandImage(tuple(bands))


def shown(pixels: Pixels) -> Pixels:
    """Select RGB to look at, ... x 3, from pixels ... x bands: the first three bands, or the first as grey."""
    return pixels if pixels.shape[-1] == 3 else pixels[..., _shown_bands(pixels.shape[-1])]


def encode_npy(image: BandImage) -> bytes:
    """Encode an image as height x width x bands in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(image))
    return buffer.getvalue()


def decode_npy(content: bytes) -> Picture:
    """Decode an image from NumPy's format; nothing in it is executed.

    Raises:
        ValueError: it is not an array of uint8, height x width or height x width x bands.
    """
    pixels = _npy_pixels(content)
    return as_picture([Image.fromarray(pixels[..., index]) for index in range(pixels.shape[-1])])


def npy_shape(content: bytes) -> tuple[int, int, int]:
    """Height, width and bands of an image in NumPy's format; errors as in `decode_npy`."""
    height, width, bands = _npy_pixels(content).shape
    return height, width, bands


def _npy_pixels(content: bytes) -> Pixels:
    file = io.BytesIO(content)
    try:
        readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        shape, column_major, dtype = readers[npy_format.read_magic(file)](file)
    except Exception as error:  # NumPy parses the header as Python, which fails in many ways
        raise ValueError(f"unreadable array ({error})") from error
    shape = (*shape, 1) if len(shape) == 2 else shape
    if dtype != np.uint8 or len(shape) != 3 or not 1 <= shape[-1] <= MAX_BANDS or 0 in shape:
        raise ValueError(f"an array of {dtype} of shape {shape}, not of uint8 of height x width x bands")
    size = len(content) - file.tell()
    if size != shape[0] * shape[1] * shape[2]:
        raise ValueError(f"damaged array ({size} bytes for a shape of {shape})")
    return np.frombuffer(content, np.uint8, offset=file.tell()).reshape(shape, order="F" if column_major else "C")


def _shown_bands(count: int) -> list[int]:
    return [0, 1, 2] if count >= 3 else [0, 0, 0]
