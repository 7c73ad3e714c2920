"""Decode samples from possibly untrusted shards: only known extensions, and only up to a size limit."""

import io
import warnings
from typing import Any

from PIL import Image

from dist_pca.errors import CorruptSample
from dist_pca.shards.images import MAX_PIXELS, MEMBER_EXTENSIONS, as_rgb


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
    found = [extension for extension in MEMBER_EXTENSIONS if extension in sample]
    if not found:
        raise CorruptSample(f"{where}: no image ({', '.join(MEMBER_EXTENSIONS)}); build the shards again")
    image = _decode(sample[found[0]], f"{where}: {found[0]}", ("JPEG", "PNG", "WEBP"), sample["__size__"], enough)
    if label_member is None:
        return as_rgb(image), None
    if label_member not in sample:
        raise CorruptSample(f"{where}: no {label_member}, although the manifest lists labels; build the shards again")
    label = _decode(sample[label_member], f"{where}: {label_member}", ("PNG",), sample["__size__"], None)
    if label.mode not in ("L", "P"):
        raise CorruptSample(f"{where}: {label_member}: mode {label.mode}, not 8-bit train ids; build the shards again")
    return as_rgb(image), label


def _decode(
    content: bytes, where: str, formats: tuple[str, ...], size: tuple[int, int], enough: tuple[int, int] | None
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=formats)
        pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception as error:  # damaged files make decoders raise exceptions of any type
        raise CorruptSample(f"{where}: unreadable ({error}); build the shards again") from error
    if pixels > MAX_PIXELS:
        raise CorruptSample(f"{where}: more than {MAX_PIXELS:,} pixels; build the shards again with --max-edge")
    if (image.height, image.width) != size:
        raise CorruptSample(
            f"{where}: {image.height} x {image.width} pixels where the manifest lists {size[0]} x {size[1]}; "
            "build the shards again"
        )
    try:
        if enough is not None:
            image.draft(None, (enough[1], enough[0]))
        image.load()
    except Exception as error:
        raise CorruptSample(f"{where}: damaged ({error}); copy the shard again or build it again") from error
    return image
