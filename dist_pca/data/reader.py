"""Reading one sample out of a shard, touching no other byte of it."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dist_pca.data.cache import CacheSettings, Prefetcher, open_shard
from dist_pca.errors import CorruptSample, UserError
from dist_pca.shards.manifest import Manifest
from dist_pca.shards.members import members_of


class ShardReader:
    """Reads samples at random; keeps the shards that it used last open. Close it when done.

    Shards of a URL are read from the node's cache, into which they are fetched whole.
    """

    def __init__(self, manifest: Manifest, keep_open: int, cache: CacheSettings | None = None) -> None:
        """Start with no file open.

        Args:
            manifest: The shard folder, as `open_manifest` gives it.
            keep_open: Shards held open at once, 1 or more.
            cache: Limit of the cache, and how to fetch; None takes the defaults.
        """
        self._manifest = manifest
        self._keep_open = keep_open
        self._cache = cache or CacheSettings()
        self._remote = "://" in manifest.location
        self._files: OrderedDict[int, int] = OrderedDict()
        self._prefetcher: Prefetcher | None = None

    def read(self, shard_index: int, sample_index: int) -> dict[str, Any]:
        """One sample as WebDataset gives it: `__key__`, `__url__` (path of the shard) and members by extension.

        `__size__` adds the image's (height, width) that the manifest states. Members are held in memory only; all but
        regular files that carry the sample's key are left out.

        Raises:
            CorruptSample: the sample is no tar, or its key would leave a folder it is written into.
            UserError: the shard is gone, is cut short or cannot be fetched.
        """
        shard = self._manifest.shards[shard_index]
        path = self._manifest.folder / shard.name
        key = shard.keys[sample_index]
        where = f"{path}: sample {key!r}"
        remedy = "remove this copy of the shard" if self._remote else "copy the shard again or build it again"
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise CorruptSample(f"{where}: the key leaves its folder; build the shards again")
        length = shard.lengths[sample_index]
        try:
            content = os.pread(self._open(shard_index, path), length, shard.offsets[sample_index])
        except OSError as error:
            raise UserError(f"{where} is unreadable ({error}); {remedy}") from error
        if len(content) < length:
            raise UserError(f"{path}: ends inside sample {key!r}; {remedy}")
        try:
            members = members_of(content, key)
        except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
            raise CorruptSample(f"{where} is unreadable ({error}); {remedy}") from error
        size = (shard.heights[sample_index], shard.widths[sample_index])
        return {"__key__": key, "__url__": str(path), "__size__": size, **members}

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        """Start to fetch shards that will be read, the first of them first; returns at once.

        They take the place of those asked for before. Faults are left to `read`. Shards of a local folder are there.
        """
        if not self._remote:
            return
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._manifest, self._cache)
        self._prefetcher.want(shard_indices)

    def close(self) -> None:
        """Close all files and end fetches ahead; reading again opens them anew."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, shard_index: int, path: Path) -> int:
        if shard_index not in self._files:
            if len(self._files) == self._keep_open:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard_index] = (
                open_shard(self._manifest, shard_index, self._cache) if self._remote else os.open(path, os.O_RDONLY)
            )
        self._files.move_to_end(shard_index)
        return self._files[shard_index]
