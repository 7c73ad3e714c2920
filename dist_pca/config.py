"""What a run is: one typed tree, read from YAML and `key=value` overrides.

Every value a run depends on is a field here; its docstring is its documentation. Unknown keys, wrong types and
combinations that cannot work are refused before anything starts, naming the key, the file and the nearest valid key.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator
from typing_extensions import Self
from yaml import YAMLError

from dist_pca.errors import UserError
from dist_pca.section import Duration, Fraction, NonNegative, Positive, Section, Weight

Level = Literal["features", "predictions"]
Scope = Literal["pair", "rank", "node", "world"]
Implementation = Literal["auto", "reference", "blockwise", "triton"]
Exchange = Literal["auto", "gather", "ring"]
ProductType = Literal["fp32", "bf16"]


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
    classes: tuple[str, ...] | str | None = None
    """Class names to train on, or a label set's name (cityscapes_19, synthia_16, synthia_13); others become ignore.
    None takes the shards' own class table, which must then be the same in both domains."""
    shorter_edge: tuple[Positive, Positive]
    """The shorter image edge is resized to a random integer in this closed range, in pixels."""
    crop: tuple[Positive, Positive]
    """Height and width of the random crop, in pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
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


class ModelConfig(Section):
    """Which network."""

    backbone: str
    """Name of a timm model that can give feature maps."""
    weights: str = "hub"
    """Backbone weights: `hub`, `scratch`, a .safetensors or .pth file, or `package:NAME` for an installed package
    that carries one weight file."""
    output_stride: Literal[4, 8, 16, 32] | None = 8
    """Stride of the deepest feature map where the family can dilate; None leaves the family's own."""
    head: Literal["deeplab_v2", "pyramid"] = "deeplab_v2"
    """`deeplab_v2`: four dilated convolutions, summed, on the deepest map. `pyramid`: fuses all strides."""
    head_channels: Positive = 128
    """Width of the pyramid head."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Batch-norm statistics per rank, over all ranks, or the pretrained ones held fixed."""
    association_features: Literal["backbone", "head"] = "backbone"
    """Which pixel features are associated: the backbone's deepest map, or what the head's classifier reads."""
    joint_batch: bool = True
    """Pass both domains through the network as one batch (shared batch-norm statistics) rather than in turn."""


class LovaszConfig(Section):
    """Lovasz-Softmax on the source."""

    weight: Weight = 0.75
    """Weight of the term."""
    convention: Literal["mean", "released"] = "mean"
    """`mean`: the weight as written. `released`: times world size and accumulation, as the authors' runs had it."""
    scope: Literal["rank", "world"] = "world"
    """Pixels one loss is computed over: this rank's, or those of all ranks."""


class AssociationConfig(Section):
    """Cycle association of both domains' pixels."""

    weight: Weight = 0.1
    """Weight of the summed levels."""
    levels: tuple[Level, ...] = ("features", "predictions")
    """Levels that find cycles, each on its own."""
    scope: Scope = "world"
    """Pool of candidates: k-th source image with k-th target image, this rank, this node, or all ranks."""
    implementation: Implementation = "auto"
    """How it is computed: `reference` (dense), `blockwise` (streamed), `triton` (fused, on GPUs); `auto` takes the
    fastest that can run."""
    exchange: Exchange = "auto"
    """How ranks of a pool see each other's keys: `gather` holds all of them on every rank, `ring` passes them round in
    the same memory for any number of ranks; `auto` gathers while that is small."""
    dtype: ProductType = "fp32"
    """Type of the operands of matrix products; sums, softmaxes and statistics stay fp32."""
    wire_dtype: ProductType = "fp32"
    """Type of keys on their way between ranks; under `dtype: bf16` they travel in bf16 anyway."""
    deterministic: bool = False
    """Same bits on every run, on GPUs too, where the fastest sums have no fixed order."""
    position_budget: Positive | None = None
    """Most positions of each image that take part; None takes all, which the method means."""
    position_sampling: Literal["grid", "balanced"] = "grid"
    """What a budget takes: where random rows and columns cross, or on the source equally many of each class."""
    detach_statistics: bool = True
    """Stop the gradient through the contrast normalisation's mean and standard deviation."""
    diffusion: Fraction = 0.5
    """Share of a target pixel replaced by its image's similarity-weighted mean before association; 0 is off."""
    start_step: NonNegative = 0
    """First step with the term; earlier ones train on the source alone."""
    ramp_steps: NonNegative = 0
    """Steps over which the weight rises linearly from 0 after `start_step`."""


class SmoothnessConfig(Section):
    """Adaptive label smoothness on both domains."""

    weight: Weight = 0.01
    """Weight of the term, for each domain."""
    threshold: Annotated[float, Field(gt=0)] = 10.0
    """Mean negative log-probability (nats) below which predictions are sharpened and above which they are smoothed."""


class ObjectiveConfig(Section):
    """What is minimised."""

    adapt: bool = True
    """False trains on the source alone: the target is not read at all."""
    lovasz: LovaszConfig = LovaszConfig()
    association: AssociationConfig = AssociationConfig()
    smoothness: SmoothnessConfig = SmoothnessConfig()


class OptimizerConfig(Section):
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""
    lr: Annotated[float, Field(gt=0)] = 2.5e-4
    """Base learning rate, of the backbone."""
    head_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """The head's learning rate over the backbone's."""
    weight_decay: Weight = 5e-4
    """Weight decay; decoupled under adamw, where norms and biases are spared."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of adamw's moments."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of adamw's second moment. Weights whose gradient is far below it take small steps; far above
    it, every step is about `lr`, whatever the gradient's size."""
    clip_norm: Weight = 0.0
    """Largest global gradient norm; 0 does not clip."""


class ScheduleConfig(Section):
    """Learning rate over steps."""

    name: Literal["poly", "constant"] = "poly"
    """`poly`: (1 - step / horizon) ** power."""
    power: Weight = 0.9
    """Exponent of the poly schedule."""
    horizon: Positive | None = None
    """Step at which the poly schedule reaches zero; None takes the run's steps."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate first rises linearly."""


class TrainingConfig(Section):
    """How long, how big, and on what."""

    steps: Positive
    """Updates of the weights."""
    source_batch: Positive = 8
    """Source images per update, over all ranks and micro-batches."""
    target_batch: Positive = 8
    """Target images per update, over all ranks and micro-batches."""
    accumulation: Positive = 1
    """Micro-batches per update on each rank."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the network; weights, norms' statistics and losses stay fp32."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; None takes the launcher's."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept."""
    time_limit: Duration | None = None
    """Wall-clock time after which the run saves and leaves, to be started again: seconds, or [D-]HH:MM:SS. Under SLURM
    it leaves two minutes before the job's end anyway, where SLURM says when that is."""
    stall_timeout: Duration = 300.0
    """Time in which a rank that died or does not move ends all others; more than the longest step, first batch or
    checkpoint may take. Seconds, or [D-]HH:MM:SS."""
    max_bad_steps: Positive = 5
    """Steps in a row with a loss or gradient that is not finite, whose updates are skipped, before the run stops."""


class EvaluationConfig(Section):
    """How a trained network is tested."""

    input_size: tuple[Positive, Positive] | None = None
    """Height and width images are resized to; None resizes the shorter edge to the mean of data.shorter_edge."""
    label_sets: tuple[str, ...] = ()
    """Named subsets whose mean IoU is reported beside the whole table's."""
    window: tuple[Positive, Positive] | None = None
    """Height and width, in pixels of the resized image, of windows that the network sees one after another, which
    bounds memory; logits are averaged where they overlap. None shows it the whole image."""
    stride: tuple[Positive, Positive] | None = None
    """Pixels from one window to the next, down and across; None is two thirds of the window."""
    flip: bool = False
    """Average class probabilities with those of the mirrored image."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    """Factors of the input size at which the network sees the image; class probabilities are averaged."""
    aggregation: Fraction = 0.0
    """Share of each position's features, then of its class probabilities, that is replaced by the similarity-weighted
    mean of its image, or of its window (test-time aggregation; training's diffusion takes 0.5); 0 is off."""

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride is not None:
            if self.window is None:
                raise ValueError("stride: there is no window to move; set evaluation.window too")
            if any(step > edge for step, edge in zip(self.stride, self.window, strict=True)):
                raise ValueError(
                    f"stride: {list(self.stride)} leaves gaps between windows of {list(self.window)}; lower it"
                )
        return self


class RunConfig(Section):
    """One run."""

    name: str
    """Name of the run."""
    output: str = "runs"
    """Folder that holds run folders; this run's is output/name."""
    seed: NonNegative = 0
    """Seed of weights, order and augmentation."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output) / self.name

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.objective.adapt and self.data.target is None:
            raise ValueError(
                "data.target: missing while objective.adapt is true; name a shard folder or set objective.adapt=false"
            )
        if self.data.source == () or self.data.target == ():
            raise ValueError("data.source and data.target: an empty list; name at least one shard folder")
        scope = self.objective.association.scope
        pairs = {
            "objective.association.scope: `pair`": scope == "pair",
            "data.sampling.pairing_window": self.data.sampling.pairing_window > 0,
        }
        for key, pairing in pairs.items():
            if self.objective.adapt and pairing and self.training.source_batch != self.training.target_batch:
                raise ValueError(
                    f"{key} needs training.source_batch equal to training.target_batch, "
                    f"got {self.training.source_batch} and {self.training.target_batch}"
                )
        horizon = self.schedule.horizon
        if horizon is not None and horizon < self.training.steps:
            raise ValueError(f"schedule.horizon: {horizon} is below training.steps {self.training.steps}")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file and `key=value` overrides (dotted keys, YAML values; later ones win).

    Raises:
        UserError: the file is missing or not YAML, an override is malformed, a key is unknown (the nearest valid key
            is named), a value has the wrong type, or values contradict each other.
    """
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: write key=value, for example training.steps=100")
    try:
        tree = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise UserError(f"config {path}: {' '.join(str(error).split())}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"config {path}: " + "; ".join(_explain(detail) for detail in error.errors())) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved run as YAML that `load_config` reads back to an equal one."""
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), path)


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, _all_keys(RunConfig), n=1, cutoff=0.0)[0]
        return f"{key}: unknown key; the nearest is {nearest}"
    if detail["type"] == "missing":
        return f"{key}: required and missing"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}.{message}" if key else message
    return f"{key}: {message}, got {detail['input']!r}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
