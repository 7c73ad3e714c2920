"""`data.*`: which shards are streamed and how images become crops."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Fraction, NonNegative, Positive, Section
from dist_pca.config.views import PhotometricConfig


class WeightedShards(Section):
    """One shard folder among several."""

    shards: str
    """The folder, or its http(s) or s3 URL."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the domain's samples, up to a common factor."""


class SamplingConfig(Section):
    """Which source samples are taken, and which part of them."""

    source: Literal["uniform", "rare_class"] = "uniform"
    """`uniform`: every sample once per epoch. `rare_class`: a class is drawn, rare ones more often, then a sample that
    shows it (DAFormer); every read may then go to another shard."""
    temperature: Annotated[float, Field(gt=0)] = 0.01
    """Of `rare_class`: class c is drawn in proportion to exp((1 - its share of pixels) / temperature)."""
    min_pixels: Positive = 3000
    """Pixels of the drawn class that a sample must show, at its stored size."""
    min_crop_pixels: NonNegative = 1500
    """Pixels of the drawn class that the crop must show; it is drawn anew until it does."""
    crop_attempts: Positive = 10
    """Crops drawn at most; of these the one that shows most of the class is taken."""
    pairing_window: NonNegative = 0
    """Source positions that are exchanged among each other so that the k-th source image shares classes with the k-th
    target image; 0 leaves them. Needs class counts, so labels or predictions, in the target's shards."""


class CacheConfig(Section):
    """A node's copies of remote shards."""

    folder: str | None = None
    """On a local disk, shared by all processes of the node; None is $DIST_PCA_CACHE or ~/.cache/dist_pca/shards."""
    max_bytes: Positive = 50_000_000_000
    """All copies together; the least recently used make room."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a byte after which an attempt to fetch has failed."""
    retries: NonNegative = 6
    """Attempts after the first one, further and further apart."""


class DataConfig(Section):
    """Which shards are streamed and how images become crops."""

    source: str | tuple[WeightedShards, ...]
    """Folder of labelled source shards (holds manifest.json) or its http(s) or s3 URL, or a list of several, each
    `{shards: ..., weight: ...}`."""
    target: str | tuple[WeightedShards, ...] | None = None
    """Target shards, likewise; their labels, if any, are used for diagnosis only."""
    validation: str | None = None
    """Folder or URL of labelled shards that the run is scored on while it trains (training.validate_every)."""
    classes: tuple[str, ...] | str | None = None
    """Class names to train on, or a label set's name (cityscapes_19, synthia_16, synthia_13); others become ignore.
    None takes the shards' own class table, which must then be the same in both domains."""
    shorter_edge: tuple[Positive, Positive]
    """The shorter image edge is resized to a random integer in this closed range, in pixels."""
    crop: tuple[Positive, Positive]
    """Height and width of the random crop, in pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    photometric: PhotometricConfig = PhotometricConfig()
    workers: NonNegative = 2
    """Loader processes per rank and domain; 0 decodes in the training process."""
    shuffle_window: Positive = 4
    """Shards whose samples are shuffled together; reads stay within this many shards of each folder."""
    sampling: SamplingConfig = SamplingConfig()
    cache: CacheConfig = CacheConfig()
    max_corrupt_share: Fraction = 0.001
    """Samples that cannot be decoded are replaced by others; the run stops when they are more than this share of an
    epoch, or of all samples taken where these are more."""

    def folders(self, domain: Literal["source", "target"]) -> tuple[str, ...]:
        """Shard folders of a domain; none where the target is left out."""
        return tuple(part.shards for part in self._parts(domain))

    def weights(self, domain: Literal["source", "target"]) -> tuple[float, ...]:
        """Their weights."""
        return tuple(part.weight for part in self._parts(domain))

    def _parts(self, domain: Literal["source", "target"]) -> tuple[WeightedShards, ...]:
        parts = self.source if domain == "source" else self.target
        return (WeightedShards(shards=parts),) if isinstance(parts, str) else parts or ()

    @model_validator(mode="after")
    def _check_resize(self) -> Self:
        low, high = self.shorter_edge
        if low > high:
            raise ValueError(f"shorter_edge: the range [{low}, {high}] is empty; write the smaller value first")
        return self
