"""`data.*`: which shards are read and how images are cropped and augmented."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Fraction, NonNegative, Positive, PositiveNumber, Section, Weight
from dist_pca.config.views import PhotometricConfig


class WeightedShards(Section):
    """One of several shard folders of a domain, with its sampling weight."""

    shards: str
    """Path of the folder, or its http(s), s3 or other URL; with `shard-{000000..000009}.tar` at its end, these shards
    alone."""
    weight: PositiveNumber = 1.0
    """Share of the domain's samples that are drawn from this folder, up to a common factor."""


class SamplingConfig(Section):
    """How source samples and their crops are drawn."""

    source: Literal["uniform", "rare_class"] = "uniform"
    """`uniform`: every sample once per epoch. `rare_class`: first draw a class, rare ones more often, then a sample
    that contains it (DAFormer); consecutive reads may then be from different shards."""
    temperature: Annotated[float, Field(gt=0)] = 0.01
    """Temperature of `rare_class`: class c is drawn in proportion to exp((1 - its share of pixels) / temperature)."""
    min_pixels: Positive = 3000
    """Least number of pixels of the drawn class in a sample, at its stored size."""
    min_crop_pixels: NonNegative = 1500
    """Least number of pixels of the drawn class in a crop; crops are drawn until one has so many."""
    crop_attempts: Positive = 10
    """Largest number of crops that are drawn; if none has enough pixels of the class, the one with the most is used."""
    pairing_window: NonNegative = 0
    """Window of source sample indices that may be permuted so that the k-th source image has classes in common with
    the k-th target image; 0 keeps the order. The target's shards need class counts, from labels or predictions."""


class CacheConfig(Section):
    """Cache of remote shards on each node."""

    folder: str | None = None
    """Folder on a local disk, shared by all processes of the node; None is $DIST_PCA_CACHE or
    ~/.cache/dist_pca/shards."""
    max_bytes: Positive = 50_000_000_000
    """Largest size of the cache; the least recently used shards are evicted."""
    timeout: PositiveNumber = 30.0
    """Seconds without any data after which a download attempt fails."""
    retries: NonNegative = 6
    """Number of attempts after the first one, with increasing delays."""
    min_rate: Weight = 10_000.0
    """Bytes per second, on average over a minute, below which an attempt fails too, as with a server that sends
    a byte now and then; 0 has no limit."""


class DataConfig(Section):
    """Which shards are read and how images are cropped and augmented."""

    source: str | tuple[WeightedShards, ...]
    """Folder of labelled source shards (with a manifest.json) or its URL, or a list of several, each written
    `{shards: ..., weight: ...}`. URLs are http(s), s3, and those that fsspec reads, such as gs, az and hf. With
    `shard-{000000..000009}.tar` at its end, only these shards of the folder are used."""
    target: str | tuple[WeightedShards, ...] | None = None
    """Target shards, written like `source`; their labels, if any, are used for diagnostics only."""
    validation: str | None = None
    """Folder or URL of labelled shards on which the model is validated during training (training.validate_every)."""
    classes: tuple[str, ...] | str | None = None
    """Class names to train on, or a label set's name (cityscapes_19, synthia_16, synthia_13); other classes are
    ignored. None takes the shards' own class table, which must then be the same in both domains."""
    shorter_edge: tuple[Positive, Positive]
    """The shorter image edge is resized to a random integer in this closed range, in pixels."""
    source_shorter_edge: tuple[Positive, Positive] | None = None
    """The range for source images where it is another one, for example because their cameras see objects larger or
    smaller. Target images, evaluation and export use `shorter_edge`. None takes `shorter_edge` for both domains."""
    crop: tuple[Positive, Positive]
    """Height and width of the random crop, in pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    photometric: PhotometricConfig = PhotometricConfig()
    workers: NonNegative = 2
    """Loader processes per rank and domain; 0 loads in the training process."""
    shuffle_window: Positive = 4
    """Shards whose samples are shuffled together; reads stay within this many shards of each folder."""
    sampling: SamplingConfig = SamplingConfig()
    cache: CacheConfig = CacheConfig()
    max_corrupt_share: Fraction = 0.001
    """Largest share of corrupt samples, out of one epoch or of all samples read so far, whichever is more. A corrupt
    sample is replaced by another one; above this share the run stops."""

    def folders(self, domain: Literal["source", "target"]) -> tuple[str, ...]:
        """Shard folders of a domain; empty if there is no target."""
        return tuple(part.shards for part in self._parts(domain))

    def weights(self, domain: Literal["source", "target"]) -> tuple[float, ...]:
        """Sampling weights of a domain's shard folders."""
        return tuple(part.weight for part in self._parts(domain))

    def _parts(self, domain: Literal["source", "target"]) -> tuple[WeightedShards, ...]:
        parts = self.source if domain == "source" else self.target
        return (WeightedShards(shards=parts),) if isinstance(parts, str) else parts or ()

    @model_validator(mode="after")
    def _check_resize(self) -> Self:
        for key in ("shorter_edge", "source_shorter_edge"):
            low, high = getattr(self, key) or self.shorter_edge
            if low > high:
                raise ValueError(f"{key}: the range [{low}, {high}] is empty; write the smaller value first")
        return self
