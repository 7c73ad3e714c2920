"""Raw image files: which ones can be read, their decoding to upright 8-bit pictures, and their encoding in shards."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, TiffImagePlugin

from dist_pca.errors import UserError
from dist_pca.shards.band_files import BandFile, open_band_file
from dist_pca.shards.bands import NPY, BandImage, Picture, as_picture, encode_npy
from dist_pca.shards.sample import (
    MAX_PIXELS,
    TURNS,
    ImageTooLarge,
    UnknownRange,
    as_rgb,
    decode_header,
    decode_pixels,
    decode_rgb,
    is_deep,
    orientation,
    stated_maximum,
)

Image.init()
_RASTER_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF", "TGA"),
    *("DIB", "PCX", "PSD", "QOI", "SGI", "SUN", "DDS", "XBM"),
)
"""Formats of Pillow that hold one picture, without those that it hands to other programs or cannot decode."""
FILE_FORMATS = tuple(name for name in _RASTER_FORMATS if name in Image.OPEN)
"""Formats of raw image files that this installation of Pillow reads."""
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*FILE_FORMATS, "MPO"))
"""File name extensions of those formats, in lower case."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

_LEAVE_OUT = "leave it out with --exclude or --on-error skip"
_COPY = f"copy the file again, or {_LEAVE_OUT}"

ImageFormat = Literal["keep", "jpg", "png", "webp"]


@dataclass(frozen=True)
class Encoding:
    """Image encoding: format, quality of lossy formats (1 to 100), longest edge in pixels (None: unchanged), tiles."""

    image_format: ImageFormat = "keep"
    quality: int = 90
    max_edge: int | None = None
    tile: tuple[int, int] | None = None
    """Height and width of the tiles into which an image is cut; None stores it whole."""
    overlap: int = 0
    """Pixels that neighbouring tiles share."""


@dataclass(frozen=True)
class ValueRange:
    """Values that are black and white in images of more than 8 bits."""

    low: float
    high: float
    clip: bool = False
    """Whether values outside are taken as black and white; otherwise they are an error."""


@dataclass(frozen=True)
class Reading:
    """How image files are read."""

    values: tuple[ValueRange, ...] = ()
    """Range of images of more than 8 bits, one for all bands or one for each of `bands`; without any they must be
    16-bit of the full range, or 8-bit where `bands` is given."""
    bands: tuple[int, ...] | None = None
    """Numbers, from 1, of the bands that are kept, in this order; None converts images to RGB."""
    exact: bool = False
    """Whether a file must have as many bands as are kept."""

    @property
    def count(self) -> int:
        """Number of bands of what is read."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def suffixes(self) -> frozenset[str]:
        """File name extensions of what can be read, in lower case."""
        return SUFFIXES if self.bands is None else SUFFIXES | {f".{NPY}"}


AS_RGB = Reading()
"""Any image as RGB."""


def open_image(path: Path, reading: Reading = AS_RGB, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode an image file to an upright 8-bit picture: RGB, or of the bands that `reading` names.

    `format` of the result is the file's, or None if its bytes alone do not give this image.

    Args:
        path: The file.
        reading: Bands and range of values.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        UserError: it is not an image of a known format, has more than `max_pixels`, another range or not these bands,
            or is damaged.
    """
    try:
        if reading.bands is not None:
            return _open_bands(path, reading.bands, reading, max_pixels)
        image = open_header(path, max_pixels)
        if not reading.values or not is_deep(image):
            return decode_rgb(image)
        return as_rgb(_scaled(path, image, reading.values[0]))
    except UnknownRange as error:
        raise UserError(
            f"{path}: has {error}, neither 8-bit nor 16-bit of the full range; state which values are black and white "
            "as `range: [low, high]` in the recipe, or as --range for predictions"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {_COPY}") from error


def describe_file(path: Path, reading: Reading, max_pixels: int = MAX_PIXELS) -> tuple[str, int]:
    """Read a file's format and mode, such as `PNG RGB` or `TIFF 10 x uint16`, and its EXIF orientation, 1 to 8.

    Raises:
        UserError: it is not an image of a known format, or has more than `max_pixels`.
    """
    if reading.bands is not None:
        try:
            file = _band_file(path, max_pixels)
        except ValueError as error:
            raise UserError(f"{path}: {error}; replace it, or {_LEAVE_OUT}") from None
        if file is not None:
            return f"{file.kind} {file.bands} x {file.dtype}", file.orientation
    header = open_header(path, max_pixels)
    return f"{header.format} {header.mode}", orientation(header)


def open_unconverted(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a label file, upright and without converting its mode; errors as in `open_image`."""
    try:
        return decode_pixels(open_header(path, max_pixels))
    except ValueError as error:
        raise UserError(f"{path}: {error}; {_COPY}") from error


def open_header(path: Path, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Open an image file without decoding its pixels; errors as in `open_image`."""
    try:
        return decode_header(path, FILE_FORMATS, max_pixels)
    except ImageTooLarge as error:
        raise UserError(f"{path}: {error}; raise the bound with --max-pixels, or {_LEAVE_OUT}") from None
    except ValueError as error:
        reason = (path.is_file() and _tiff_bands(path)) or f"{error}; replace it"
        raise UserError(f"{path}: {reason}, or {_LEAVE_OUT}") from error


def sixteen_bit_channels(path: Path, image: Image.Image) -> npt.NDArray[np.uint16]:
    """All 16 bits of an image of several channels (height x width x channels), of which `image` has the high bytes.

    Raises:
        UserError: the format does not allow it.
    """
    # Decoding the file again as if it had the other byte order gives the low bytes.
    again = open_header(path, max_pixels=image.width * image.height)
    again.tile = [tile._replace(args=_other_byte_order(tile.args)) for tile in again.tile]
    unknown = UserError(f"{path}: the low bytes of several channels cannot be read from it; convert it to RGB as PNG")
    if again.tile[0].codec_name not in ("zip", "raw", "libtiff"):
        raise unknown
    try:
        low = np.asarray(decode_pixels(again))
    except ValueError:
        raise unknown from None
    values: npt.NDArray[np.uint16] = np.asarray(image).astype(np.uint16) << 8 | low
    return values


def stored_size(image: Picture, encoding: Encoding) -> tuple[int, int]:
    """Width and height at which an image is stored."""
    longest = max(image.size)
    if encoding.max_edge is None or longest <= encoding.max_edge:
        return image.size
    width, height = (max(1, round(edge * encoding.max_edge / longest)) for edge in image.size)
    return width, height


def tile_boxes(size: tuple[int, int], encoding: Encoding) -> list[tuple[int, int, int, int]]:
    """Tiles of an image of a width and height as left, top, right, bottom, row by row; the last ones end at its edge.

    Every pixel is in a tile, and all tiles have the same size unless the image is smaller.
    """
    if encoding.tile is None:
        return [(0, 0, *size)]
    height, width = encoding.tile
    return [
        (left, top, min(left + width, size[0]), min(top + height, size[1]))
        for top in _tile_starts(size[1], height, encoding.overlap)
        for left in _tile_starts(size[0], width, encoding.overlap)
    ]


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    last = max(0, length - tile)
    return [*range(0, last, tile - overlap), last]


def encode_image(path: Path, image: Picture, encoding: Encoding) -> tuple[str, bytes]:
    """Extension and bytes as which an image is stored; the file's own bytes if format and size are kept.

    Images of other than three bands are stored without loss, whatever the encoding's format.

    Args:
        path: The image's file.
        image: Result of `open_image`, or a part of it.
        encoding: How it is to be stored.
    """
    own = _EXTENSIONS.get(image.format or "")
    extension = (own or "png") if encoding.image_format == "keep" else encoding.image_format
    size = stored_size(image, encoding)
    if extension == own and size == image.size:
        return extension, path.read_bytes()
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if isinstance(image, BandImage):
        return NPY, encode_npy(image)
    buffer = io.BytesIO()
    if extension == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[extension], quality=encoding.quality)
    return extension, buffer.getvalue()


def _open_bands(path: Path, wanted: tuple[int, ...], reading: Reading, max_pixels: int) -> Picture:
    """Decode some bands of a file to an upright 8-bit picture.

    Raises:
        UserError: it does not have these bands, or they are not 8-bit and in no stated range.
        ValueError: it is damaged, or no image of one size and several bands.
    """
    file = _band_file(path, max_pixels)
    values = _pillow_bands(path, max_pixels) if file is None else file.read()
    there = values.shape[-1]
    if there < max(wanted) or (reading.exact and there != len(wanted)):
        named = f"wants {len(wanted)}" if reading.exact else f"names band {max(wanted)}"
        raise UserError(
            f"{path}: has {there} band{'s' * (there > 1)}, and `bands` of the recipe {named}; list bands that all "
            "files have, as `bands: [1, 2]`, or leave the file out with --exclude or --on-error skip"
        )
    ranges = reading.values if len(reading.values) > 1 else (reading.values or (None,)) * len(wanted)
    picture = as_picture(
        [_shades(path, values[..., band - 1], own, band) for band, own in zip(wanted, ranges, strict=True)]
    )
    turn = None if file is None else TURNS.get(file.orientation)
    return picture if turn is None else picture.transpose(turn)


def _band_file(path: Path, max_pixels: int) -> BandFile | None:
    file = open_band_file(path)
    if file is not None and file.size[0] * file.size[1] > max_pixels:
        raise ImageTooLarge(f"more than {max_pixels:,} pixels; raise the bound with --max-pixels")
    return file


def _pillow_bands(path: Path, max_pixels: int) -> npt.NDArray[Any]:
    """Values of a file in a format of Pillow as they are in the file, upright, height x width x bands."""
    image = open_header(path, max_pixels)
    if is_deep(image):
        values = _deep_values(path, image)[1]
    else:
        pixels = decode_pixels(image)
        if pixels.mode[0] == "P":
            pixels = pixels.convert("RGBA" if pixels.has_transparency_data else "RGB")
        values = np.asarray(pixels.convert("L") if pixels.mode == "1" else pixels)
    return values if values.ndim == 3 else values[..., np.newaxis]


def _deep_values(path: Path, image: ImageFile.ImageFile) -> tuple[Image.Image, npt.NDArray[Any]]:
    """Decode a deep image: as Pillow does it, and with all bits, height x width if it has one channel.

    Raises:
        UserError: the low bytes of its channels cannot be read.
        ValueError: it is damaged.
    """
    stated = stated_maximum(image)
    pixels = decode_pixels(image)
    values: npt.NDArray[Any] = np.asarray(pixels) if pixels.mode[0] in "IF" else sixteen_bit_channels(path, pixels)
    # Pillow has scaled values whose maximum is stated to 16 bits.
    return pixels, values if stated is None else np.rint(values * (stated / 65535))


def _scaled(path: Path, image: ImageFile.ImageFile, wanted: ValueRange) -> Image.Image:
    """Decode a deep image to 8 bits, the range's low end black and its high end white, and leave its alpha as it is.

    Raises:
        UserError: there are values outside the range, or that are not numbers.
        ValueError: the file is damaged.
    """
    pixels, values = _deep_values(path, image)
    if values.ndim == 2:
        return _shades(path, values, wanted)
    channels = zip(pixels.getbands(), pixels.split(), np.moveaxis(values, -1, 0), strict=True)
    return Image.merge(
        pixels.mode, [own if name in "aAX" else _shades(path, deep, wanted) for name, own, deep in channels]
    )


def _shades(path: Path, values: npt.NDArray[Any], wanted: ValueRange | None, band: int | None = None) -> Image.Image:
    """Scale one band, height x width, to an 8-bit grey image; values of 8 bits stay as they are.

    Raises:
        UserError: there are values outside the range, or that are not numbers, or there is no range.
    """
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values))
    where = "" if band is None else f" in band {band}"
    if values.dtype.kind not in "biuf":
        raise UserError(f"{path}: has values of type {values.dtype}{where}; store them as integers or floats")
    low, high = float(values.min()), float(values.max())
    if wanted is None:
        raise UserError(
            f"{path}: has values {low:g} to {high:g} of type {values.dtype}{where}, not of 8 bits; state which values "
            "are black and white as `range: [low, high]` in the recipe, or as a list of such pairs, one for each band"
        )
    if np.isnan(low):
        raise UserError(f"{path}: has values that are not numbers (NaN){where}; replace them or leave the image out")
    if not wanted.clip and not wanted.low <= low <= high <= wanted.high:
        raise UserError(
            f"{path}: has values {low:g} to {high:g}{where} outside the recipe's range {wanted.low:g} to "
            f"{wanted.high:g}; widen the range, or add `clip: true` to the recipe to cut them off"
        )
    share = (values.astype(np.float64) - wanted.low) / (wanted.high - wanted.low)
    return Image.fromarray(np.rint(share.clip(0, 1) * 255).astype(np.uint8))


def _other_byte_order(arguments: Any) -> Any:
    """Decoder arguments of a tile whose raw mode, such as RGB;16B, has the other byte order."""
    if isinstance(arguments, tuple):
        return (_other_byte_order(arguments[0]), *arguments[1:])
    little = np.little_endian if str(arguments)[-1] == "N" else str(arguments)[-1] == "L"
    return f"{str(arguments)[:-1]}{'B' if little else 'L'}"


def _tiff_bands(path: Path) -> str | None:
    """Why Pillow does not read a TIFF, in terms of bands and bits; None if it is not one, or if that is not why."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head[:4] not in (b"II*\0", b"MM\0*"):
                return None
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(tags.next)
            tags.load(file)
            bands, bits = int(tags.get(277, 1)), tags.get(258, (1,))
    except Exception:  # a damaged file, which is reported as such
        return None
    return (
        f"is a TIFF of {bands} bands of {bits[0]} bits, not of grey or RGB, with or without alpha, of 8 or 16 bits; "
        "name the bands to keep as `bands` in the recipe"
    )
