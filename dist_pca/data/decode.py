"""Decode samples from possibly untrusted shards: only known extensions, and only up to a size limit."""

import io
from typing import Any

from PIL import Image

from dist_pca.errors import CorruptSample
from dist_pca.shards.sample import (
    IMAGE_FORMATS,
    LABEL_FORMATS,
    ImageTooLarge,
    as_rgb,
    check_label_mode,
    decode_header,
    decode_pixels,
    image_member,
)


def decode_sample(
    sample: dict[str, Any], *, label_member: str | None, enough: tuple[int, int] | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """Decode the image of a sample to RGB, and its label image (8-bit train ids) if `label_member` is given.

    Members with other extensions are never decoded.

    Args:
        sample: Result of `ShardReader.read`.
        label_member: Extension of the label to decode; the sample must have it.
        enough: Minimum (height, width): a JPEG may be decoded at a half, a quarter or an eighth of its size, if the
            result is at least this large.

    Raises:
        CorruptSample: the image or label is missing, damaged, of an unknown format, larger than `MAX_PIXELS` pixels or
            of another size than in the manifest; the message names shard and key.
    """
    where = f"{sample['__url__']}: sample {sample['__key__']!r}"
    try:
        member = image_member(sample, None)
    except ValueError as error:
        raise CorruptSample(f"{where}: {error}; build the shards again") from None
    image = _decode(sample[member], f"{where}: {member}", IMAGE_FORMATS, sample["__size__"], enough)
    if label_member is None:
        return as_rgb(image), None
    if label_member not in sample:
        raise CorruptSample(f"{where}: no {label_member}, although the manifest lists labels; build the shards again")
    label = _decode(sample[label_member], f"{where}: {label_member}", LABEL_FORMATS, sample["__size__"], None)
    try:
        check_label_mode(label)
    except ValueError as error:
        raise CorruptSample(f"{where}: {label_member}: {error}; build the shards again") from None
    return as_rgb(image), label


def _decode(
    content: bytes, where: str, formats: tuple[str, ...], size: tuple[int, int], enough: tuple[int, int] | None
) -> Image.Image:
    try:
        image = decode_header(io.BytesIO(content), formats)
    except ImageTooLarge as error:
        raise CorruptSample(f"{where}: {error}; build the shards again with --max-edge") from None
    except ValueError as error:
        raise CorruptSample(f"{where}: {error}; build the shards again") from error
    if (image.height, image.width) != size:
        raise CorruptSample(
            f"{where}: {image.height} x {image.width} pixels where the manifest lists {size[0]} x {size[1]}; "
            "build the shards again"
        )
    try:
        decode_pixels(image, enough)
    except ValueError as error:
        raise CorruptSample(f"{where}: {error}; copy the shard again or build it again") from error
    return image
