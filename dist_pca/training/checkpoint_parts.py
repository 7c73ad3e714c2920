"""The parts of a checkpoint: each names its file, yields the tensors to save, and restores them.

A new kind of state that is made of tensors is one more class here, and one more entry in `checkpoint_parts`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_pca.errors import UserError
from dist_pca.training.checkpoint import abbreviate, has_ema, load_tensors
from dist_pca.training.deepspeed_internals import torch_optimizer
from dist_pca.training.ema import EMAShards, gather_network, load_shards
from dist_pca.training.rank_statistics import FILE, averaged_statistics, gather_statistics, load_statistics
from dist_pca.training.zero import gather, optimizer_partitions, optimizer_steps, set_optimizer_state


class CheckpointPart(Protocol):
    """State that a checkpoint holds in a file of its own."""

    file: str
    """Name of the file, without .safetensors."""
    optional: bool
    """Without tensors there is no file."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors to save by name, one at a time. Collective; all ranks must exhaust it."""

    def restore(self, checkpoint: Path) -> None:
        """Set the state to that of a checkpoint. Collective.

        Raises:
            UserError: the file is missing or damaged, or another network or optimiser wrote it.
        """


def checkpoint_parts(engine: Any, ema: EMAShards | None) -> list[CheckpointPart]:
    """List the parts of a run's checkpoint, in the order in which they are saved and restored."""
    averages = [] if ema is None else [AveragePart(engine, ema)]
    return [ModelPart(engine, ema), OptimizerPart(engine), *averages, RankStatisticsPart(engine, ema)]


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
            yield from gather_network(self._engine, None)

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
            yield from gather_network(self._engine, self._ema)

    def restore(self, checkpoint: Path) -> None:
        """Set this rank's shards; without a saved average they stay at the restored weights."""
        if has_ema(checkpoint):
            load_shards(self._ema, self._engine, load_tensors(checkpoint / f"{self.file}.safetensors"))


class RankStatisticsPart:
    """Batch-norm statistics of each rank, if they differ."""

    file, optional = FILE, True

    def __init__(self, engine: Any, ema: EMAShards | None) -> None:
        self._engine, self._ema = engine, ema

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield one tensor [ranks, values]."""
        if (statistics := gather_statistics(self._engine, self._ema)) is not None:
            yield FILE, statistics

    def restore(self, checkpoint: Path) -> None:
        """Set this rank's statistics, if as many ranks have saved theirs."""
        load_statistics(self._engine, self._ema, checkpoint)
