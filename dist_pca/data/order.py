"""The order of samples: a function of the seed and the position, whatever machine reads them.

Positions count samples of an endless stream. Every epoch takes each sample once: shards are shuffled, then samples
inside windows of a few consecutive shards, so that reads stay local. Any position is found without visiting others.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from dist_pca.data.randomness import Domain, Indices, Purpose, permutation
from dist_pca.errors import UserError

_REMEMBERED = 8
"""Shuffled windows kept at hand: two per stream where a batch spans a boundary, for several streams."""


@dataclass(frozen=True, eq=False)
class Order:
    """Which sample stands at which position."""

    counts: tuple[int, ...]
    """Samples in each shard; at least one sample in all."""
    seed: int
    domain: Domain
    """The two domains are shuffled independently."""
    window: int
    """Consecutive shards whose samples are shuffled together."""
    part: int = 0
    """Which of the domain's shard folders this is; they are shuffled independently."""

    @cached_property
    def samples(self) -> int:
        """Length of an epoch."""
        return sum(self.counts)

    def locate(self, position: int) -> tuple[int, int]:
        """Shard index and sample index in that shard of a position, 0 or higher without end."""
        epoch, offset = divmod(position, self.samples)
        _, starts = _shuffled_shards(self, epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        shard, sample = _shuffled_window(self, epoch, window)[offset - starts[window]]
        return int(shard), int(sample)


def micro_batch_size(global_batch: int, *, world_size: int, accumulation: int, key: str = "batch") -> int:
    """Samples in one rank's micro-batch.

    Args:
        global_batch: Samples per step, over all ranks and micro-batches.
        world_size: Number of ranks.
        accumulation: Micro-batches per step on each rank.
        key: Config key of `global_batch`, for the message.

    Raises:
        UserError: the samples cannot be shared out evenly; world sizes and batches that can are named.
    """
    parts = world_size * accumulation
    if global_batch % parts == 0:
        return global_batch // parts
    lower = global_batch // parts * parts
    batches = f"{lower} or {lower + parts}" if lower else str(parts)
    sizes = [size for size in range(1, global_batch + 1) if global_batch % (size * accumulation) == 0]
    remedy = f"a world size out of {sizes}" if sizes else "another training.accumulation"
    raise UserError(
        f"{key}: {global_batch} samples do not share out over {world_size} ranks x {accumulation} micro-batches; "
        f"use {batches} samples or {remedy}"
    )


def micro_batch_positions(
    step: int, accumulation_index: int, rank: int, *, world_size: int, accumulation: int, global_batch: int
) -> range:
    """Positions of one micro-batch.

    A step covers the same positions under any world size and accumulation: those from `step * global_batch` on, dealt
    to the step's micro-batches in turn and, inside each of these, to the ranks in turn.

    Args:
        step: Update of the weights, counted from 0.
        accumulation_index: Micro-batch within the step, below `accumulation`.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        accumulation: Micro-batches per step on each rank.
        global_batch: Samples per step, over all ranks and micro-batches.

    Raises:
        UserError: the samples cannot be shared out evenly.
    """
    size = micro_batch_size(global_batch, world_size=world_size, accumulation=accumulation)
    start = step * global_batch + (accumulation_index * world_size + rank) * size
    return range(start, start + size)


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_shards(order: Order, epoch: int) -> tuple[Indices, Indices]:
    """An epoch's shards in their order, and the offset in the epoch at which each window begins."""
    shards = permutation(len(order.counts), order.seed, order.domain, Purpose.SHARDS, *_apart(order, epoch))
    ends = np.cumsum(np.asarray(order.counts)[shards])
    return shards, np.concatenate([[0], ends])[:: order.window]


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_window(order: Order, epoch: int, window: int) -> Indices:
    """A window's samples in their order, as rows of shard index and sample index."""
    shards, _ = _shuffled_shards(order, epoch)
    members = shards[window * order.window : (window + 1) * order.window]
    counts = np.asarray(order.counts)[members]
    samples = np.concatenate([np.arange(count) for count in counts])
    places = np.column_stack([np.repeat(members, counts), samples])
    return places[permutation(len(places), order.seed, order.domain, Purpose.SAMPLES, *_apart(order, epoch, window))]


def _apart(order: Order, *index: int) -> tuple[int, ...]:
    # The first folder's order is what it would be alone.
    return (*index, order.part) if order.part else index
