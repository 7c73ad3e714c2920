"""Read the selected samples from their shards, and no other byte of them."""

import os
import tarfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dist_pca.config import CacheConfig
from dist_pca.data.cache import CacheSettings, Prefetcher, cache_settings, open_shard
from dist_pca.data.source import Selection
from dist_pca.errors import CorruptSample, UserError
from dist_pca.shards.manifest import Manifest
from dist_pca.shards.sample import HEADER_ERRORS, members_of, read_slice

_AHEAD = 128
"""Number of samples that each loader process looks ahead to prefetch their shards."""


class RawSample(NamedTuple):
    """A selected sample, not decoded."""

    selection: Selection
    members: dict[str, Any] | CorruptSample
    """Result of `ShardReader.read`, or the error that it raised."""


class ShardReader:
    """Random access to the samples of a shard folder; keeps recently used shards open. Close it after use.

    Shards of a URL are read from the node's cache, into which whole shards are downloaded.
    """

    def __init__(self, manifest: Manifest, keep_open: int, cache: CacheSettings | None = None) -> None:
        """Create a reader without opening any file.

        Args:
            manifest: The shard folder, a result of `open_manifest`.
            keep_open: Number of shards that are kept open, 1 or more.
            cache: Cache limit and retry policy for shards of a URL; None takes the defaults.
        """
        self._manifest = manifest
        self._keep_open = keep_open
        self._cache = (cache or CacheSettings()) if _is_url(manifest) else None
        self._files: OrderedDict[int, int] = OrderedDict()
        self._prefetcher: Prefetcher | None = None

    def read(self, shard_index: int, sample_index: int) -> dict[str, Any]:
        """Read one sample in WebDataset's form: `__key__`, `__url__` (path of the shard) and members by extension.

        `__size__` is the image's (height, width), `__bands__` its number of bands, and `__image__` the extension of its
        member, if the manifest has one.
        Members stay in memory; those that are not regular files with the sample's key are left out.

        Raises:
            CorruptSample: the sample is not a tar, or its key is a path outside its folder.
            UserError: the shard is missing or truncated, or cannot be downloaded.
        """
        shard = self._manifest.shards[shard_index]
        path = self._manifest.folder / shard.name
        key = shard.keys[sample_index]
        where = f"{path}: sample {key!r}"
        remedy = "copy the shard again or build it again" if self._cache is None else "remove this copy of the shard"
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise CorruptSample(f"{where}: the key is a path outside its folder; build the shards again")
        try:
            content = read_slice(self._open(shard_index, path), shard, sample_index)
        except OSError as error:
            raise UserError(f"{where} is unreadable ({error}); {remedy}") from error
        except tarfile.ReadError:
            raise UserError(f"{path}: ends inside sample {key!r}; {remedy}") from None
        try:
            members = members_of(content, key)
        except (OSError, tarfile.TarError, *HEADER_ERRORS) as error:
            raise CorruptSample(f"{where} is unreadable ({error}); {remedy}") from error
        size = (shard.heights[sample_index], shard.widths[sample_index])
        named = {} if self._manifest.image_member is None else {"__image__": self._manifest.image_member}
        own = {"__key__": key, "__url__": str(path), "__size__": size, "__bands__": self._manifest.bands}
        return {**own, **named, **members}

    def prefetch(self, shard_indices: Sequence[int]) -> None:
        """Start to download shards that will be read soon, in this order; returns immediately.

        Replaces an earlier call's list. Errors are raised by `read` only. Does nothing for a local folder.
        """
        if self._cache is None:
            return
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._manifest, self._cache)
        self._prefetcher.want(shard_indices)

    def close(self) -> None:
        """Close all files and cancel downloads; reading again opens the files again."""
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
                os.open(path, os.O_RDONLY)
                if self._cache is None
                else open_shard(self._manifest, shard_index, self._cache)
            )
        self._files.move_to_end(shard_index)
        return self._files[shard_index]


def open_reader(manifest: Manifest, keep_open: int, cache: CacheConfig) -> ShardReader:
    """Create a reader with a run's cache; the shards of a local folder need none."""
    return ShardReader(manifest, keep_open, cache_settings(cache) if _is_url(manifest) else None)


def read_samples(openers: Sequence[Callable[[], ShardReader]], selections: Iterator[Selection]) -> Iterator[RawSample]:
    """Read selected samples, and start to download the shards of those that follow.

    Args:
        openers: For each shard folder, a function that creates its reader.
        selections: Samples to read; endless.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(opener())) for opener in openers]
        upcoming = deque(islice(selections, _AHEAD))
        for number in count():
            if number % (_AHEAD // 4) == 0:
                for folder, reader in enumerate(readers):
                    shards = (selected.offset.shard for selected in upcoming if selected.offset.folder == folder)
                    reader.prefetch(list(dict.fromkeys(shards)))
            selection = upcoming.popleft()
            upcoming.append(next(selections))
            yield read_selected(readers[selection.offset.folder], selection)


def read_selected(reader: ShardReader, selection: Selection) -> RawSample:
    """Read a selected sample from its folder; a corrupt one is returned as its error."""
    try:
        return RawSample(selection, reader.read(selection.offset.shard, selection.offset.sample))
    except CorruptSample as error:
        return RawSample(selection, error)


def read_evaluation_samples(
    opener: Callable[[], ShardReader], samples: Iterator[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Read samples, given as shard and sample; a corrupt one is an error."""
    with closing(opener()) as reader:
        for shard, sample in samples:
            yield reader.read(shard, sample)


def _is_url(manifest: Manifest) -> bool:
    return "://" in manifest.location
