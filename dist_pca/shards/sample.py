"""Read one sample, from trusted or untrusted shards: its slice of the tar, its members, and their images.

Nothing is extracted to disk. Members are identified by their extension alone, and images are limited in size before
they are decoded.
"""

import io
import os
import re
import tarfile
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile

from dist_pca.classes import IGNORE_INDEX
from dist_pca.shards.manifest import Manifest, Shard

MAX_PIXELS = 178_956_970
"""Images above this many pixels are refused before decoding: half a gigabyte of RGB."""
MEMBER_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of image members in shards; if a sample has several, the first in this order is used."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats of image members."""
LABEL_FORMATS = ("PNG",)
"""Formats of label members."""
FILE_FORMATS = (*IMAGE_FORMATS, "BMP", "TIFF", "PPM")
"""Formats of raw image files."""

HEADER_ERRORS = (ValueError, OverflowError, RecursionError)
"""What tarfile raises for numbers in headers that are none or too large, and for headers nested too deeply."""
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_PLAIN_HEADER = re.compile(
    rb"([\0 -~]{100})"  # name
    rb"(?:[0-7]{7}[\0 ]){3}"  # mode, user, group
    rb"([0-7]{11})[\0 ]"  # size
    rb"[0-7]{11}[\0 ]"  # time
    rb"([0-7]{6})\0 "  # checksum
    rb"0\0{100}"  # a regular file, so no link's target
    rb"ustar(?:\x0000|  \0).{64}"  # names of user and group
    rb"(?:[0-7]{7}\0|\0{8}){2}"  # device
    rb"\0{155}.{12}",  # no prefix to the name
    re.DOTALL,
)


class ImageTooLarge(ValueError):
    """Raised for an image of more than `MAX_PIXELS`."""


def read_sample(manifest: Manifest, shard: Shard, index: int) -> dict[str, bytes]:
    """Read one sample's members by extension (`png`, `label.png`, `json`, ...), and no other byte of the shard.

    Raises:
        OSError: the shard cannot be read.
        tarfile.TarError: the shard is truncated, or there is no tar at the sample's offset.
    """
    with (manifest.folder / shard.name).open("rb") as file:
        return members_of(read_slice(file.fileno(), shard, index), shard.keys[index])


def read_slice(descriptor: int, shard: Shard, index: int) -> bytes:
    """Read one sample's headers and blocks from an open shard.

    Raises:
        OSError: the shard cannot be read.
        tarfile.ReadError: the shard ends inside the sample.
    """
    content = os.pread(descriptor, shard.lengths[index], shard.offsets[index])
    if len(content) < shard.lengths[index]:
        raise tarfile.ReadError("the shard ends inside it")
    return content


def members_of(content: bytes, key: str) -> dict[str, bytes]:
    """Read the contents of a sample's members, by extension in lower case.

    Only regular, non-sparse files whose names begin with the key and a dot are returned.

    Args:
        content: The sample's headers and blocks, without an end mark.
        key: The sample's key.

    Raises:
        tarfile.TarError: the bytes are not a tar, or a member extends beyond them; the message names the member.
    """
    found = _plain_members(content)
    if found is None:
        found = _tar_members(content)
    prefix = f"{key}."
    return {name.removeprefix(prefix).lower(): value for name, value in found if name.startswith(prefix)}


def image_member(members: Collection[str], label_member: str | None) -> str:
    """Find the extension of a sample's image member.

    Raises:
        ValueError: there is no image member, or it is the label member.
    """
    found = next((extension for extension in MEMBER_EXTENSIONS if extension in members), None)
    if found is None:
        raise ValueError(f"no image ({', '.join(MEMBER_EXTENSIONS)})")
    if found == label_member:
        raise ValueError(f"no image beside the labels in {label_member}")
    return found


def decode_header(source: Path | IO[bytes], formats: tuple[str, ...] = FILE_FORMATS) -> ImageFile.ImageFile:
    """Read an image's format and size, not its pixels.

    Raises:
        ImageTooLarge: it has more than `MAX_PIXELS`.
        ValueError: it is not an image of one of the formats.
    """
    # A named pipe would be waited for.
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source, formats=formats)
        pixels = image.width * image.height
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception as error:  # damaged files make decoders raise exceptions of any type
        raise ValueError(f"unreadable image ({error})") from error
    if pixels > MAX_PIXELS:
        raise ImageTooLarge(f"more than {MAX_PIXELS:,} pixels")
    return image


def decode_pixels(image: Image.Image, minimum_size: tuple[int, int] | None = None) -> None:
    """Decode an image whose header has been read.

    Args:
        image: Result of `decode_header`.
        minimum_size: Height and width; a JPEG may be decoded at a half, a quarter or an eighth of its size, if the
            result is at least this large. None decodes it at its full size.

    Raises:
        ValueError: it is damaged.
    """
    try:
        if minimum_size is not None:
            image.draft(None, (minimum_size[1], minimum_size[0]))
        image.load()
    except Exception as error:
        raise ValueError(f"damaged image ({error})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB; of 16-bit grey the high byte is kept, where Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    # Image.convert copies even an image that is in RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(content: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Decode an image or label member at its full size; errors as in `decode_header` and `decode_pixels`."""
    image = decode_header(io.BytesIO(content), formats)
    decode_pixels(image)
    return image


def check_label_mode(label: Image.Image) -> None:
    """Check that a label image has one 8-bit value per pixel.

    Raises:
        ValueError: it has another mode.
    """
    if label.mode not in ("L", "P"):
        raise ValueError(f"mode {label.mode}, not 8-bit train ids")


def image_size(source: IO[bytes], *, whole: bool) -> tuple[int, int]:
    """Width and height of an encoded image member; if `whole`, all of it is decoded.

    Raises:
        ValueError: it is not a JPEG, PNG or WebP image, is too large, or is damaged.
    """
    image = decode_header(source, IMAGE_FORMATS)
    if whole:
        decode_pixels(image)
    return image.size


def label_counts(source: IO[bytes], size: tuple[int, int], classes: int) -> list[int]:
    """Count the pixels of each class in an encoded label.

    Args:
        source: The label, an 8-bit PNG of train ids.
        size: Required width and height.
        classes: Number of classes.

    Raises:
        ValueError: it is not such a label, or has a value that is neither a class nor ignore.
    """
    label = decode_header(source, LABEL_FORMATS)
    check_label_mode(label)
    if label.size != size:
        raise ValueError(f"{label.width} x {label.height} pixels where the image has {size[0]} x {size[1]}")
    decode_pixels(label)
    counts = np.bincount(np.asarray(label).ravel(), minlength=256)
    unknown = [value for value in counts.nonzero()[0].tolist() if value >= classes and value != IGNORE_INDEX]
    if unknown:
        listed = ", ".join(map(str, unknown[:5]))
        pixels = counts[unknown].sum()
        raise ValueError(f"label values outside the {classes} classes: {listed}, {pixels} pixels")
    found: list[int] = counts[:classes].tolist()
    return found


def _plain_members(content: bytes) -> list[tuple[str, bytes]] | None:
    """Names and contents in a tar of regular files with short ASCII names, which is how `writer` writes shards.

    None for any other or damaged tar; `tarfile` handles those, but is several times slower.
    """
    members = []
    offset = 0
    while offset < len(content):
        header = content[offset : offset + tarfile.BLOCKSIZE]
        fields = _PLAIN_HEADER.fullmatch(header)
        if fields is None:
            return None
        name, size, checksum = fields[1].partition(b"\0")[0], int(fields[2], 8), int(fields[3], 8)
        start = offset + tarfile.BLOCKSIZE
        # By definition the checksum treats its own eight bytes as blanks.
        if start + size > len(content) or sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
            return None
        members.append((name.decode("ascii"), content[start : start + size]))
        offset = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return members


def _tar_members(content: bytes) -> list[tuple[str, bytes]]:
    members = []
    where = "its first header"
    try:
        # Mode "r:" refuses compression, and `issparse` excludes sparse files: neither may expand a few bytes to many.
        with tarfile.open(fileobj=io.BytesIO(content + _END_OF_ARCHIVE), mode="r:") as archive:
            for member in archive:
                where = f"member {member.name[:80]!r}"
                # With negative sizes, some versions of `tarfile` move backwards and never end.
                if member.size < 0:
                    raise tarfile.ReadError("has a negative size")
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > len(content):
                        raise tarfile.ReadError("extends beyond the sample")
                    stream = archive.extractfile(member)
                    if stream is not None:
                        members.append((member.name, stream.read()))
                where = f"the header after {where}"
    except (OSError, tarfile.TarError, *HEADER_ERRORS) as error:
        raise tarfile.ReadError(f"{where}: {error}") from error
    return members
