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
from PIL import ExifTags, Image, ImageFile

from dist_pca.shards.bands import NPY, Picture, decode_npy
from dist_pca.shards.manifest import Manifest, Shard

MAX_PIXELS = 178_956_970
"""Images above this many pixels are refused before decoding: half a gigabyte of RGB."""
MEMBER_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of image members in shards; if a sample has several, the first in this order is used."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats of image members."""
LABEL_FORMATS = ("PNG",)
"""Formats of label members."""
Transpose = Image.Transpose
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""How an image is turned upright, by its EXIF orientation."""
_ORIENTATION_ENTRIES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Entries of `Image.info` in which Pillow finds an orientation, and chunks of a PNG that become them."""
ORIENTATION_MARKS = (b"eXIf", *(entry.encode() for entry in _ORIENTATION_ENTRIES))
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
    """Raised for an image with more pixels than allowed."""


class WrongSize(ValueError):
    """Raised for an image of another size than the manifest lists."""


class UnknownRange(ValueError):
    """Raised for an image that is neither 8-bit nor 16-bit of the full range, whose values could mean any shade."""


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


def image_member(members: Collection[str], label_member: str | None, wanted: str | None = None) -> str:
    """Find the extension of a sample's image member.

    Args:
        members: Extensions of the sample's members.
        label_member: Extension of the labels.
        wanted: Extension of the image; None is the first of `MEMBER_EXTENSIONS` that is there.

    Raises:
        ValueError: there is no image member, or it is the label member.
    """
    choice = MEMBER_EXTENSIONS if wanted is None else (wanted,)
    found = next((extension for extension in choice if extension in members), None)
    if found is None:
        seen = sorted(name for name in members if not name.startswith("__"))
        listed = ", ".join(name[:40] for name in seen[:8]) or "none"
        raise ValueError(f"no image ({', '.join(choice)}) among its members, which are {listed}")
    if found == label_member:
        raise ValueError(f"no image beside the labels in {label_member}")
    return found


def decode_header(
    source: Path | IO[bytes], formats: tuple[str, ...], max_pixels: int = MAX_PIXELS
) -> ImageFile.ImageFile:
    """Read an image's format and size, not its pixels.

    Raises:
        ImageTooLarge: it has more than `max_pixels`.
        ValueError: it is not an image of one of the formats.
    """
    # A named pipe would be waited for.
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")
    bound = Image.MAX_IMAGE_PIXELS
    if max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of damaged metadata
            image = Image.open(source, formats=formats)
        pixels = image.width * image.height
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.DecompressionBombError:
        pixels = max_pixels + 1
    except Exception as error:  # damaged files make decoders raise exceptions of any type
        raise ValueError(f"unreadable image ({error})") from error
    finally:
        Image.MAX_IMAGE_PIXELS = bound
    if pixels > max_pixels:
        raise ImageTooLarge(f"more than {max_pixels:,} pixels")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1 if it has none. The pixels of a PNG may be decoded to find it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ExifTags.Base.Orientation)
        return int(found) if found in TURNS else 1
    except Exception:  # viewers show an image whose EXIF data are damaged as it is stored
        return 1


def upright_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height of an image member when it is upright."""
    return image.size[::-1] if orientation(image) >= 5 else image.size


def decode_pixels(
    image: ImageFile.ImageFile, minimum_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode an image whose header has been read, and turn it upright as its EXIF orientation says.

    Args:
        image: Result of `decode_header`.
        minimum_size: Height and width; a JPEG may be decoded at a half, a quarter or an eighth of its size, if the
            result is at least this large. None decodes it at its full size.
        size: Height and width that the image must have; None if any will do.

    Raises:
        WrongSize: it has another size.
        ValueError: it is damaged.
    """
    _check_size(image.size if size is None else upright_size(image), size)
    try:
        if minimum_size is not None:
            image.draft(None, minimum_size if orientation(image) >= 5 else minimum_size[::-1])
        image.load()
        # A TIFF is upright once Pillow has loaded it, and has no orientation then.
        turn = TURNS.get(orientation(image))
        if turn is None:
            return image
        upright = image.transpose(turn)
    except Exception as error:
        raise ValueError(f"damaged image ({error})") from error
    upright.format = image.format
    for entry in _ORIENTATION_ENTRIES:
        upright.info.pop(entry, None)
    return upright


def _check_size(found: tuple[int, int], size: tuple[int, int] | None) -> None:
    """Compare a width and height with a height and width; None fits all."""
    if size is not None and found != size[::-1]:
        raise WrongSize(f"{found[1]} x {found[0]} pixels where the manifest lists {size[0]} x {size[1]}")


def decode_rgb(
    image: ImageFile.ImageFile, minimum_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode an image to upright 8-bit RGB; of 16 bits the high byte is kept. Arguments as for `decode_pixels`.

    Raises:
        WrongSize: it has another size.
        UnknownRange: it is neither 8-bit nor 16-bit of the full range.
        ValueError: it is damaged, or its colours cannot be converted.
    """
    deep, stated = is_deep(image), stated_maximum(image) is not None
    pixels = decode_pixels(image, minimum_size, size)
    try:
        rgb = as_rgb(_high_bytes(pixels, image.format, stated) if deep else pixels)
    except UnknownRange:
        raise
    except Exception as error:
        raise ValueError(f"mode {pixels.mode} cannot be converted to RGB ({error})") from error
    rgb.format = image.format
    return rgb


def is_npy(member: str) -> bool:
    """Whether a member of this extension, such as `npy` or `image.npy`, is an array."""
    return member.rpartition(".")[2] == NPY


def decode_image(
    content: bytes, member: str, minimum_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Picture:
    """Decode the image member of this extension, upright and of 8 bits; other arguments as for `decode_pixels`.

    Raises:
        ImageTooLarge: it has more than `MAX_PIXELS`.
        WrongSize: it has another size.
        UnknownRange: it is neither 8-bit nor 16-bit of the full range.
        ValueError: it is of no format that shards hold, or damaged.
    """
    if not is_npy(member):
        return decode_rgb(decode_header(io.BytesIO(content), IMAGE_FORMATS), minimum_size, size)
    picture = decode_npy(content)
    _check_size(picture.size, size)
    return picture


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a channel of an image, of which the header alone has been read, has more than 8 bits."""
    codec, arguments = (image.tile[0][0], image.tile[0][3]) if image.tile else ("", "")
    raw_mode, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    several_deep = re.search(";16[BLN]", str(raw_mode)) is not None
    return image.mode[0] in "IF" or several_deep or (codec.startswith("ppm") and more[0] > 255)


def stated_maximum(image: ImageFile.ImageFile) -> int | None:
    """Largest value of 9 to 15 bits that the header of a PGM or PPM states, and Pillow scales to the full range."""
    if not image.tile or not image.tile[0][0].startswith("ppm"):
        return None
    maximum = int(image.tile[0][3][1])  # type: ignore[index]
    return maximum if 255 < maximum < 65535 else None


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits per channel to RGB."""
    if "transparency" in image.info:
        image = image.convert("RGBA")
    # Image.convert copies even an image that is in RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_bytes(pixels: Image.Image, kind: str | None, stated: bool) -> Image.Image:
    """Reduce a deep image to the high bytes of its channels, which Pillow has done if there are several channels.

    Raises:
        UnknownRange: the values are not those of 16 bits without a sign, or none has the highest bit, and the file does
            not state their range.
    """
    if pixels.mode[0] in "IF":
        values = np.asarray(pixels)
        low, high = np.nanmin(values), np.nanmax(values)
        if pixels.mode == "F" or (pixels.mode == "I" and kind not in ("PNG", "PPM")):
            what = "floating-point" if pixels.mode == "F" else "signed or 32-bit"
            raise UnknownRange(f"{what} values {low:g} to {high:g}")
        if 0 < high < 1 << 15 and not stated:
            raise UnknownRange(f"16-bit values {low} to {high}")
        return Image.fromarray((values >> 8).astype(np.uint8))
    colors = np.asarray(pixels)[..., [name not in "aAX" for name in pixels.getbands()]]
    low, high = int(colors.min()), int(colors.max())
    if 0 < high < 1 << 7 and not stated:
        raise UnknownRange(f"16-bit values of about {low << 8} to {high + 1 << 8}")
    return pixels


def check_label_mode(label: Image.Image) -> None:
    """Check that a label image has one 8-bit value per pixel.

    Raises:
        ValueError: it has another mode.
    """
    if label.mode not in ("L", "P"):
        raise ValueError(f"mode {label.mode}, not 8-bit train ids")


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
