"""The order of samples: a function of the seed and the sample index only.

Sample indices count the samples of an endless stream. Every epoch has each sample once: shards are shuffled, then
samples inside windows of a few consecutive shards, so that reads stay local. Access by sample index is random access:
no other sample needs to be visited.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from dist_pca.data.randomness import Domain, Indices, Purpose, permutation
from dist_pca.errors import UserError

_REMEMBERED = 8
"""Shuffled windows that are cached: two per stream if a batch spans a boundary, for several streams."""


@dataclass(frozen=True, eq=False)
class Order:
    """Maps a sample index to a sample of one shard folder."""

    counts: tuple[int, ...]
    """Number of samples in each shard; the sum must be at least 1."""
    seed: int
    domain: Domain
    """Domain of the folder; the two domains are shuffled independently."""
    window: int
    """Number of consecutive shards whose samples are shuffled together."""
    part: int = 0
    """Index of the folder among the domain's; folders are shuffled independently."""

    @cached_property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.counts)

    def locate(self, position: int) -> tuple[int, int]:
        """Shard, and sample in that shard, of an index in the endless stream, 0 or more."""
        epoch, offset = divmod(position, self.samples)
        _, starts = _shuffled_shards(self, epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        shard, sample = _shuffled_window(self, epoch, window)[offset - starts[window]]
        return int(shard), int(sample)


def micro_batch_size(global_batch: int, *, world_size: int, accumulation: int, key: str = "batch") -> int:
    """Number of samples in one rank's micro-batch.

    Args:
        global_batch: Samples per step, over all ranks and micro-batches.
        world_size: Number of ranks.
        accumulation: Micro-batches per step on each rank.
        key: Config key of `global_batch`, for the message.

    Raises:
        UserError: the samples cannot be divided evenly; the message names valid batches and world sizes.
    """
    parts = world_size * accumulation
    if global_batch % parts == 0:
        return global_batch // parts
    lower = global_batch // parts * parts
    batches = f"{lower} or {lower + parts}" if lower else str(parts)
    sizes = [size for size in range(1, global_batch + 1) if global_batch % (size * accumulation) == 0]
    remedy = f"a world size out of {sizes}" if sizes else "another training.accumulation"
    raise UserError(
        f"{key}: {global_batch} samples cannot be divided evenly among {world_size} ranks x {accumulation} "
        f"micro-batches; use {batches} samples or {remedy}"
    )


def micro_batch_positions(
    step: int, accumulation_index: int, rank: int, *, world_size: int, accumulation: int, global_batch: int
) -> range:
    """Sample indices of one micro-batch.

    A step has the same sample indices at any world size and accumulation: `global_batch` of them, starting at
    `step * global_batch`. They are dealt to the step's micro-batches in turn, and inside each micro-batch to the ranks.

    Args:
        step: Optimiser step, counted from 0.
        accumulation_index: Micro-batch within the step, below `accumulation`.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        accumulation: Micro-batches per step on each rank.
        global_batch: Samples per step, over all ranks and micro-batches.

    Raises:
        UserError: the samples cannot be divided evenly.
    """
    size = micro_batch_size(global_batch, world_size=world_size, accumulation=accumulation)
    start = step * global_batch + (accumulation_index * world_size + rank) * size
    return range(start, start + size)


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_shards(order: Order, epoch: int) -> tuple[Indices, Indices]:
    """Shards of an epoch in shuffled order, and the offset in the epoch at which each window begins."""
    shards = permutation(len(order.counts), order.seed, order.domain, Purpose.SHARDS, *_apart(order, epoch))
    ends = np.cumsum(np.asarray(order.counts)[shards])
    return shards, np.concatenate([[0], ends])[:: order.window]


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_window(order: Order, epoch: int, window: int) -> Indices:
    """Samples of a window in shuffled order, as rows of shard index and sample index."""
    shards, _ = _shuffled_shards(order, epoch)
    members = shards[window * order.window : (window + 1) * order.window]
    counts = np.asarray(order.counts)[members]
    samples = np.concatenate([np.arange(count) for count in counts])
    places = np.column_stack([np.repeat(members, counts), samples])
    return places[permutation(len(places), order.seed, order.domain, Purpose.SAMPLES, *_apart(order, epoch, window))]


def _apart(order: Order, *index: int) -> tuple[int, ...]:
    # The first folder has the same order as if it were the only one.
    return (*index, order.part) if order.part else index
