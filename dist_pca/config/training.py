"""`optimizer.*`, `schedule.*` and `training.*`: how weights move, how long, how big, and on what."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dist_pca.config.section import Duration, Fraction, NonNegative, Positive, Section, Weight


class OptimizerConfig(Section):
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""
    lr: Annotated[float, Field(gt=0)] = 2.5e-4
    """Base learning rate, of the backbone."""
    head_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the head and the projection over the backbone's."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of each of the backbone's layers over that of the layer after it, for example 0.9; the deepest has
    `lr`. Layers are as timm knows them. None gives all of them `lr`."""
    weight_decay: Weight = 5e-4
    """Weight decay; decoupled under adamw, which decays no norm, bias, position embedding, token or layer scale."""
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


class OffloadConfig(Section):
    """What is kept outside the accelerator's memory, at the price of time."""

    optimizer: Literal["none", "cpu", "nvme"] | None = None
    """Optimiser state, fp32 weights and their update: on the CPU under any ZeRO stage, on NVMe under stage 3. None
    takes the launcher's."""
    parameters: Literal["none", "cpu", "nvme"] | None = None
    """Parameters while they are not computed with; under ZeRO stage 3. None takes the launcher's."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for `nvme`."""

    @property
    def moves_optimizer(self) -> bool:
        """The optimiser is not in the accelerator's memory."""
        return self.optimizer in ("cpu", "nvme")

    @property
    def moves_parameters(self) -> bool:
        """Parameters are not in the accelerator's memory while nothing is computed with them."""
        return self.parameters in ("cpu", "nvme")

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if "nvme" in (self.optimizer, self.parameters) and self.nvme_path is None:
            raise ValueError("nvme_path: missing, and `nvme` needs it; name a folder on a local disk")
        return self


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
    max_micro_batch: Positive | None = None
    """Most images of either domain in a rank's micro-batch. `accumulation` is then the least that keeps to it on the
    ranks that there are, so that a run goes on with its batch on fewer GPUs. Needs accumulation_pool=update."""
    accumulation_pool: Literal["micro_batch", "update"] = "micro_batch"
    """What one loss is over where there are several micro-batches. `micro_batch`: each, over all ranks, has a loss and
    an association pool of its own, and the update takes their mean; the pool is then `accumulation` times smaller, and
    means are over one micro-batch's labelled pixels and kept cycles. `update`: all micro-batches have one loss and one
    pool, for one more forward pass, and the update is that of the bigger batch in one: at every association scope but
    `rank`, whose pool is then all that the rank sees in an update. Batch norm's batch is a micro-batch either way, so
    this holds exactly where it is frozen or absent."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the network; weights, norms' statistics and losses stay fp32."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, for example 0.999, which is then what is evaluated and exported; 0
    keeps none. Update t decays by t / (t + 1) where that is less."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; None takes the launcher's, or 2."""
    offload: OffloadConfig = OffloadConfig()
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept, beside the best one where there is validation."""
    validate_every: Positive | None = None
    """Steps between scores on data.validation, each followed by a checkpoint; the last step always has one. None takes
    checkpoint_every. The checkpoint of highest mean IoU is kept as `best`."""
    time_limit: Duration | None = None
    """Wall-clock time after which the run saves and leaves, to be started again: seconds, or [D-]HH:MM:SS. Under SLURM
    it leaves two minutes before the job's end anyway, where SLURM says when that is."""
    stall_timeout: Duration = 300.0
    """Time in which a rank that died or does not move ends all others; more than the longest step, first batch or
    checkpoint may take. Seconds, or [D-]HH:MM:SS."""
    max_bad_steps: Positive = 5
    """Steps in a row with a loss or gradient that is not finite, whose updates are skipped, before the run stops."""

    @model_validator(mode="after")
    def _check_micro_batch(self) -> Self:
        if self.max_micro_batch is not None and self.accumulation_pool != "update":
            raise ValueError(
                "max_micro_batch: updates would differ with the number of ranks; set accumulation_pool=update too"
            )
        return self
