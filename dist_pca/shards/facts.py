"""What an encoded member of a shard is: an image's size and bands, and a label's pixels of each class."""

import io

import numpy as np

from dist_pca.classes import IGNORE_INDEX
from dist_pca.shards.bands import npy_shape
from dist_pca.shards.sample import (
    IMAGE_FORMATS,
    LABEL_FORMATS,
    ORIENTATION_MARKS,
    check_label_mode,
    decode_header,
    decode_pixels,
    decode_rgb,
    is_deep,
    is_npy,
    upright_size,
)


def image_shape(content: bytes, member: str, *, whole: bool) -> tuple[int, int, int]:
    """Height, width and bands of an encoded image member when upright; if `whole`, all of it is decoded.

    Raises:
        ValueError: it is not a JPEG, PNG or WebP image, nor an array if its extension is `npy`, or it is too large, or
            damaged, or neither 8-bit nor 16-bit of the full range.
    """
    if is_npy(member):
        return npy_shape(content)
    image = decode_header(io.BytesIO(content), IMAGE_FORMATS)
    if whole or is_deep(image):
        width, height = decode_rgb(image).size
    elif image.format == "PNG" and not any(mark in content for mark in ORIENTATION_MARKS):
        # In a PNG the orientation may follow the pixels, so that Pillow decodes all of them to find it.
        width, height = image.size
    else:
        width, height = upright_size(image)
    return height, width, 3


def label_counts(content: bytes, size: tuple[int, int], classes: int) -> list[int]:
    """Count the pixels of each class in an encoded label.

    Args:
        content: The label, an 8-bit PNG of train ids.
        size: Required width and height.
        classes: Number of classes.

    Raises:
        ValueError: it is not such a label, or has a value that is neither a class nor ignore.
    """
    label = decode_pixels(decode_header(io.BytesIO(content), LABEL_FORMATS))
    check_label_mode(label)
    if label.size != size:
        turned = " when upright, which labels keep to" if label.size == size[::-1] else ""
        raise ValueError(f"{label.width} x {label.height} pixels where the image has {size[0]} x {size[1]}{turned}")
    counts = np.bincount(np.asarray(label).ravel(), minlength=256)
    unknown = [value for value in counts.nonzero()[0].tolist() if value >= classes and value != IGNORE_INDEX]
    if unknown:
        listed = ", ".join(map(str, unknown[:5]))
        pixels = counts[unknown].sum()
        raise ValueError(f"label values outside the {classes} classes: {listed}, {pixels} pixels")
    found: list[int] = counts[:classes].tolist()
    return found
