"""Exponential moving average of the weights under every ZeRO stage.

Each rank averages the partitions that it owns, so the network is never gathered for it. Running statistics of batch
norms, which every rank holds whole, are averaged likewise; all other buffers are those of the trained network.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from dist_pca.model.batch_norm import running_statistics
from dist_pca.training.zero import fp32_partitions, gather_parameters, persistent_buffers, scatter


class Average(NamedTuple):
    """Averages that one rank holds."""

    partitions: list[torch.Tensor]
    """Of the weights, in the layout of `zero.fp32_partitions`."""
    statistics: dict[str, torch.Tensor]
    """Running means and variances of batch norms, by name."""


@torch.no_grad()
def start_average(engine: Any, saved: Mapping[str, torch.Tensor] | None = None) -> Average:
    """Averages that begin at the weights as they are, or go on from whole saved tensors by name."""
    average = Average(
        [partition.detach().clone() for partition in fp32_partitions(engine)],
        {name: value.detach().clone() for name, value in running_statistics(engine.module).items()},
    )
    if saved is not None:
        scatter(engine, saved, average.partitions)
        for name, value in average.statistics.items():
            value.copy_(saved[name])
    return average


@torch.no_grad()
def update_average(average: Average, engine: Any, decay: float, step: int) -> None:
    """Take in the weights after update number `step` (from 1).

    Until it reaches `decay`, the decay is step / (step + 1), which makes the average the plain mean of all weights so
    far: a short run is not held back by the weights that it began with.
    """
    share = 1 - min(decay, step / (step + 1))
    for mean, value in zip(average.partitions, fp32_partitions(engine), strict=True):
        mean.lerp_(value, share)
    for name, value in running_statistics(engine.module).items():
        average.statistics[name].lerp_(value, share)


def whole_network(engine: Any, average: Average | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer by name, one after the other: the trained ones, or their averages.

    Collective; to be exhausted by all ranks. Batch-norm statistics are this rank's.
    """
    yield from gather_parameters(engine, fp32_partitions(engine) if average is None else average.partitions)
    statistics = {} if average is None else average.statistics
    yield from ((name, statistics.get(name, buffer)) for name, buffer in persistent_buffers(engine.module))
