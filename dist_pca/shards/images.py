"""Image files: bounded before decoding, decoded whole so that damage shows, their bytes kept where they can be."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageFile

from dist_pca.errors import UserError

MAX_PIXELS = 178_956_970
"""Images above this many pixels are refused before decoding: half a gigabyte of RGB."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
MEMBER_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of image members in shards; of several, the first counts."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

ImageFormat = Literal["keep", "jpg", "png", "webp"]


@dataclass(frozen=True)
class Encoding:
    """How images are stored: format, quality of lossy formats (1 to 100), longest edge in pixels (None: as it is)."""

    image_format: ImageFormat = "keep"
    quality: int = 90
    max_edge: int | None = None


def open_image(path: Path) -> ImageFile.ImageFile:
    """Decode an image file, in the mode that it is stored in.

    Raises:
        UserError: it is not an image of a known format, has more than `MAX_PIXELS`, or is damaged.
    """
    image = open_header(path)
    try:
        decode_pixels(image)
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; copy the file again, or leave it out with --exclude or --on-error skip"
        ) from error
    return image


def open_header(path: Path) -> ImageFile.ImageFile:
    """Open an image file without decoding its pixels; errors as in `open_image`."""
    try:
        return decode_header(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}; replace it, or leave it out with --exclude or --on-error skip") from error


def decode_header(source: Path | IO[bytes], formats: tuple[str, ...] = _FORMATS) -> ImageFile.ImageFile:
    """Read an image's format and size, not its pixels.

    Raises:
        ValueError: it is not an image of one of the formats, or has more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats)
        pixels = image.width * image.height
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception as error:  # decoders meet damage with whatever happens to fail first
        raise ValueError(f"unreadable image ({error})") from error
    if pixels > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels")
    return image


def decode_pixels(image: Image.Image) -> None:
    """Decode an image whose header has been read.

    Raises:
        ValueError: it is damaged.
    """
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"damaged image ({error})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB; 16-bit grey loses its low byte, where Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    # Pillow would copy an image that is in RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def stored_size(image: Image.Image, encoding: Encoding) -> tuple[int, int]:
    """Width and height that an image is stored in."""
    longest = max(image.size)
    if encoding.max_edge is None or longest <= encoding.max_edge:
        return image.size
    width, height = (max(1, round(edge * encoding.max_edge / longest)) for edge in image.size)
    return width, height


def encode_image(path: Path, image: Image.Image, encoding: Encoding) -> tuple[str, bytes]:
    """Extension and bytes that a decoded image is stored as: its file's own bytes where format and size may stay."""
    own = _EXTENSIONS.get(image.format or "")
    extension = (own or "png") if encoding.image_format == "keep" else encoding.image_format
    size = stored_size(image, encoding)
    if extension == own and size == image.size:
        return extension, path.read_bytes()
    rgb = as_rgb(image)
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if extension == "png":
        rgb.save(buffer, "PNG")
    else:
        rgb.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[extension], quality=encoding.quality)
    return extension, buffer.getvalue()
