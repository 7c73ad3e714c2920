"""Which samples, in which order: a function of the seed and the sample index only.

Sample indices count the samples of a domain's endless stream. `Mixture` maps an index to a shard folder, `Order` to a
sample of that folder, and `Sampler` does both or, if the config says so, draws by rare classes or pairs the domains.
Access by sample index is random access: no other sample needs to be visited.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import accumulate, count, islice, pairwise
from typing import NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

from dist_pca.config import DataConfig
from dist_pca.data.class_sampling import Pairing, RareClasses, Shares, count_classes, rare_classes
from dist_pca.data.randomness import Domain, Indices, Purpose, draw, permutation
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest

_MIXED = 256
"""Sample indices whose folders are shuffled together."""
_REMEMBERED = 8
"""Shuffled windows that are cached: two per stream if a batch spans a boundary, for several streams."""


class ShardOffset(NamedTuple):
    """Location of a sample in a domain's shards."""

    folder: int
    """Index of the shard folder."""
    shard: int
    """Index of the shard in that folder."""
    sample: int
    """Index of the sample in that shard."""


class Selection(NamedTuple):
    """A sample that was selected for a sample index."""

    sample_index: int
    offset: ShardOffset
    wanted: int | None
    """Train id of the class for which the sample was drawn; None without rare-class sampling."""


@dataclass(frozen=True, eq=False)
class Order:
    """Maps a sample index to a sample of one shard folder; every epoch has each sample once.

    Shards are shuffled, then samples inside windows of a few consecutive shards, so that reads stay local.
    """

    counts: tuple[int, ...]
    """Number of samples in each shard; the sum must be at least 1."""
    seed: int
    domain: Domain
    """Domain of the folder; the two domains are shuffled independently."""
    window: int
    """Number of consecutive shards whose samples are shuffled together."""
    folder: int = 0
    """Index of the folder among the domain's; folders are shuffled independently."""

    @cached_property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.counts)

    @cached_property
    def ends(self) -> Indices:
        """Number of samples before each shard, and in total."""
        return np.cumsum([0, *self.counts])

    def locate(self, index: int) -> tuple[int, int]:
        """Shard, and sample in that shard, of an index in the folder's endless stream, 0 or more."""
        epoch, offset = divmod(index, self.samples)
        _, starts = _shuffled_shards(self, epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        shard, sample = _shuffled_window(self, epoch, window)[offset - starts[window]]
        return int(shard), int(sample)

    def locate_stored(self, number: int) -> tuple[int, int]:
        """Shard, and sample in that shard, of a sample's number in stored order."""
        shard = int(np.searchsorted(self.ends, number, side="right")) - 1
        return shard, number - int(self.ends[shard])


@dataclass(frozen=True, eq=False)
class Mixture:
    """Maps a sample index to a sample of one of several folders, with exact shares in the long run."""

    orders: tuple[Order, ...]
    """Order of each folder."""
    weights: tuple[float, ...]
    """Share of each folder in the stream, up to a common factor; above 0."""
    seed: int
    domain: Domain

    def locate(self, index: int) -> ShardOffset:
        """Location of the sample with an index in the endless stream, 0 or more."""
        folder, turn = self.split(index)
        return ShardOffset(folder, *self.orders[folder].locate(turn))

    def split(self, index: int) -> tuple[int, int]:
        """Folder of a sample index, and the number of earlier samples from that folder."""
        if len(self.orders) == 1:
            return 0, index
        block, offset = divmod(index, _MIXED)
        folders, turns = _shuffled_block(self, block)
        folder = int(folders[offset])
        return folder, self.counts_before(block)[folder] + int(turns[offset])

    def counts_before(self, block: int) -> list[int]:
        """Number of samples of each folder before a block of indices; rounded so that the sum is exact."""
        ends = [math.floor(bound * block * _MIXED) for bound in self._bounds]
        return [end - start for start, end in pairwise(ends)]

    @cached_property
    def _bounds(self) -> tuple[Fraction, ...]:
        shares = [Fraction(weight).limit_denominator(10**9) for weight in self.weights]
        return tuple(accumulate((share / sum(shares) for share in shares), initial=Fraction(0)))


@dataclass(frozen=True, eq=False)
class Sampler:
    """Maps the sample indices of one domain's stream to samples."""

    manifests: tuple[Manifest, ...]
    """The domain's shard folders."""
    mixture: Mixture
    rare: tuple[RareClasses, ...] = ()
    """Rare-class sampling of each folder; empty if it is off."""
    pairing: Pairing | None = None
    """Pairing with the other domain's samples, if it is on."""

    def select(self, index: int) -> Selection:
        """Select the sample of an index in the endless stream, 0 or more."""
        used = index if self.pairing is None else self.pairing.permute(index)
        if not self.rare:
            return Selection(index, self.mixture.locate(used), None)
        folder, turn = self.mixture.split(used)
        number, wanted = self.rare[folder].draw(turn)
        return Selection(index, ShardOffset(folder, *self.mixture.orders[folder].locate_stored(number)), wanted)

    def fallback(self, index: int, attempt: int) -> ShardOffset:
        """Select a replacement, from the same folder, for a sample that cannot be used.

        Args:
            index: Index of the unusable sample.
            attempt: Number of the attempt, from 1; a replacement may be unusable too.
        """
        folder = self.select(index).offset.folder
        order = self.mixture.orders[folder]
        bits = draw(1, self.mixture.seed, self.mixture.domain, Purpose.REPLACEMENT, index, attempt)
        return ShardOffset(folder, *order.locate_stored(int(bits[0]) % order.samples))


def build_sampler(
    config: DataConfig, manifests: Sequence[Manifest], domain: Domain, seed: int, *, targets: Sequence[Manifest] = ()
) -> Sampler:
    """Build a domain's sampler from the config.

    Args:
        config: Weights, window and sampling.
        manifests: The domain's shard folders, in the order of the config.
        domain: Domain of the folders.
        seed: Seed of the run.
        targets: For the source, the target's folders, which are needed for pairing.

    Raises:
        UserError: a folder has no samples, no sample contains enough pixels of any class, or pairing needs class counts
            that the target lacks.
    """
    orders = tuple(
        Order(tuple(len(shard.keys) for shard in manifest.shards), seed, domain, config.shuffle_window, folder)
        for folder, manifest in enumerate(manifests)
    )
    for order, manifest in zip(orders, manifests, strict=True):
        if order.samples == 0:
            raise UserError(f"data.{domain}: {manifest.folder} has no samples; build it from a folder with images")
    plain = Sampler(tuple(manifests), Mixture(orders, config.weights(domain), seed, domain))
    sampling = config.sampling
    if domain == "target" or (sampling.source == "uniform" and not sampling.pairing_window):
        return plain
    counts = tuple(count_classes(config, manifest) for manifest in manifests)
    rare = rare_classes(sampling, manifests, counts, seed) if sampling.source == "rare_class" else ()
    sampler = Sampler(plain.manifests, plain.mixture, rare)
    if not sampling.pairing_window or not targets:
        return sampler
    for target in targets:
        if not target.labelled:
            raise UserError(
                f"data.sampling.pairing_window: {target.folder} has no class counts for pairing; build it with "
                "labels (predicted ones are enough; the loss never uses them) or set the key to 0"
            )
    target_counts = tuple(count_classes(config, target) for target in targets)
    target_sampler = build_sampler(config, targets, "target", seed)
    pairing = Pairing(
        source=partial(_class_shares, sampler, counts),
        target=partial(_class_shares, target_sampler, target_counts),
        window=sampling.pairing_window,
    )
    return Sampler(plain.manifests, plain.mixture, rare, pairing)


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
    sizes = [size for size in range(1, min(global_batch, 1024) + 1) if global_batch % (size * accumulation) == 0]
    remedy = f"a world size out of {sizes}" if sizes else "another training.accumulation"
    raise UserError(
        f"{key}: {global_batch} samples cannot be divided evenly among {world_size} ranks x {accumulation} "
        f"micro-batches; use {batches} samples or {remedy}"
    )


def micro_batch_indices(
    step: int,
    accumulation_index: int,
    rank: int,
    *,
    world_size: int,
    accumulation: int,
    global_batch: int,
    offset: int = 0,
) -> range:
    """Sample indices of one micro-batch.

    A step has the same sample indices at any world size and accumulation: `global_batch` of them, starting at
    `step * global_batch + offset`. They are dealt to the step's micro-batches in turn, and inside each micro-batch to
    the ranks.

    Args:
        step: Optimiser step, counted from 0.
        accumulation_index: Micro-batch within the step, below `accumulation`.
        rank: Rank, below `world_size`.
        world_size: Number of ranks.
        accumulation: Micro-batches per step on each rank.
        global_batch: Samples per step, over all ranks and micro-batches.
        offset: Samples that earlier steps of another batch have used more than steps of this batch would have.

    Raises:
        UserError: the samples cannot be divided evenly.
    """
    size = micro_batch_size(global_batch, world_size=world_size, accumulation=accumulation)
    start = offset + step * global_batch + (accumulation_index * world_size + rank) * size
    return range(start, start + size)


def ordered_samples(
    sampler: Sampler, indices: Callable[[int, int], range], accumulation: int, start_step: int
) -> Iterator[Selection]:
    """Select the samples of this loader process's micro-batches, without end.

    Args:
        sampler: Sampler of the domain.
        indices: Returns the sample indices of a micro-batch, given step and accumulation index.
        accumulation: Micro-batches per step.
        start_step: First step.
    """
    # The loader takes items from its processes in turn, so whole micro-batches are dealt to them in turn.
    worker, workers = loader_process()
    for number in count(start_step * accumulation + worker, workers):
        for index in indices(*divmod(number, accumulation)):
            yield sampler.select(index)


def evaluation_samples(manifest: Manifest, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """Shard and sample of this loader process's part of a rank's samples, each once, in stored order."""
    worker, workers = loader_process()
    samples = ((shard, sample) for shard, content in enumerate(manifest.shards) for sample in range(len(content.keys)))
    yield from islice(samples, rank + worker * world_size, None, world_size * workers)


def loader_process() -> tuple[int, int]:
    """Index of this loader process, and the number of loader processes."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_block(mixture: Mixture, block: int) -> tuple[Indices, Indices]:
    """Folder of each sample index in a block, and the number of earlier samples of that folder in the block."""
    before, after = (mixture.counts_before(number) for number in (block, block + 1))
    counts = [end - start for start, end in zip(before, after, strict=True)]
    folders = np.repeat(np.arange(len(counts)), counts)
    folders = folders[permutation(_MIXED, mixture.seed, mixture.domain, Purpose.MIXTURE, block)]
    turns = np.empty_like(folders)
    for folder, samples in enumerate(counts):
        turns[folders == folder] = np.arange(samples)
    return folders, turns


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_shards(order: Order, epoch: int) -> tuple[Indices, Indices]:
    """Shards of an epoch in shuffled order, and the offset in the epoch at which each window begins."""
    shards = permutation(len(order.counts), order.seed, order.domain, Purpose.SHARDS, *_by_folder(order, epoch))
    ends = np.cumsum(np.asarray(order.counts)[shards])
    return shards, np.concatenate([[0], ends])[:: order.window]


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_window(order: Order, epoch: int, window: int) -> Indices:
    """Samples of a window in shuffled order, as rows of shard index and sample index."""
    shards, _ = _shuffled_shards(order, epoch)
    members = shards[window * order.window : (window + 1) * order.window]
    counts = np.asarray(order.counts)[members]
    samples = np.concatenate([np.arange(number) for number in counts])
    rows = np.column_stack([np.repeat(members, counts), samples])
    return rows[permutation(len(rows), order.seed, order.domain, Purpose.SAMPLES, *_by_folder(order, epoch, window))]


def _by_folder(order: Order, *index: int) -> tuple[int, ...]:
    # The first folder has the same order as if it were the only one.
    return (*index, order.folder) if order.folder else index


def _class_shares(sampler: Sampler, counts: tuple[Indices, ...], index: int) -> Shares:
    """Share of each class in the labelled pixels of a sample, [K], given pixels by folder, sample and class."""
    folder, shard, sample = sampler.select(index).offset
    row = counts[folder][int(sampler.mixture.orders[folder].ends[shard]) + sample]
    return np.asarray(row / max(1, row.sum()))
