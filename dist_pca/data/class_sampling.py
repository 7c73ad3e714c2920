"""Sampling by classes: rare classes more often, or source and target samples paired by the classes they have in common.

Both are functions of the seed and the sample index, so they are the same on every machine and after every resume.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from dist_pca.classes import IGNORE_INDEX
from dist_pca.config import DataConfig, SamplingConfig
from dist_pca.data.class_table import chosen_classes, lookup_table
from dist_pca.data.randomness import Indices, Purpose, draw
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest

Shares = npt.NDArray[np.float64]
_REMEMBERED = 8


@dataclass(frozen=True, eq=False)
class RareClasses:
    """Rare-class sampling (DAFormer, CVPR 2022, section 3.3): draw a class, then a sample that contains it.

    Class c is drawn with probability proportional to `exp((1 - f_c) / T)`; f_c is its share of the folder's pixels.
    """

    counts: Indices
    """Pixels by sample and class, [samples, K]."""
    seed: int
    folder: int
    """Index of the folder; draws from different folders are independent."""
    temperature: float
    min_pixels: int
    """Least number of pixels of the class in a sample."""

    def draw(self, turn: int) -> tuple[int, int]:
        """Draw a sample's number in the folder, and the class for which it is drawn; `turn` counts draws."""
        bits = draw(2, self.seed, "source", Purpose.CLASS, turn, self.folder)
        wanted = int(np.searchsorted(self._bounds, int(bits[0]) / 2**64, side="right"))
        return int(self.samples_with[wanted][int(bits[1]) % len(self.samples_with[wanted])]), wanted

    @cached_property
    def samples_with(self) -> list[Indices]:
        """Samples that contain enough pixels of each class."""
        return [(column >= self.min_pixels).nonzero()[0] for column in self.counts.T]

    @cached_property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Probability of each class, [K]; 0 if no sample contains it."""
        share = self.counts.sum(axis=0) / max(1, self.counts.sum())
        # Subtract the largest exponent: the temperature is small, and exp would overflow.
        weight = np.exp((share.min() - share) / self.temperature) * [len(samples) > 0 for samples in self.samples_with]
        return np.asarray(weight / weight.sum())

    @cached_property
    def _bounds(self) -> npt.NDArray[np.float64]:
        bounds = np.cumsum(self.probabilities)
        # The last bound may be below 1 by rounding; the rest belongs to the last class with a positive probability.
        bounds[self.probabilities.nonzero()[0][-1] :] = 1.0
        return bounds


@dataclass(frozen=True, eq=False)
class Pairing:
    """Permutes source samples within windows, so that the k-th source and target images have classes in common.

    Every source sample still occurs equally often.
    """

    source: Callable[[int], Shares]
    """Share of each class, [K], of the source sample with an index."""
    target: Callable[[int], Shares]
    """Share of each class, [K], of the target sample with an index."""
    window: int

    def permute(self, index: int) -> int:
        """Index, in the source's own order, of the sample that is used at `index`."""
        window, offset = divmod(index, self.window)
        return window * self.window + _greedy_assignment(self, window)[offset]


def rare_classes(
    sampling: SamplingConfig, manifests: Sequence[Manifest], counts: Sequence[Indices], seed: int
) -> tuple[RareClasses, ...]:
    """Build the rare-class sampling of each folder from its pixels by sample and class.

    Raises:
        UserError: no sample of a folder contains enough pixels of any class.
    """
    for manifest, pixels in zip(manifests, counts, strict=True):
        if not (pixels >= sampling.min_pixels).any():
            raise UserError(
                f"data.sampling.min_pixels: no sample of {manifest.folder} has {sampling.min_pixels} pixels of any "
                f"class; lower it to at most {pixels.max(initial=0)}"
            )
    return tuple(
        RareClasses(pixels, seed, folder, sampling.temperature, sampling.min_pixels)
        for folder, pixels in enumerate(counts)
    )


def count_classes(config: DataConfig, manifest: Manifest) -> Indices:
    """Count pixels by sample and class of the run, [samples, K]."""
    classes = chosen_classes(config, manifest)
    table = lookup_table(manifest, classes)
    stored = np.array([row for shard in manifest.shards for row in shard.pixel_counts], np.int64)
    counts = np.zeros((len(stored), len(classes)), np.int64)
    for train_id, column in enumerate(stored.T):
        if table[train_id] != IGNORE_INDEX:
            counts[:, table[train_id]] += column
    return counts


@lru_cache(maxsize=_REMEMBERED)
def _greedy_assignment(pairing: Pairing, window: int) -> list[int]:
    """Permutation of a window's source samples: the pairs with most in common first."""
    indices = range(window * pairing.window, (window + 1) * pairing.window)
    source, target = (np.stack([shares(index) for index in indices]) for shares in (pairing.source, pairing.target))
    overlap = np.minimum(target[:, None], source[None]).sum(axis=2)
    assigned = [0] * pairing.window
    for _ in indices:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        assigned[row] = int(column)
        overlap[row], overlap[:, column] = -1, -1
    return assigned
