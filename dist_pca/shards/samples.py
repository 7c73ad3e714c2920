"""Samples inside a tar, possibly untrusted: their offsets, image sizes and label values.

Nothing is extracted to disk, and members are identified by their extension alone.
"""

import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from dist_pca.classes import IGNORE_INDEX
from dist_pca.errors import UserError
from dist_pca.shards.images import MEMBER_EXTENSIONS, decode_header, decode_pixels
from dist_pca.shards.manifest import Manifest, Shard
from dist_pca.shards.members import members_of

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Place:
    """Position of a sample in its tar."""

    key: str
    offset: int
    """Byte offset of the sample's first header."""
    length: int
    """Bytes from there to the end of the last member's last block."""
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's content, by extension in lower case."""


def walk(path: Path) -> list[Place]:
    """List a tar's samples as WebDataset groups them: consecutive members with the same key.

    Reads headers only. The key is the member's path up to the first dot of its file name.

    Raises:
        UserError: the tar is compressed, damaged or truncated, or a member is not a regular file, has a path outside
            its folder or occurs twice in its sample; the message names shard and member.
    """
    try:
        with path.open("rb") as file:
            _check_uncompressed(path, file.read(8))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                places, end = _group(path, archive)
                if set(archive.pax_headers) - {"comment"}:
                    raise UserError(f"{path}: has global headers, which single samples lack; write the shard again")
            _check_end(path, file, end)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: not a readable tar ({error}); copy it again") from error
    return places


def read_sample(manifest: Manifest, shard: Shard, index: int) -> dict[str, bytes]:
    """Read one sample's members by extension (`png`, `label.png`, `json`, ...), and no other byte of the shard.

    Raises:
        OSError: the shard cannot be read.
        tarfile.TarError: the shard is truncated, or there is no tar at the sample's offset.
    """
    with (manifest.folder / shard.name).open("rb") as file:
        file.seek(shard.offsets[index])
        content = file.read(shard.lengths[index])
    if len(content) < shard.lengths[index]:
        raise tarfile.ReadError("the shard ends inside it")
    return members_of(content, shard.keys[index])


def image_member(members: Collection[str], label_member: str) -> str:
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


def image_size(source: IO[bytes], *, whole: bool) -> tuple[int, int]:
    """Width and height of an encoded image; if `whole`, all of it is decoded.

    Raises:
        ValueError: it is not a JPEG, PNG or WebP image, is too large, or is damaged.
    """
    image = decode_header(source, ("JPEG", "PNG", "WEBP"))
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
    label = decode_header(source, ("PNG",))
    if label.mode not in ("L", "P"):
        raise ValueError(f"mode {label.mode}, not 8-bit train ids")
    if label.size != size:
        raise ValueError(f"{label.width} x {label.height} pixels where the image has {size[0]} x {size[1]}")
    decode_pixels(label)
    counts = np.bincount(np.asarray(label).ravel(), minlength=256)
    unknown = [value for value in counts.nonzero()[0].tolist() if value >= classes and value != IGNORE_INDEX]
    if unknown:
        shown = ", ".join(map(str, unknown[:5]))
        pixels = counts[unknown].sum()
        raise ValueError(f"label values outside the {classes} classes: {shown}, {pixels} pixels")
    found: list[int] = counts[:classes].tolist()
    return found


def _check_uncompressed(path: Path, beginning: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise UserError(
                f"{path}: compressed with {name}, so single samples cannot be read; decompress it to a plain tar"
            )


def _group(path: Path, archive: tarfile.TarFile) -> tuple[list[Place], int]:
    places: list[Place] = []
    end = 0
    for member in _members(path, archive):
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        match = None if _META.match(member.name) else _MEMBER.fullmatch(member.name)
        if match is None:  # WebDataset skips it too
            continue
        key, extension = match[1], match[2].lower()
        place = places[-1] if places and places[-1].key == key else Place(key, member.offset, 0, {})
        if extension in place.members:
            raise UserError(f"{path}: member {member.name!r}: occurs twice in its sample; write the shard again")
        grown = Place(
            key,
            place.offset,
            end - place.offset,
            {**place.members, extension: (member.offset_data, member.size)},
        )
        if place.members:
            places[-1] = grown
        else:
            places.append(grown)
    return places, end


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        # With negative sizes, some versions of `tarfile` move backwards and never end.
        if member.size < 0:
            raise UserError(f"{path}: member {member.name!r}: has a negative size; copy the shard again")
        if not member.isreg() or member.issparse():
            raise UserError(f"{path}: member {member.name!r}: not a regular file; write the shard without it")
        if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
            raise UserError(f"{path}: member {member.name!r}: the name is outside its folder; write the shard again")
        yield member


def _check_end(path: Path, file: IO[bytes], end: int) -> None:
    # Python's tarfile treats anything unreadable as the end of the archive.
    file.seek(end)
    rest = file.read(_BLOCK)
    if len(rest) < _BLOCK:
        raise UserError(f"{path}: has no end-of-archive mark; copy it again")
    while rest:
        if any(rest):
            raise UserError(
                f"{path}: damaged, or followed by a second tar, after byte {end}; copy or write the shard again"
            )
        rest = file.read(_CHUNK)
