"""DeepSpeed's engine seen from outside: its private fields, and full tensors in and out of its partitions.

Every private field of DeepSpeed, and of Accelerate's plugin for it, that this package reads or sets is here. An upgrade
that moves one of them is absorbed here; `tests/training/test_deepspeed.py` has a test for each, which says what no
longer works.

Each rank owns a few flat fp32 tensors, its partitions: of the parameters, and in the same layout of everything that is
kept for each of them, such as an optimiser's moments and moving averages. Full tensors go by parameter name and do not
depend on the number of ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class PartitionSlice(NamedTuple):
    """Where a rank's flat fp32 partitions hold a part of one parameter."""

    shape: torch.Size
    """Shape of the whole parameter."""
    start: int
    """First element of the part in the flattened parameter."""
    partition: int
    """Index of the partition."""
    offset: int
    """First element of the part in the partition."""
    size: int
    """Number of elements; 0 where this rank holds none of the parameter."""


def flat_partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 parameters, which the optimiser updates; read them inside `swapped_in`."""
    optimizer = engine.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    return list(optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups)


def partition_slice(engine: Any, parameter: Any) -> PartitionSlice:
    """Locate a trained parameter in this rank's `flat_partitions`."""
    if is_sharded(parameter):
        partition, offset, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        start = min(dist.get_rank() * size, parameter.ds_numel)
        # The last rank's part is padded.
        return PartitionSlice(
            torch.Size(parameter.ds_shape), start, partition, offset, min(size, parameter.ds_numel - start)
        )
    mapping = parameter._hp_mapping
    if mapping is None:
        return PartitionSlice(parameter.shape, 0, 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return PartitionSlice(parameter.shape, low.start, mapping.param_group_index, high.start, low.numel)


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The wrapped torch optimiser, whose state is keyed by the tensors of `flat_partitions`."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


@contextmanager
def swapped_in(engine: Any, index: int, *, write: bool = False) -> Iterator[bool]:
    """Keep a partition and its optimiser state in memory while the context is open.

    Args:
        engine: DeepSpeed's.
        index: Index of the partition.
        write: Write them back to NVMe at the end, rather than drop the copy.

    Yields:
        Whether they are on NVMe otherwise.
    """
    optimizer = engine.optimizer
    on_nvme = engine.zero_optimization_stage() == 3 and optimizer._swappable_optimizer_subgroup(index)
    if on_nvme:
        optimizer._optimizer_states_and_gradient_swap_in(index)
    yield on_nvme
    if on_nvme and write:
        optimizer._optimizer_states_and_gradient_swap_out(index)
    elif on_nvme:
        optimizer._release_swap_buffers(index)


def model_weight_groups(engine: Any) -> list[tuple[torch.Tensor, list[torch.nn.Parameter]]]:
    """Flat model weights of each group under stages 1 and 2, and the parameters that are views of them.

    Each rank's partition is an equal part of the flat tensor, in rank order.
    """
    optimizer = engine.optimizer
    return list(zip(optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True))


def is_sharded(parameter: Any) -> bool:
    """Whether stage 3 keeps only a shard of a parameter on each rank between uses."""
    return hasattr(parameter, "ds_id")


def shard(parameter: Any) -> torch.Tensor:
    """This rank's shard of a parameter under stage 3: flat, padded to equal sizes on all ranks."""
    flat: torch.Tensor = parameter.ds_tensor.view(-1)
    return flat


def gathered(parameter: Any) -> AbstractContextManager[None]:
    """Gather a parameter that stage 3 has sharded while the context is open; others are whole anyway. Collective."""
    if not is_sharded(parameter):
        return nullcontext()
    # Not at the top: reading a checkpoint does not need DeepSpeed.
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[None] = GatheredParameters([parameter])
    return context


def release_gathered(engine: Any) -> None:
    """Under stage 3, leave of every parameter only this rank's shard. Collective."""
    engine.optimizer._partition_all_parameters()


def gather_persistent(engine: Any) -> None:
    """Under stage 3, rebuild from their shards the small parameters that stay whole on every rank. Collective."""
    persistent = engine.optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)


def disable_grad_scaler(engine: Any) -> None:
    """Switch off the scaler that DeepSpeed makes for fp16 autocast; `set_loss_scale` takes its place."""
    engine.optimizer.torch_autocast_gradscaler = None


def set_loss_scale(engine: Any, scale: float) -> None:
    """Multiply losses by a scale from now on, and divide gradients and their norm by it."""
    engine.optimizer.override_loss_scale(scale)


def disable_cpu_reduction_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction for CPUs, which fails without a C++ compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_plugin(values: dict[str, Any]) -> Any:
    """Accelerate's DeepSpeed plugin for a DeepSpeed configuration, without its call into transformers."""
    from accelerate import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):  # type: ignore[misc]
        """Accelerate's plugin without the reference that serves models of transformers alone."""

        def set_deepspeed_weakref(self) -> None:
            return

    return Plugin(hf_ds_config=values, zero3_init_flag=False)


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


def gather_network(
    engine: Any, partitions: Sequence[torch.Tensor] | None = None, statistics: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every full parameter in fp32, and every persistent buffer, by name, one at a time.

    Parameters that are not trained are given as they are. Collective; all ranks must exhaust it.

    Args:
        engine: DeepSpeed's.
        partitions: Values of the trained parameters, in the layout of `fp32_partitions`; None yields the trained ones.
        statistics: Values of batch-norm statistics by name; others are this rank's.
    """
    yield from gather(engine, fp32_partitions(engine) if partitions is None else partitions)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with gathered(parameter):
                yield name, parameter.detach().float()
    known = statistics or {}
    yield from ((name, known.get(name, buffer)) for name, buffer in persistent_buffers(engine.module))


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
