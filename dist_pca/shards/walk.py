"""List the samples inside a tar, possibly untrusted, by reading its headers only."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from dist_pca.errors import UserError
from dist_pca.shards.manifest import MAX_SAMPLE_BYTES
from dist_pca.shards.sample import HEADER_ERRORS

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_LONGEST_END = 1 << 26
"""Bytes of padding after the last member, far beyond any blocking factor."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class SampleSlice:
    """Slice of a tar that holds one sample."""

    key: str
    offset: int
    """Byte offset of the sample's first header."""
    length: int
    """Bytes from there to the end of the last member's last block."""
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's content, by extension in lower case."""


def walk(path: Path) -> list[SampleSlice]:
    """List a tar's samples as WebDataset groups them: consecutive members with the same key.

    Reads headers only. The key is the member's path up to the first dot of its file name.

    Raises:
        UserError: the tar is compressed, damaged or truncated, or a member is not a regular file, has a path outside
            its folder or occurs twice in its sample; the message names shard and member.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; remove it")
    try:
        with path.open("rb") as file:
            _check_uncompressed(path, file.read(8))
            file.seek(0)
            with tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:") as archive:
                slices, end = _group(path, archive)
                if set(archive.pax_headers) - {"comment"}:
                    raise UserError(f"{path}: has global headers, which single samples lack; write the shard again")
            _check_end(path, file, end)
    except (OSError, tarfile.TarError, *HEADER_ERRORS) as error:
        raise UserError(f"{path}: not a readable tar ({' '.join(str(error).split())}); copy it again") from error
    return slices


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by name; those that begin with a dot, such as the `._` files of macOS, are left out."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


class _Headers:
    """A file from which headers are read, but none of a size that no header has; `tarfile` reads them whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        """Read bytes.

        Raises:
            tarfile.ReadError: there are more than a header has.
        """
        if size > _CHUNK:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def _check_uncompressed(path: Path, beginning: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise UserError(
                f"{path}: compressed with {name}, so single samples cannot be read; decompress it to a plain tar"
            )


def _group(path: Path, archive: tarfile.TarFile) -> tuple[list[SampleSlice], int]:
    slices: list[SampleSlice] = []
    end = 0
    for member in _members(path, archive):
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if member.isdir():
            continue
        match = None if _META.match(member.name) else _MEMBER.fullmatch(member.name)
        if match is None:  # WebDataset skips it too
            continue
        key, extension = match[1], match[2].lower()
        found = slices[-1] if slices and slices[-1].key == key else SampleSlice(key, member.offset, 0, {})
        if extension in found.members:
            raise UserError(f"{path}: member {member.name!r}: occurs twice in its sample; write the shard again")
        grown = SampleSlice(
            key,
            found.offset,
            end - found.offset,
            {**found.members, extension: (member.offset_data, member.size)},
        )
        if found.members:
            slices[-1] = grown
        else:
            slices.append(grown)
    return slices, end


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        # With negative sizes, some versions of `tarfile` move backwards and never end.
        if member.size < 0:
            raise UserError(f"{path}: member {member.name!r}: has a negative size; copy the shard again")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise UserError(f"{path}: member {member.name!r}: not a regular file; write the shard without it")
        if member.size > MAX_SAMPLE_BYTES:
            raise UserError(
                f"{path}: member {member.name!r}: {member.size:,} bytes, and samples are read whole, up to "
                f"{MAX_SAMPLE_BYTES:,}; write the shard without it"
            )
        if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
            raise UserError(f"{path}: member {member.name!r}: the name is outside its folder; write the shard again")
        yield member


def _check_end(path: Path, file: IO[bytes], end: int) -> None:
    # Python's tarfile treats anything unreadable as the end of the archive.
    beyond = file.seek(0, os.SEEK_END) - end
    if beyond > _LONGEST_END:
        raise UserError(f"{path}: {beyond:,} bytes after its last member; copy or write the shard again")
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
