"""Several shard folders as one stream: shares that hold exactly over the long run, and any position found at once."""

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
"""Positions whose folders are shuffled together."""
_REMEMBERED = 8


class Place(NamedTuple):
    """Where a sample lies."""

    part: int
    """Shard folder."""
    shard: int
    """Shard in that folder."""
    sample: int
    """Sample in that shard."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which sample of which shard folder stands at which position."""

    orders: tuple[Order, ...]
    """The order of each folder, whose samples come round once per epoch of its own."""
    weights: tuple[float, ...]
    """Share of each folder in the stream, up to a common factor; above 0."""
    seed: int
    domain: Domain

    def locate(self, position: int) -> Place:
        """The sample at a position, 0 or higher without end."""
        part, index = self.split(position)
        return Place(part, *self.orders[part].locate(index))

    def split(self, position: int) -> tuple[int, int]:
        """The folder whose turn it is at a position, and how often its turn has come before."""
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
        """Turns of each folder before a block; rounded so that they add up."""
        ends = [math.floor(bound * block * _BLOCK) for bound in self._bounds]
        return [end - start for start, end in pairwise(ends)]


@lru_cache(maxsize=_REMEMBERED)
def _shuffled_block(mixture: Mixture, block: int) -> tuple[Indices, Indices]:
    """Folder of each position in a block, and how many of that folder come before it in the block."""
    before, after = (mixture._taken(number) for number in (block, block + 1))
    counts = [end - start for start, end in zip(before, after, strict=True)]
    parts = np.repeat(np.arange(len(counts)), counts)
    parts = parts[permutation(_BLOCK, mixture.seed, mixture.domain, Purpose.MIXTURE, block)]
    turns = np.empty_like(parts)
    for part, count in enumerate(counts):
        turns[parts == part] = np.arange(count)
    return parts, turns
