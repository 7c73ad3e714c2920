"""`optimizer.*`, `schedule.*` and `training.*`: how weights move, how long, how big, and on what."""

from typing import Annotated, Literal

from pydantic import Field

from dist_pca.config.section import Duration, Fraction, NonNegative, Positive, Section, Weight


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
