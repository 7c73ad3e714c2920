"""Full tensors in and out of DeepSpeed's partitions, by parameter name and independent of the number of ranks.

Each rank owns a few flat fp32 tensors, its partitions: of the parameters, and in the same layout of everything that is
kept for each of them, such as an optimiser's moments and moving averages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_pca.training.deepspeed_internals import (
    PartitionSlice,
    flat_partitions,
    gather_persistent,
    gathered,
    model_weight_groups,
    partition_slice,
    release_gathered,
    shard,
    swapped_in,
    torch_optimizer,
)


class Fragment(NamedTuple):
    """The part of one parameter that this rank's partitions hold; perhaps none of it."""

    name: str
    where: PartitionSlice

    def of(self, partitions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Select the fragment from tensors in the layout of `fp32_partitions`, as a view, [size]."""
        return partitions[self.where.partition][self.where.offset :][: self.where.size]


def fp32_partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 parameters as they are updated, flat; copies where they are on NVMe."""
    return [partition for partition, _ in _partitions_and_state(engine)]


def optimizer_partitions(engine: Any) -> dict[str, list[torch.Tensor]]:
    """This rank's optimiser tensors by key, each in the layout of `fp32_partitions`; empty before a step."""
    states = [state for _, state in _partitions_and_state(engine)]
    return {key: [state[key] for state in states] for key in sorted(states[0]) if key != "step"}


def optimizer_steps(engine: Any) -> float | None:
    """Updates that the optimiser has counted; None where it does not count."""
    state = torch_optimizer(engine).state.get(flat_partitions(engine)[0], {})
    return float(state["step"]) if "step" in state else None


def set_optimizer_state(engine: Any, tensors: Mapping[str, Mapping[str, torch.Tensor]], steps: float | None) -> None:
    """Set the optimiser's state.

    Args:
        engine: DeepSpeed's.
        tensors: Full tensors by key, such as `exp_avg`, and parameter name.
        steps: Updates counted; None where the optimiser does not count.
    """
    values = {key: [torch.zeros_like(partition) for partition in fp32_partitions(engine)] for key in tensors}
    for key, full in tensors.items():
        scatter(engine, full, values[key])
    for index, flat in enumerate(flat_partitions(engine)):
        with swapped_in(engine, index, write=True):
            state = torch_optimizer(engine).state.setdefault(flat, {})
            state.update({key: values[key][index] for key in tensors})
            if steps is not None:
                state["step"] = torch.tensor(steps)


def gather_parameters(engine: Any, partitions: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter in fp32 by name, one at a time; those that are not trained as they are.

    Collective; all ranks must exhaust it.

    Args:
        engine: DeepSpeed's.
        partitions: Values of the trained ones, in the layout of `fp32_partitions`.
    """
    yield from gather(engine, partitions)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with gathered(parameter):
                yield name, parameter.detach().float()


def gather(engine: Any, partitions: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a full fp32 tensor for every trained parameter, one at a time, on the engine's device.

    Collective; all ranks must exhaust it.

    Args:
        engine: DeepSpeed's.
        partitions: Values in the layout of `fp32_partitions`.
    """
    for fragment in fragments(engine):
        where = fragment.where
        full = torch.zeros(where.shape.numel(), dtype=torch.float32, device=engine.device)
        full[where.start :][: where.size].copy_(fragment.of(partitions))
        dist.all_reduce(full)
        yield fragment.name, full.view(where.shape)


def scatter(engine: Any, tensors: Mapping[str, torch.Tensor], partitions: Sequence[torch.Tensor]) -> None:
    """Copy this rank's fragments of full tensors, by parameter name, into partitions."""
    for fragment in fragments(engine):
        start, size = fragment.where.start, fragment.where.size
        fragment.of(partitions).copy_(tensors[fragment.name].flatten()[start:][:size])


@contextmanager
def swapped_parameters(engine: Any, partitions: Sequence[torch.Tensor]) -> Iterator[None]:
    """Compute with other values of the trained parameters while the context is open. Collective.

    Stage 3 exchanges every rank's shards with `partitions`, which adds no memory; stages 1 and 2, where every rank has
    the whole network, gather the values into a second copy of its weights that lives as long as the context.

    Args:
        engine: DeepSpeed's.
        partitions: fp32, in the layout of `fp32_partitions`; unchanged when the context is over.
    """
    if engine.zero_optimization_stage() == 3:
        _exchange_shards(engine, partitions)
        yield
        _exchange_shards(engine, partitions)
        return
    replaced = []
    for (flat, group), partition in zip(model_weight_groups(engine), partitions, strict=True):
        full = torch.empty_like(flat)
        dist.all_gather(list(full.chunk(dist.get_world_size())), partition.to(flat.device, flat.dtype))
        for parameter in group:
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            replaced.append((parameter, parameter.data))
            parameter.data = full[offset : offset + parameter.numel()].view_as(parameter)
    yield
    for parameter, data in replaced:
        parameter.data = data


def fragments(engine: Any) -> list[Fragment]:
    """This rank's fragment of each trained parameter, in the order of names, which all ranks share."""
    return [
        Fragment(name, partition_slice(engine, parameter))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that a state dict holds, by name."""
    names = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in names]


def _partitions_and_state(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Yield each partition with its optimiser tensors by key; copies where the originals go back to NVMe."""
    for index, flat in enumerate(flat_partitions(engine)):
        with swapped_in(engine, index) as on_nvme:
            state = torch_optimizer(engine).state.get(flat, {})
            tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
            if on_nvme:
                yield flat.detach().clone(), {key: value.clone() for key, value in tensors.items()}
            else:
                yield flat, tensors


def _exchange_shards(engine: Any, partitions: Sequence[torch.Tensor]) -> None:
    """Exchange this rank's stage 3 shards of all trained parameters with `partitions`. Collective."""
    release_gathered(engine)
    parameters = dict(engine.module.named_parameters())
    for fragment in fragments(engine):
        weights = shard(parameters[fragment.name])[: fragment.where.size]
        other = fragment.of(partitions)
        before = weights.to(other.device, copy=True)
        weights.copy_(other)
        other.copy_(before)
    gather_persistent(engine)
