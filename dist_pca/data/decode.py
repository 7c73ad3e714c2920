"""Decoding samples from shards that anyone may have made: named extensions only, and only up to a bounded size."""

import io
import warnings
from typing import Any

from PIL import Image

from dist_pca.errors import UserError
from dist_pca.shards.images import MAX_PIXELS, as_rgb

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION = "label.png"


def decode_sample(sample: dict[str, Any], *, labelled: bool) -> tuple[Image.Image, Image.Image | None]:
    """The image of a sample in RGB, and its label image (8-bit train ids) where `labelled`.

    Members with other extensions are never looked into.

    Args:
        sample: As `ShardReader.read` gives it.
        labelled: Whether to decode a label, which must then be there.

    Raises:
        UserError: the image or label is missing, damaged, of an unknown format, larger than `MAX_PIXELS` pixels or of
            another size than the manifest says; shard and key are named.
    """
    where = f"{sample['__url__']}: sample {sample['__key__']!r}"
    found = [extension for extension in IMAGE_EXTENSIONS if extension in sample]
    if not found:
        raise UserError(f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}); build the shards again")
    image = _decode(sample[found[0]], f"{where}: {found[0]}", ("JPEG", "PNG", "WEBP"), sample["__size__"])
    if not labelled:
        return as_rgb(image), None
    if LABEL_EXTENSION not in sample:
        raise UserError(f"{where}: no {LABEL_EXTENSION} in shards that count as labelled; build the shards again")
    label = _decode(sample[LABEL_EXTENSION], f"{where}: {LABEL_EXTENSION}", ("PNG",), sample["__size__"])
    if label.mode not in ("L", "P"):
        raise UserError(f"{where}: {LABEL_EXTENSION}: mode {label.mode}, not 8-bit train ids; build the shards again")
    return as_rgb(image), label


def _decode(content: bytes, where: str, formats: tuple[str, ...], size: tuple[int, int]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=formats)
        pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception as error:  # decoders meet damage with whatever happens to fail first
        raise UserError(f"{where}: unreadable ({error}); build the shards again") from error
    if pixels > MAX_PIXELS:
        raise UserError(f"{where}: more than {MAX_PIXELS:,} pixels; build the shards again with --max-edge")
    if (image.height, image.width) != size:
        raise UserError(
            f"{where}: {image.height} x {image.width} pixels where the manifest says {size[0]} x {size[1]}; "
            "build the shards again"
        )
    try:
        image.load()
    except Exception as error:
        raise UserError(f"{where}: damaged ({error}); copy the shard again or build it again") from error
    return image
