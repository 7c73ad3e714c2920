"""Batch-norm running statistics, which each rank accumulates over its own images.

A checkpoint's weights hold their mean over ranks. Each rank's own are saved beside them, and training resumes with
those, so that a run that is saved and resumed at any step stays bit for bit the uninterrupted one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_pca.model.batch_norm import average_over_ranks, running_statistics
from dist_pca.training.ema import EMAShards

FILE = "statistics"
"""Name of the file in a checkpoint, and of the one tensor [ranks, values] in it."""


def gather_statistics(engine: Any, ema: EMAShards | None) -> torch.Tensor | None:
    """Gather every rank's statistics and their moving averages, [ranks, values]; None if all ranks have the same.

    Collective.
    """
    own = _statistics(engine, ema)
    if not own:
        return None
    flat = torch.cat(own)
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, flat)
    ranks = torch.stack(rows)
    return None if bool((ranks == ranks[0]).all()) else ranks


@contextmanager
def averaged_statistics(engine: Any, ema: EMAShards | None) -> Iterator[None]:
    """Replace all statistics by their mean over ranks while the context is open. Collective."""
    statistics = _statistics(engine, ema)
    own = [value.clone() for value in statistics]
    average_over_ranks(statistics)
    yield
    for value, before in zip(statistics, own, strict=True):
        value.copy_(before)


def load_statistics(engine: Any, ema: EMAShards | None, checkpoint: Path) -> None:
    """Restore this rank's statistics from a checkpoint of as many ranks; otherwise keep the mean over ranks."""
    file = checkpoint / f"{FILE}.safetensors"
    if not file.is_file():
        return
    ranks = load_file(file)[FILE]
    statistics = _statistics(engine, ema)
    sizes = [value.numel() for value in statistics]
    if ranks.shape != (dist.get_world_size(), sum(sizes)):
        return
    for value, own in zip(statistics, torch.split(ranks[dist.get_rank()], sizes), strict=True):
        value.copy_(own)


def _statistics(engine: Any, ema: EMAShards | None) -> list[torch.Tensor]:
    averages = {} if ema is None else ema.statistics
    return [*running_statistics(engine.module).values(), *averages.values()]
