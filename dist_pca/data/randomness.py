"""Random numbers as a pure function of what they are for, equal on every machine and after every resume."""

from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Domain = Literal["source", "target"]
Indices = npt.NDArray[np.int64]


class Purpose(IntEnum):
    """What random numbers are drawn for; equal indices under different purposes are unrelated."""

    SHARDS = 0
    SAMPLES = 1
    CROP = 2
    POSITIONS = 3
    MIXTURE = 4
    CLASS = 5
    REPLACEMENT = 6
    PHOTOMETRIC = 7
    CLASS_MIX = 8
    BLOCKS = 9


def draw(count: int, seed: int, domain: Domain, purpose: Purpose, *index: int) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit integers, always the same ones for the same arguments.

    Raw bits of a Philox generator, because numpy promises that those never change, which it does not of the
    methods of `numpy.random.Generator`.
    """
    key = (("source", "target").index(domain), int(purpose), *index)
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def permutation(count: int, seed: int, domain: Domain, purpose: Purpose, *index: int) -> Indices:
    """A uniformly random order of `range(count)`, always the same one for the same arguments."""
    return np.argsort(draw(count, seed, domain, purpose, *index), kind="stable")
