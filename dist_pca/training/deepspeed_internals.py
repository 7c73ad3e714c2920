"""Every private field of DeepSpeed, and of Accelerate's plugin for it, that this package reads or sets.

An upgrade that moves one of them is absorbed here; `tests/training/test_deepspeed_internals.py` has a test for each,
which says what no longer works. Nothing here knows about checkpoints, averages or teachers.
"""

from collections.abc import Iterator
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
