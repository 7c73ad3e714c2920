"""`optimizer.*`, `schedule.*` and `training.*`: optimiser, learning rate schedule and training loop."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from typing_extensions import Self

from dist_pca.config.section import Decay, Duration, Fraction, NonNegative, Positive, PositiveNumber, Section, Weight


class OptimizerConfig(Section):
    """Optimiser and its hyperparameters."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser: SGD with momentum, or AdamW."""
    lr: PositiveNumber = 2.5e-4
    """Base learning rate; that of the backbone."""
    head_multiplier: PositiveNumber = 1.0
    """Learning rate of the head and the projection, as a multiple of `lr`."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Layer-wise learning rate decay: the ratio of a backbone layer's learning rate to that of the next layer, for
    example 0.9; the deepest layer has `lr`. Layers are defined by timm. None gives all layers `lr`."""
    backbone_multipliers: dict[str, PositiveNumber] = {}
    """Learning rates of parts of the backbone, as multiples of what they have otherwise, by names as in
    `model.freeze`, for example `{stem: 0.1, layer1: 0.5}`; a later part overrides an earlier one."""
    weight_decay: Weight = 5e-4
    """Weight decay; adamw decouples it and excludes norms, biases, position embeddings, tokens and layer scales."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of adamw's moments."""
    epsilon: PositiveNumber = 1e-8
    """Epsilon of adamw, added to the square root of the second moment. Weights whose gradient is far below it make
    small steps; far above it, every step is about `lr`, whatever the gradient's size."""
    clip_norm: Weight = 0.0
    """Global gradient norm above which gradients are clipped; 0 is off."""


class ScheduleConfig(Section):
    """Learning rate schedule."""

    name: Literal["poly", "constant"] = "poly"
    """Factor on the learning rate. `poly`: (1 - step / horizon) ** power."""
    power: Weight = 0.9
    """Exponent of the poly schedule."""
    horizon: Positive | None = None
    """Step at which the poly schedule reaches zero; None is training.steps. A run that resumes with more steps keeps
    its schedule if this is set to the steps that it had, together with `minimum`."""
    minimum: Fraction = 0.0
    """Least factor of the poly schedule; a run may train beyond the horizon at it."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up at the start."""
    batch_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Further factor on the learning rate, for large batches: the source images of an update over `base_batch`
    (`linear`), or its square root (`sqrt`)."""
    base_batch: Positive | None = None
    """Source images per update for which `optimizer.lr` is right as it is; needed for batch_scaling."""

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if self.batch_scaling != "none" and self.base_batch is None:
            raise ValueError("base_batch: missing, but batch_scaling needs it; give the batch that optimizer.lr is for")
        return self


class OffloadConfig(Section):
    """Offload of optimiser state and parameters to CPU memory or NVMe; saves GPU memory and costs time."""

    optimizer: Literal["none", "cpu", "nvme"] | None = None
    """Where optimiser state and fp32 weights are kept and updated: on the CPU under any ZeRO stage, on NVMe under
    stage 3. None takes the launcher's setting."""
    parameters: Literal["none", "cpu", "nvme"] | None = None
    """Where parameters are kept while they are not in use; under ZeRO stage 3 only. None takes the launcher's
    setting."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for `nvme`."""

    @property
    def moves_optimizer(self) -> bool:
        """Whether the optimiser state is offloaded."""
        return self.optimizer in ("cpu", "nvme")

    @property
    def moves_parameters(self) -> bool:
        """Whether parameters are offloaded while they are not in use."""
        return self.parameters in ("cpu", "nvme")

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if "nvme" in (self.optimizer, self.parameters) and self.nvme_path is None:
            raise ValueError("nvme_path: missing, but `nvme` needs it; give a folder on a local disk")
        return self


BATCH_KEYS = {f"{domain}_batch": f"{domain}_batch_per_rank" for domain in ("source", "target")}
"""Key of a batch on each rank by that of the batch on all of them; a run is given one of the two."""


class TrainingConfig(Section):
    """Steps, batch sizes, precision, checkpoints and limits of the training loop."""

    steps: Positive
    """Number of optimiser steps."""
    source_batch: Positive = 8
    """Source images per update, over all ranks and micro-batches."""
    target_batch: Positive = 8
    """Target images per update, over all ranks and micro-batches."""
    source_batch_per_rank: Positive | None = None
    """Source images per update on each rank, over its micro-batches, instead of `source_batch`, which is then this
    times the number of ranks. The run's saved config keeps the one of the two that was given, and that one stays the
    same when the run is resumed on another number of ranks."""
    target_batch_per_rank: Positive | None = None
    """Target images per update on each rank, in the same way."""
    accumulation: Positive = 1
    """Micro-batches per update on each rank."""
    max_micro_batch: Positive | None = None
    """Largest number of images of either domain in a rank's micro-batch. `accumulation` is then the smallest number
    that satisfies this limit at the current world size, so that a run can resume with the same batch on fewer GPUs.
    Needs grad_cache."""
    grad_cache: bool = False
    """Compute one loss over all micro-batches of an update, with common candidates, at the cost of one more forward
    pass (GradCache, Gao et al. 2021). The update then equals that of one large batch, except at association scope
    `rank`, where the candidates are all pixels of the rank in the update. Batch norm normalises each micro-batch either
    way, so the equality is exact only if batch norm is frozen or absent. False: each micro-batch, over all ranks, has
    its own loss and its own candidates, and the update averages the losses; there are `accumulation` times fewer
    candidates, and means are over one micro-batch's labelled pixels and kept cycles."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast data type of the network; weights, norm statistics and losses stay fp32."""
    ema_decay: Decay = 0.0
    """Decay of an exponential moving average of the weights (EMA), for example 0.999. If it is not 0, the average is
    what is evaluated and exported. The decay of update t is at most t / (t + 1)."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; None takes the launcher's, or 2 if it has none."""
    offload: OffloadConfig = OffloadConfig()
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints; one is always saved after the last step."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints that are kept, in addition to the best one if there is validation."""
    validate_every: Positive | None = None
    """Steps between validations on data.validation, each followed by a checkpoint; the last step is always validated.
    None is checkpoint_every. The checkpoint with the highest mean IoU is kept as `best`."""
    time_limit: Duration | None = None
    """Wall-clock time after which the run saves a checkpoint and exits, to be restarted: seconds, or [D-]HH:MM:SS.
    Under SLURM it exits two minutes before the job's end in any case, if SLURM provides the end time."""
    stall_timeout: Duration = 300.0
    """Time after which a dead or stalled rank makes all other ranks exit; it must be longer than the longest step,
    first batch or checkpoint. Seconds, or [D-]HH:MM:SS."""
    max_non_finite_steps: Positive = 5
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops; their updates are
    skipped."""

    @model_validator(mode="before")
    @classmethod
    def _choose_batches(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for in_all, per_rank in BATCH_KEYS.items():
            if values.get(per_rank) is None:
                continue
            if values.get(in_all) is not None:
                raise ValueError(
                    f"{in_all}: is {values[in_all]}, and {per_rank} is {values[per_rank]}; give one of the two"
                )
            values = {key: value for key, value in values.items() if key != in_all}
        return values

    @model_serializer(mode="wrap")
    def _leave_out_products(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the batch that was given, and null for the one that follows from it and the number of ranks."""
        values: dict[str, Any] = serialize(self)
        return values | {in_all: None for in_all, per_rank in BATCH_KEYS.items() if values.get(per_rank) is not None}

    @model_validator(mode="after")
    def _check_micro_batch(self) -> Self:
        if self.max_micro_batch is not None and not self.grad_cache:
            raise ValueError(
                "max_micro_batch: updates would depend on the world size; set training.grad_cache=true too"
            )
        return self
