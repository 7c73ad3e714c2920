"""Random numbers as a pure function of seed, purpose and index; the same on every machine and after every resume."""

from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Domain = Literal["source", "target"]
Indices = npt.NDArray[np.int64]


class Purpose(IntEnum):
    """Purpose of random numbers; numbers of different purposes are independent, even at equal indices."""

    SHARDS = 0
    SAMPLES = 1
    CROP = 2
    PIXELS = 3
    MIXTURE = 4
    CLASS = 5
    REPLACEMENT = 6
    PHOTOMETRIC = 7
    CLASS_MIX = 8
    BLOCKS = 9


def draw(count: int, seed: int, domain: Domain, purpose: Purpose, *index: int) -> npt.NDArray[np.uint64]:
    """Draw uniform 64-bit integers; the same arguments always give the same numbers.

    Uses the raw bits of a Philox generator, because numpy guarantees that they never change. It gives no such
    guarantee for the methods of `numpy.random.Generator`.
    """
    key = (("source", "target").index(domain), int(purpose), *index)
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def permutation(count: int, seed: int, domain: Domain, purpose: Purpose, *index: int) -> Indices:
    """Draw a uniformly random permutation of `range(count)`; the same arguments always give the same one."""
    return np.argsort(draw(count, seed, domain, purpose, *index), kind="stable")
