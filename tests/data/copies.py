"""Shards in a cache, and those that they are copies of."""

import os

from dist_pca.data.cache import CacheSettings, open_shard
from dist_pca.shards.manifest import Manifest


def content_of(manifest: Manifest, shard_index: int, cache: CacheSettings) -> bytes:
    descriptor = open_shard(manifest, shard_index, cache)
    try:
        return os.pread(descriptor, 1 << 30, 0)
    finally:
        os.close(descriptor)


def original(local: Manifest, shard_index: int) -> bytes:
    return (local.folder / local.shards[shard_index].name).read_bytes()
