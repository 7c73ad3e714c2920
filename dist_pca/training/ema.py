"""Exponential moving average (EMA) of the weights under every ZeRO stage, and the mean teacher that it is.

Each rank averages the partitions that it owns, so the network is never gathered for it. Running statistics of batch
norms, of which every rank has its own, are averaged in the same way; other buffers are those of the trained network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dist_pca.model.batch_norm import running_statistics
from dist_pca.training.deepspeed import (
    fp32_partitions,
    swapped_parameters,
)


class EMAShards(NamedTuple):
    """This rank's shards of the moving average."""

    partitions: list[torch.Tensor]
    """Averaged weights, in the layout of `zero.fp32_partitions`."""
    statistics: dict[str, torch.Tensor]
    """Averaged running means and variances of batch norms, by name."""


@torch.no_grad()
def init_ema(engine: Any) -> EMAShards:
    """Start an average at the current weights."""
    return EMAShards(
        [partition.detach().clone() for partition in fp32_partitions(engine)],
        {name: value.detach().clone() for name, value in running_statistics(engine.module).items()},
    )


@torch.no_grad()
def update_ema(ema: EMAShards, engine: Any, decay: float, step: int) -> None:
    """Update the average with the weights after step `step` (from 1).

    Until it reaches `decay`, the decay is step / (step + 1), which makes the average the plain mean of all weights so
    far: a short run is not held back by its initial weights.
    """
    share = 1 - min(decay, step / (step + 1))
    for mean, value in zip(ema.partitions, fp32_partitions(engine), strict=True):
        mean.lerp_(value, share)
    for name, value in running_statistics(engine.module).items():
        ema.statistics[name].lerp_(value, share)


@contextmanager
def teacher_weights(engine: Any, ema: EMAShards) -> Iterator[None]:
    """Run the engine's network as the teacher while the context is open (Tarvainen and Valpola, 2017). Collective.

    The network is in evaluation mode with the averaged weights and running statistics: no dropout and no drop path, and
    an image's outputs do not depend on the rest of its batch. No gradients are recorded.

    Args:
        engine: DeepSpeed's, in training mode.
        ema: The moving average of its weights.
    """
    statistics = running_statistics(engine.module)
    own = {name: value.clone() for name, value in statistics.items()}
    with torch.no_grad(), swapped_parameters(engine, ema.partitions):
        for name, value in statistics.items():
            value.copy_(ema.statistics[name])
        engine.eval()
        yield
        engine.train()
        for name, value in statistics.items():
            value.copy_(own[name])
