"""Map sample indices to samples: in order, by rare classes, or paired with the other domain's samples.

The mapping is a function of the seed and the sample index, so it is the same on every machine and after every resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_pca.classes import IGNORE_INDEX
from dist_pca.config import DataConfig, SamplingConfig
from dist_pca.data.class_table import chosen_classes, lookup_table
from dist_pca.data.mixture import Mixture, Place
from dist_pca.data.order import Order
from dist_pca.data.randomness import Domain, Indices, Purpose, draw
from dist_pca.errors import UserError
from dist_pca.shards.manifest import Manifest

Counts = npt.NDArray[np.int64]
_REMEMBERED = 8


class Choice(NamedTuple):
    """A sample and the class for which it was drawn."""

    place: Place
    wanted: int | None
    """Train id of the class for which it was drawn; None without rare-class sampling."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Maps the sample indices of one domain's stream to samples."""

    manifests: tuple[Manifest, ...]
    """The domain's shard folders."""
    mixture: Mixture
    rare: tuple["RareClasses", ...] = ()
    """Rare-class sampling of each folder; empty if it is off."""
    pairing: "Pairing | None" = None
    """Pairing with the other domain's samples, if it is on."""

    def choose(self, position: int) -> Choice:
        """Choose the sample of an index in the endless stream, 0 or more."""
        if self.pairing is not None:
            position = self.pairing.exchanged(position)
        if not self.rare:
            return Choice(self.mixture.locate(position), None)
        part, turn = self.mixture.split(position)
        index, wanted = self.rare[part].draw(turn)
        return Choice(Place(part, *self.starts[part].place(index)), wanted)

    def instead_of(self, position: int, attempt: int) -> Place:
        """Choose a replacement, from the same folder, for a sample that cannot be used.

        Args:
            position: Index of the unusable sample.
            attempt: Number of the attempt, from 1; a replacement may be unusable too.
        """
        part = self.choose(position).place.part
        mixture = self.mixture
        bits = draw(1, mixture.seed, mixture.domain, Purpose.REPLACEMENT, position, attempt)
        return Place(part, *self.starts[part].place(int(bits[0]) % mixture.orders[part].samples))

    @cached_property
    def starts(self) -> tuple["Starts", ...]:
        """Shard offsets of each folder."""
        return tuple(Starts(np.cumsum([0, *order.counts])) for order in self.mixture.orders)


class Starts(NamedTuple):
    """Shard offsets of a folder: the number of samples before each shard, and in total."""

    ends: Indices

    def place(self, index: int) -> tuple[int, int]:
        """Convert a sample's index in the folder to its shard and its index in that shard."""
        shard = int(np.searchsorted(self.ends, index, side="right")) - 1
        return shard, index - int(self.ends[shard])

    def number(self, shard: int, sample: int) -> int:
        """Convert a shard and a sample's index in it to the sample's index in the folder."""
        return int(self.ends[shard]) + sample


@dataclass(frozen=True, eq=False)
class RareClasses:
    """Rare-class sampling (DAFormer, CVPR 2022, section 3.3): draw a class, then a sample that contains it.

    Class c is drawn with probability proportional to `exp((1 - f_c) / T)`; f_c is its share of the folder's pixels.
    """

    counts: Counts
    """Pixels by sample and class, [samples, K]."""
    seed: int
    part: int
    """Index of the folder; draws from different folders are independent."""
    temperature: float
    min_pixels: int
    """Least number of pixels of the class in a sample."""

    def draw(self, turn: int) -> tuple[int, int]:
        """Draw a sample's index in the folder, and the class for which it is drawn; `turn` counts draws."""
        bits = draw(2, self.seed, "source", Purpose.CLASS, turn, self.part)
        wanted = int(np.searchsorted(self._bounds, int(bits[0]) / 2**64, side="right"))
        return int(self.showing[wanted][int(bits[1]) % len(self.showing[wanted])]), wanted

    @cached_property
    def showing(self) -> list[Indices]:
        """Samples that contain enough pixels of each class."""
        return [(column >= self.min_pixels).nonzero()[0] for column in self.counts.T]

    @cached_property
    def _bounds(self) -> npt.NDArray[np.float64]:
        bounds = np.cumsum(self.probabilities)
        # The last bound may be below 1 by rounding; the rest belongs to the last class with a positive probability.
        bounds[self.probabilities.nonzero()[0][-1] :] = 1.0
        return bounds

    @cached_property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Probability of each class, [K]; 0 if no sample contains it."""
        share = self.counts.sum(axis=0) / max(1, self.counts.sum())
        # Subtract the largest exponent: the temperature is small, and exp would overflow.
        weight = np.exp((share.min() - share) / self.temperature) * [len(samples) > 0 for samples in self.showing]
        return np.asarray(weight / weight.sum())


@dataclass(frozen=True, eq=False)
class Pairing:
    """Permutes source samples within windows, so that the k-th source and target images have classes in common.

    Every source sample still occurs equally often.
    """

    source: Sampler
    target: Sampler
    counts: tuple[tuple[Counts, ...], tuple[Counts, ...]]
    """Pixels by sample and class, [samples, K], for each folder of the source and of the target."""
    window: int

    def exchanged(self, position: int) -> int:
        """Index, in the source's own order, of the sample that is used at `position`."""
        window, offset = divmod(position, self.window)
        return window * self.window + _exchanges(self, window)[offset]


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
    for manifest in manifests:
        if manifest.samples == 0:
            raise UserError(f"data.{domain}: {manifest.folder} has no samples; build it from a folder with images")
    orders = tuple(
        Order(tuple(len(shard.keys) for shard in manifest.shards), seed, domain, config.shuffle_window, part)
        for part, manifest in enumerate(manifests)
    )
    plain = Sampler(tuple(manifests), Mixture(orders, config.weights(domain), seed, domain))
    sampling = config.sampling
    if domain == "target" or (sampling.source == "uniform" and not sampling.pairing_window):
        return plain
    counts = tuple(_class_counts(config, manifest) for manifest in manifests)
    rare = _rare_classes(sampling, manifests, counts, seed) if sampling.source == "rare_class" else ()
    sampler = Sampler(plain.manifests, plain.mixture, rare)
    if not sampling.pairing_window or not targets:
        return sampler
    for target in targets:
        if not target.labelled:
            raise UserError(
                f"data.sampling.pairing_window: {target.folder} has no class counts for pairing; build it with "
                "labels (predicted ones are enough; the loss never uses them) or set the key to 0"
            )
    target_counts = tuple(_class_counts(config, target) for target in targets)
    pairing = Pairing(
        sampler, build_sampler(config, targets, "target", seed), (counts, target_counts), sampling.pairing_window
    )
    return Sampler(plain.manifests, plain.mixture, rare, pairing)


def _rare_classes(
    sampling: SamplingConfig, manifests: Sequence[Manifest], counts: Sequence[Counts], seed: int
) -> tuple[RareClasses, ...]:
    for manifest, pixels in zip(manifests, counts, strict=True):
        if not (pixels >= sampling.min_pixels).any():
            raise UserError(
                f"data.sampling.min_pixels: no sample of {manifest.folder} has {sampling.min_pixels} pixels of any "
                f"class; lower it to at most {pixels.max(initial=0)}"
            )
    return tuple(
        RareClasses(pixels, seed, part, sampling.temperature, sampling.min_pixels) for part, pixels in enumerate(counts)
    )


def _class_counts(config: DataConfig, manifest: Manifest) -> Counts:
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
def _exchanges(pairing: Pairing, window: int) -> list[int]:
    """Permutation of a window's source samples: greedy assignment, most similar pairs first."""
    positions = range(window * pairing.window, (window + 1) * pairing.window)
    source, target = (
        np.stack([_shares(sampler, counts, position) for position in positions])
        for sampler, counts in zip((pairing.source, pairing.target), pairing.counts, strict=True)
    )
    overlap = np.minimum(target[:, None], source[None]).sum(axis=2)
    taken = [0] * pairing.window
    for _ in positions:
        place, other = np.unravel_index(overlap.argmax(), overlap.shape)
        taken[place] = int(other)
        overlap[place], overlap[:, other] = -1, -1
    return taken


def _shares(sampler: Sampler, counts: tuple[Counts, ...], position: int) -> npt.NDArray[np.float64]:
    """Share of each class in the labelled pixels of a sample, [K]."""
    part, shard, sample = sampler.choose(position).place
    row = counts[part][sampler.starts[part].number(shard, sample)]
    return np.asarray(row / max(1, row.sum()))
