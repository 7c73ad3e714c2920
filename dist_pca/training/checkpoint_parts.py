"""The parts of a checkpoint: each names its file, yields the tensors to save, and restores them.

A new kind of state that is made of tensors is one more class here, and one more entry in `checkpoint_parts`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_pca.errors import UserError
from dist_pca.model.batch_norm import average_over_ranks, running_statistics
from dist_pca.objective.class_statistics import ClassStatistics
from dist_pca.training.checkpoint import CheckpointPart, abbreviate
from dist_pca.training.checkpoint_loading import load_tensors
from dist_pca.training.deepspeed import (
    gather,
    gather_network,
    optimizer_partitions,
    optimizer_steps,
    scatter,
    set_optimizer_state,
    torch_optimizer,
)
from dist_pca.training.ema import EMAShards


def checkpoint_parts(
    engine: Any, ema: EMAShards | None, statistics: ClassStatistics | None = None
) -> list[CheckpointPart]:
    """List the parts of a run's checkpoint, in the order in which they are saved and restored."""
    parts: list[CheckpointPart] = [ModelPart(engine, ema), OptimizerPart(engine)]
    if ema is not None:
        parts.append(AveragePart(engine, ema))
    parts.append(RankStatisticsPart(engine, ema))
    if statistics is not None:
        parts.append(ClassStatisticsPart(statistics, engine.device))
    return parts


def restore(parts: Iterable[CheckpointPart], checkpoint: Path) -> None:
    """Restore all parts from a checkpoint. Collective.

    Raises:
        UserError: a file is missing or damaged, or another network or optimiser wrote it.
    """
    for part in parts:
        part.restore(checkpoint)


class ModelPart:
    """Trained parameters in fp32 and buffers, with batch-norm statistics averaged over ranks."""

    file, optional = "model", False

    def __init__(self, engine: Any, ema: EMAShards | None) -> None:
        self._engine, self._ema = engine, ema

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield full parameters and buffers by name."""
        with averaged_statistics(self._engine, self._ema):
            yield from gather_network(self._engine)

    def restore(self, checkpoint: Path) -> None:
        """Do nothing: `load_model` has set the weights before DeepSpeed partitioned them."""


class OptimizerPart:
    """Optimiser state, `PARAMETER/KEY` by parameter name, and the number of updates as `step`."""

    file, optional = "optimizer", False

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield full optimiser tensors."""
        for key, partitions in optimizer_partitions(self._engine).items():
            for name, value in gather(self._engine, partitions):
                yield f"{name}/{key}", value
        if (steps := optimizer_steps(self._engine)) is not None:
            yield "step", torch.tensor(steps)

    def restore(self, checkpoint: Path) -> None:
        """Set the optimiser's state in its partitions."""
        found = load_tensors(checkpoint / f"{self.file}.safetensors")
        steps = found.pop("step", None)
        state: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in found.items():
            parameter, _, key = name.rpartition("/")
            state.setdefault(key, {})[parameter] = value
        kind = type(torch_optimizer(self._engine))
        keys = {"momentum_buffer"} if kind is torch.optim.SGD else {"exp_avg", "exp_avg_sq"}
        module = self._engine.module
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        other = state.keys() - keys or next((tensors.keys() ^ trained for tensors in state.values()), set())
        if other:
            raise UserError(
                f"{checkpoint}: its optimiser state does not fit {kind.__name__} of this network, because of "
                f"{abbreviate(sorted(other))}; use the optimizer.name and model.* it was trained with"
            )
        set_optimizer_state(self._engine, state, None if steps is None else float(steps))


class AveragePart:
    """Moving average of parameters and buffers, with batch-norm statistics averaged over ranks."""

    file, optional = "ema", False

    def __init__(self, engine: Any, ema: EMAShards) -> None:
        self._engine, self._ema = engine, ema

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield full averaged parameters and buffers by name."""
        with averaged_statistics(self._engine, self._ema):
            yield from gather_network(self._engine, *self._ema)

    def restore(self, checkpoint: Path) -> None:
        """Set this rank's shards; without a saved average they stay at the restored weights."""
        path = checkpoint / f"{self.file}.safetensors"
        if path.is_file():
            saved = load_tensors(path)
            scatter(self._engine, saved, self._ema.partitions)
            for name, value in self._ema.statistics.items():
                value.copy_(saved[name])


class RankStatisticsPart:
    """Batch-norm running statistics, which each rank accumulates over its own images, if they differ.

    The weights in a checkpoint hold their mean over ranks. Training resumes with each rank's own, so that a run that is
    saved and resumed at any step stays bit for bit the uninterrupted one. The file has one tensor, [ranks, values].
    """

    file, optional = "statistics", True

    def __init__(self, engine: Any, ema: EMAShards | None) -> None:
        self._engine, self._ema = engine, ema

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield one tensor [ranks, values]."""
        if (statistics := gather_statistics(self._engine, self._ema)) is not None:
            yield self.file, statistics

    def restore(self, checkpoint: Path) -> None:
        """Set this rank's statistics if as many ranks have saved theirs; otherwise keep the mean over ranks."""
        path = checkpoint / f"{self.file}.safetensors"
        if not path.is_file():
            return
        ranks = load_tensors(path)[self.file]
        statistics = _statistics(self._engine, self._ema)
        sizes = [value.numel() for value in statistics]
        if ranks.shape != (dist.get_world_size(), sum(sizes)):
            return
        for value, own in zip(statistics, torch.split(ranks[dist.get_rank()], sizes), strict=True):
            value.copy_(own)


class ClassStatisticsPart:
    """Moving class statistics, which are the same on all ranks."""

    file, optional = "classes", True

    def __init__(self, statistics: ClassStatistics, device: torch.device) -> None:
        self._statistics, self._device = statistics, device

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each statistic once there is one."""
        if len(self._statistics.seen):
            yield from vars(self._statistics).items()

    def restore(self, checkpoint: Path) -> None:
        """Set the statistics; without saved ones, the term begins anew."""
        path = checkpoint / f"{self.file}.safetensors"
        if path.is_file():
            for name, value in load_tensors(path).items():
                setattr(self._statistics, name, value.to(self._device))


def gather_statistics(engine: Any, ema: EMAShards | None) -> torch.Tensor | None:
    """Gather every rank's statistics and their moving averages on rank 0, [ranks, values]; None if all are the same.

    Collective. Other ranks get their own, [1, values].
    """
    own = _statistics(engine, ema)
    if not own:
        return None
    flat = torch.cat(own)
    # Where batch norm is synchronised they are all the same, and nothing need be gathered to see that.
    least, most = flat.clone(), flat.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if bool((least == most).all()):
        return None
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(flat, rows, dst=0)
    return flat[None] if rows is None else torch.stack(rows)


@contextmanager
def averaged_statistics(engine: Any, ema: EMAShards | None) -> Iterator[None]:
    """Replace all statistics by their mean over ranks while the context is open. Collective."""
    statistics = _statistics(engine, ema)
    own = [value.clone() for value in statistics]
    average_over_ranks(statistics)
    yield
    for value, before in zip(statistics, own, strict=True):
        value.copy_(before)


def _statistics(engine: Any, ema: EMAShards | None) -> list[torch.Tensor]:
    averages = {} if ema is None else ema.statistics
    return [*running_statistics(engine.module).values(), *averages.values()]
