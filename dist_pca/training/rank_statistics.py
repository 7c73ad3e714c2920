"""Batch-norm statistics that every rank keeps of its own images.

A checkpoint's weights hold their mean over ranks. Training goes on with each rank's own, and finds them again beside
the weights, so that a run saved at any step is the one that was not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_pca.model.batch_norm import average_over_ranks, running_statistics
from dist_pca.training.ema import Average

FILE = "statistics"
"""Name of the file in a checkpoint, and of the one tensor [ranks, values] in it."""


def gather_statistics(engine: Any, average: Average | None) -> torch.Tensor | None:
    """Every rank's statistics and their moving averages, [ranks, values]; None where all are the same. Collective."""
    own = _all(engine, average)
    if not own:
        return None
    flat = torch.cat(own)
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, flat)
    ranks = torch.stack(rows)
    return None if bool((ranks == ranks[0]).all()) else ranks


@contextmanager
def averaged_statistics(engine: Any, average: Average | None) -> Iterator[None]:
    """All statistics are their mean over ranks inside, and this rank's own again after. Collective."""
    statistics = _all(engine, average)
    own = [value.clone() for value in statistics]
    average_over_ranks(statistics)
    yield
    for value, before in zip(statistics, own, strict=True):
        value.copy_(before)


def load_statistics(engine: Any, average: Average | None, checkpoint: Path) -> None:
    """Take over this rank's own statistics, where a checkpoint has those of as many ranks; else all keep the mean."""
    file = checkpoint / f"{FILE}.safetensors"
    if not file.is_file():
        return
    ranks = load_file(file)[FILE]
    statistics = _all(engine, average)
    sizes = [value.numel() for value in statistics]
    if ranks.shape != (dist.get_world_size(), sum(sizes)):
        return
    for value, own in zip(statistics, torch.split(ranks[dist.get_rank()], sizes), strict=True):
        value.copy_(own)


def _all(engine: Any, average: Average | None) -> list[torch.Tensor]:
    averages = {} if average is None else average.statistics
    return [*running_statistics(engine.module).values(), *averages.values()]
