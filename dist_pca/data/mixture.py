"""Mix several shard folders into one stream, with exact shares in the long run and random access by sample index."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from dist_pca.data.order import Order
from dist_pca.data.randomness import Domain, Indices, Purpose, permutation

_BLOCK = 256
"""Sample indices whose folders are shuffled together."""
_REMEMBERED = 8


class Place(NamedTuple):
    """Location of a sample."""

    part: int
    """Index of the shard folder."""
    shard: int
    """Index of the shard in that folder."""
    sample: int
    """Index of the sample in that shard."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Maps a sample index of the stream to a sample of one of the shard folders."""

    orders: tuple[Order, ...]
    """Order of each folder; every epoch of a folder has each of its samples once."""
    weights: tuple[float, ...]
    """Share of each folder in the stream, up to a common factor; above 0."""
    seed: int
    domain: Domain

    def locate(self, position: int) -> Place:
        """Location of the sample with an index in the endless stream, 0 or more."""
        part, index = self.split(position)
        return Place(part, *self.orders[part].locate(index))

    def split(self, position: int) -> tuple[int, int]:
        """Folder of a sample index, and the number of earlier samples from that folder."""
        if len(self.orders) == 1:
            return 0, position
        block, offset = divmod(position, _BLOCK)
        parts, turns = _shuffled_block(self, block)
        part = int(parts[offset])
        return part, self._taken(block)[part] + int(turns[offset])

    @cached_property
    def _bounds(self) -> tuple[Fraction, ...]:
        shares = [Fraction(weight).limit_denominator(10**9) for weight in self.weights]
        return tuple(accumulate((share / sum(shares) for share in shares), initial=Fraction(0)))

    def _taken(self, block: int) -> list[int]:
        """Number of samples of each folder before a block; rounded so that the sum is exact."""
        ends = [math.floor(bound * block * _BLOCK) for bound in self._bounds]
        return [end - start for start, end in pairwise(ends)]


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_block(mixture: Mixture, block: int) -> tuple[Indices, Indices]:
    """Folder of each sample index in a block, and the number of earlier samples of that folder in the block."""
    before, after = (mixture._taken(number) for number in (block, block + 1))
    counts = [end - start for start, end in zip(before, after, strict=True)]
    parts = np.repeat(np.arange(len(counts)), counts)
    parts = parts[permutation(_BLOCK, mixture.seed, mixture.domain, Purpose.MIXTURE, block)]
    turns = np.empty_like(parts)
    for part, count in enumerate(counts):
        turns[parts == part] = np.arange(count)
    return parts, turns
