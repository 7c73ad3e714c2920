"""Exponential moving average (EMA) of the weights under every ZeRO stage.

Each rank averages the partitions that it owns, so the network is never gathered for it. Running statistics of batch
norms, of which every rank has its own, are averaged in the same way; other buffers are those of the trained network.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from dist_pca.model.batch_norm import running_statistics
from dist_pca.training.zero import fp32_partitions, gather_parameters, persistent_buffers, scatter


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
def load_shards(ema: EMAShards, engine: Any, saved: Mapping[str, torch.Tensor]) -> None:
    """Set an average to saved full tensors by name."""
    scatter(engine, saved, ema.partitions)
    for name, value in ema.statistics.items():
        value.copy_(saved[name])


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


def gather_network(engine: Any, ema: EMAShards | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every full parameter and persistent buffer by name, one at a time: trained values, or their averages.

    Collective; all ranks must exhaust it. Batch-norm statistics are this rank's.
    """
    yield from gather_parameters(engine, fp32_partitions(engine) if ema is None else ema.partitions)
    statistics = {} if ema is None else ema.statistics
    yield from ((name, statistics.get(name, buffer)) for name, buffer in persistent_buffers(engine.module))
