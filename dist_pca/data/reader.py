"""Reading one sample out of a shard, touching no other byte of it."""

import io
import os
import tarfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


class ShardReader:
    """Reads samples at random; keeps the shards that it used last open. Close it when done."""

    def __init__(self, manifest: Manifest, keep_open: int) -> None:
        """Start with no file open.

        Args:
            manifest: The shard folder.
            keep_open: Shards held open at once, 1 or more.
        """
        self._manifest = manifest
        self._keep_open = keep_open
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, shard_index: int, sample_index: int) -> dict[str, Any]:
        """One sample as WebDataset gives it: `__key__`, `__url__` (path of the shard) and members by extension.

        `__size__` adds the image's (height, width) that the manifest states. Members are held in memory only; all but
        regular files that carry the sample's key are left out.

        Raises:
            UserError: the shard is gone, cut short or no tar, or the key would leave a folder it is written into.
        """
        shard = self._manifest.shards[shard_index]
        path = self._manifest.folder / shard.name
        key = shard.keys[sample_index]
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise UserError(f"{path}: sample {key!r}: the key leaves its folder; build the shards again")
        try:
            length = shard.lengths[sample_index]
            content = os.pread(self._open(shard_index, path), length, shard.offsets[sample_index])
            if len(content) < length:
                raise UserError(f"{path}: ends inside sample {key!r}; copy the shard again or build it again")
            members = _members(content, f"{key}.")
        except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
            raise UserError(
                f"{path}: sample {key!r} is unreadable ({error}); copy the shard again or build it again"
            ) from error
        size = (shard.heights[sample_index], shard.widths[sample_index])
        return {"__key__": key, "__url__": str(path), "__size__": size, **members}

    def close(self) -> None:
        """Close all files; reading again opens them anew."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, shard_index: int, path: Path) -> int:
        if shard_index not in self._files:
            if len(self._files) == self._keep_open:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard_index] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(shard_index)
        return self._files[shard_index]


def _members(content: bytes, prefix: str) -> dict[str, bytes]:
    members = {}
    # Mode "r:" refuses compression and `issparse` leaves out holes: neither may grow a few bytes into many.
    with tarfile.open(fileobj=io.BytesIO(content + _END_OF_ARCHIVE), mode="r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse() or not member.name.startswith(prefix):
                continue
            stream = archive.extractfile(member)
            if stream is not None:
                members[member.name.removeprefix(prefix).lower()] = stream.read()
    return members
