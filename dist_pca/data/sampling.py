"""Which sample is taken at a position: in order, by the rarity of its classes, or to suit the other domain's sample.

All of it is a function of seed and position, so it is the same on every machine and after every resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_pca.config import DataConfig, SamplingConfig
from dist_pca.data.classes import chosen_classes, lookup_table
from dist_pca.data.mixture import Mixture, Place
from dist_pca.data.order import Order
from dist_pca.data.randomness import Domain, Indices, Purpose, draw
from dist_pca.errors import UserError
from dist_pca.shards.classes import IGNORE_INDEX
from dist_pca.shards.manifest import Manifest

Counts = npt.NDArray[np.int64]
_REMEMBERED = 8


class Choice(NamedTuple):
    """A sample, and why."""

    place: Place
    wanted: int | None
    """Train id of the class it was drawn for."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Which sample is taken at which position of one domain's stream."""

    manifests: tuple[Manifest, ...]
    """The domain's shard folders."""
    mixture: Mixture
    rare: tuple["RareClasses", ...] = ()
    """For each folder, where samples are drawn by class."""
    pairing: "Pairing | None" = None
    """Where positions are exchanged to suit the other domain."""

    def choose(self, position: int) -> Choice:
        """The sample at a position, 0 or higher without end."""
        if self.pairing is not None:
            position = self.pairing.exchanged(position)
        if not self.rare:
            return Choice(self.mixture.locate(position), None)
        part, turn = self.mixture.split(position)
        index, wanted = self.rare[part].draw(turn)
        return Choice(Place(part, *self.starts[part].place(index)), wanted)

    def instead_of(self, position: int, attempt: int) -> Place:
        """Another sample of the same folder for a position whose own cannot be used.

        Args:
            position: The position.
            attempt: Counts from 1 where the replacements themselves cannot be used.
        """
        part = self.choose(position).place.part
        mixture = self.mixture
        bits = draw(1, mixture.seed, mixture.domain, Purpose.REPLACEMENT, position, attempt)
        return Place(part, *self.starts[part].place(int(bits[0]) % mixture.orders[part].samples))

    @cached_property
    def starts(self) -> tuple["Starts", ...]:
        """For each folder, where its shards begin in the count of its samples."""
        return tuple(Starts(np.cumsum([0, *order.counts])) for order in self.mixture.orders)


class Starts(NamedTuple):
    """Number of a folder's samples before each shard, and in all."""

    ends: Indices

    def place(self, index: int) -> tuple[int, int]:
        """Shard and sample in it, of a sample's number in the folder."""
        shard = int(np.searchsorted(self.ends, index, side="right")) - 1
        return shard, index - int(self.ends[shard])

    def number(self, shard: int, sample: int) -> int:
        """A sample's number in the folder."""
        return int(self.ends[shard]) + sample


@dataclass(frozen=True, eq=False)
class RareClasses:
    """Rare-class sampling (DAFormer, CVPR 2022, section 3.3): a class is drawn, then a sample that shows it.

    Class c is drawn with probability proportional to `exp((1 - f_c) / T)`, f_c its share of the folder's pixels.
    """

    counts: Counts
    """Pixels by sample and class."""
    seed: int
    part: int
    """The folder, so that several are drawn from independently."""
    temperature: float
    min_pixels: int
    """Pixels of the class that a sample must show."""

    def draw(self, turn: int) -> tuple[int, int]:
        """A sample's number in the folder and the class it is drawn for, at the folder's turn number `turn`."""
        bits = draw(2, self.seed, "source", Purpose.CLASS, turn, self.part)
        wanted = int(np.searchsorted(self._bounds, int(bits[0]) / 2**64, side="right"))
        return int(self.showing[wanted][int(bits[1]) % len(self.showing[wanted])]), wanted

    @cached_property
    def showing(self) -> list[Indices]:
        """For each class, the samples that show it."""
        return [(column >= self.min_pixels).nonzero()[0] for column in self.counts.T]

    @cached_property
    def _bounds(self) -> npt.NDArray[np.float64]:
        bounds = np.cumsum(self.probabilities)
        # Sums are rounded: what lies above the last class that is drawn at all is that class too.
        bounds[self.probabilities.nonzero()[0][-1] :] = 1.0
        return bounds

    @cached_property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Of each class; 0 where no sample shows it."""
        share = self.counts.sum(axis=0) / max(1, self.counts.sum())
        # Less the largest exponent: the temperature is small and exponentials overflow.
        weight = np.exp((share.min() - share) / self.temperature) * [len(samples) > 0 for samples in self.showing]
        return np.asarray(weight / weight.sum())


@dataclass(frozen=True, eq=False)
class Pairing:
    """Exchanges source positions within windows, so that the k-th source and the k-th target image share classes.

    Every source sample still comes exactly as often.
    """

    source: Sampler
    target: Sampler
    counts: tuple[tuple[Counts, ...], tuple[Counts, ...]]
    """Pixels by sample and class of each folder, of the source and of the target."""
    window: int

    def exchanged(self, position: int) -> int:
        """The position in the source's own order whose sample is taken at `position`."""
        window, offset = divmod(position, self.window)
        return window * self.window + _exchanges(self, window)[offset]


def build_sampler(
    config: DataConfig, manifests: Sequence[Manifest], domain: Domain, seed: int, *, targets: Sequence[Manifest] = ()
) -> Sampler:
    """A domain's sampler as the configuration asks for it.

    Args:
        config: Weights, window and sampling.
        manifests: The domain's shard folders, as many as the configuration names.
        domain: Which domain.
        seed: Seed of the run.
        targets: For the source, the target's folders, which pairing needs.

    Raises:
        UserError: a folder holds no samples, no sample shows enough of any class, or pairing lacks the target's counts.
    """
    for manifest in manifests:
        if manifest.samples == 0:
            raise UserError(f"data.{domain}: {manifest.folder} holds no samples; build it from a folder with images")
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
                f"data.sampling.pairing_window: {target.folder} has no class counts to pair by; build it with labels "
                "(predicted ones will do, the loss never sees them) or set it to 0"
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
                f"data.sampling.min_pixels: no sample of {manifest.folder} shows {sampling.min_pixels} pixels of any "
                f"class; the most is {pixels.max(initial=0)}"
            )
    return tuple(
        RareClasses(pixels, seed, part, sampling.temperature, sampling.min_pixels) for part, pixels in enumerate(counts)
    )


def _class_counts(config: DataConfig, manifest: Manifest) -> Counts:
    """Pixels by sample and class of the run, [samples, K]."""
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
    """For each place in a window the place whose source sample goes there: most alike first, each used once."""
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
    """Each class's share of the labelled pixels of the sample at a position, [K]."""
    part, shard, sample = sampler.choose(position).place
    row = counts[part][sampler.starts[part].number(shard, sample)]
    return np.asarray(row / max(1, row.sum()))
