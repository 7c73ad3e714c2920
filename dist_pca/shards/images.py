"""Raw image files: detect damage by a full decode, and keep their bytes if possible."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageFile

from dist_pca.errors import UserError
from dist_pca.shards.sample import as_rgb, decode_header, decode_pixels

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

ImageFormat = Literal["keep", "jpg", "png", "webp"]


@dataclass(frozen=True)
class Encoding:
    """Image encoding: format, quality of lossy formats (1 to 100), longest edge in pixels (None: unchanged)."""

    image_format: ImageFormat = "keep"
    quality: int = 90
    max_edge: int | None = None


def open_image(path: Path) -> ImageFile.ImageFile:
    """Decode an image file without converting its mode.

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


def stored_size(image: Image.Image, encoding: Encoding) -> tuple[int, int]:
    """Width and height at which an image is stored."""
    longest = max(image.size)
    if encoding.max_edge is None or longest <= encoding.max_edge:
        return image.size
    width, height = (max(1, round(edge * encoding.max_edge / longest)) for edge in image.size)
    return width, height


def encode_image(path: Path, image: Image.Image, encoding: Encoding) -> tuple[str, bytes]:
    """Extension and bytes as which a decoded image is stored; the file's own bytes if format and size are kept."""
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
