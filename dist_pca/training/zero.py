"""Whole tensors in and out of DeepSpeed's partitions, by parameter name and independent of the number of ranks.

Each rank owns a few flat fp32 tensors, its partitions: of the parameters, and in the same layout of everything that is
kept for each of them, such as an optimiser's moments and running averages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Fragment(NamedTuple):
    """The part of one parameter that this rank's partitions hold; perhaps none of it."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    """Its first element in the flattened parameter."""
    partition: int
    """Which partition."""
    offset: int
    """Its first element there."""
    size: int
    """Elements."""


def partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 parameters as they are updated, flat; copies of those that are on NVMe."""
    return [held for held, _ in _all_held(engine)]


def optimizer_partitions(engine: Any) -> dict[str, list[torch.Tensor]]:
    """This rank's optimiser tensors by key, each in the layout of `partitions`; empty before a step."""
    slots = [slot for _, slot in _all_held(engine)]
    return {key: [slot[key] for slot in slots] for key in sorted(slots[0]) if key != "step"}


def optimizer_steps(engine: Any) -> float | None:
    """Updates that the optimiser has counted; None where it does not."""
    slot = engine.optimizer.optimizer.state.get(_flat(engine)[0], {})
    return float(slot["step"]) if "step" in slot else None


def set_optimizer(engine: Any, state: Mapping[str, Mapping[str, torch.Tensor]], steps: float | None) -> None:
    """Put back whole optimiser tensors, by key and parameter name, and the updates counted."""
    values = {key: [torch.zeros_like(partition) for partition in partitions(engine)] for key in state}
    for key, tensors in state.items():
        scatter(engine, tensors, values[key])
    for index, flat in enumerate(_flat(engine)):
        with _at_hand(engine, index, write=True):
            slot = engine.optimizer.optimizer.state.setdefault(flat, {})
            slot.update({key: values[key][index] for key in state})
            if steps is not None:
                slot["step"] = torch.tensor(steps)


def whole_parameters(engine: Any, values: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter in fp32 by name, one after the other; those that are not trained as they are.

    Collective; to be exhausted by all ranks.

    Args:
        engine: DeepSpeed's.
        values: Of the trained ones, in the layout of `partitions`.
    """
    yield from gather(engine, values)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with _present(parameter):
                yield name, parameter.detach().float()


def gather(engine: Any, values: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trained parameter's whole tensor, one after the other, from values in the layout of `partitions`.

    Collective; to be exhausted by all ranks. Tensors are on the engine's device, for the caller to keep or not.
    """
    for fragment in fragments(engine):
        whole = torch.zeros(fragment.shape.numel(), dtype=torch.float32, device=engine.device)
        own = values[fragment.partition][fragment.offset :][: fragment.size]
        whole[fragment.start :][: fragment.size].copy_(own)
        dist.all_reduce(whole)
        yield fragment.name, whole.view(fragment.shape)


def scatter(engine: Any, whole: Mapping[str, torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Put this rank's parts of whole tensors, by parameter name, into values in the layout of `partitions`."""
    for fragment in fragments(engine):
        own = values[fragment.partition][fragment.offset :][: fragment.size]
        own.copy_(whole[fragment.name].flatten()[fragment.start :][: fragment.size])


@contextmanager
def swapped_parameters(engine: Any, values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let the network compute with other values of its trained parameters while the context is open. Collective.

    Stage 3 exchanges every rank's shards with `values`, which adds no memory; stages 1 and 2, where every rank has the
    whole network, gather the values into a second copy of its weights that lives as long as the context.

    Args:
        engine: DeepSpeed's.
        values: fp32, in the layout of `partitions`; unchanged when the context is over.
    """
    if engine.zero_optimization_stage() == 3:
        _exchange_shards(engine, values)
        yield
        _exchange_shards(engine, values)
        return
    own = []
    optimizer = engine.optimizer
    for group, flat, value in zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, values, strict=True):
        # Each rank's partition is an equal part of the flat group, in rank order.
        gathered = torch.empty_like(flat)
        dist.all_gather(list(gathered.chunk(dist.get_world_size())), value.to(flat.device, flat.dtype))
        for parameter in group:
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            own.append((parameter, parameter.data))
            parameter.data = gathered[offset : offset + parameter.numel()].view_as(parameter)
    yield
    for parameter, data in own:
        parameter.data = data


def fragments(engine: Any) -> list[Fragment]:
    """What this rank holds of each trained parameter, in the order of names, which all ranks share."""
    return [_fragment(engine, name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers a state dict would hold."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _flat(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


@contextmanager
def _at_hand(engine: Any, index: int, *, write: bool = False) -> Iterator[bool]:
    """While it is open, a partition and its optimiser's state are in memory; whether they are else on NVMe."""
    optimizer = engine.optimizer
    swapped = engine.zero_optimization_stage() == 3 and optimizer._swappable_optimizer_subgroup(index)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(index)
    yield swapped
    if swapped and write:
        optimizer._optimizer_states_and_gradient_swap_out(index)
    elif swapped:
        optimizer._release_swap_buffers(index)


def _all_held(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Each partition and its optimiser's tensors; copies where the originals leave the memory again."""
    for index, flat in enumerate(_flat(engine)):
        with _at_hand(engine, index) as swapped:
            slot = engine.optimizer.optimizer.state.get(flat, {})
            held = {key: value for key, value in slot.items() if torch.is_tensor(value)}
            if swapped:
                yield flat.detach().clone(), {key: value.clone() for key, value in held.items()}
            else:
                yield flat, held


def _exchange_shards(engine: Any, values: Sequence[torch.Tensor]) -> None:
    """Exchange this rank's stage 3 shards of all trained parameters with `values`. Collective."""
    engine.optimizer._partition_all_parameters()
    parameters = dict(engine.module.named_parameters())
    for fragment in fragments(engine):
        shard = parameters[fragment.name].ds_tensor.view(-1)[: fragment.size]
        own = values[fragment.partition][fragment.offset :][: fragment.size]
        before = shard.to(own.device, copy=True)
        shard.copy_(own)
        own.copy_(before)
    # Small parameters stay whole on every rank between steps; they are made anew from the shards.
    persistent = engine.optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)


def _present(parameter: Any) -> AbstractContextManager[None]:
    """While it is open, a parameter that stage 3 shares out is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    # Not at the top: who only reads a checkpoint does without DeepSpeed.
    from deepspeed.runtime.zero import GatheredParameters

    gathered: AbstractContextManager[None] = GatheredParameters([parameter])
    return gathered


def _fragment(engine: Any, name: str, parameter: Any) -> Fragment:
    if hasattr(parameter, "ds_id"):
        partition, offset, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        start = min(dist.get_rank() * size, parameter.ds_numel)
        # The last rank's part is padded.
        own = min(size, parameter.ds_numel - start)
        return Fragment(name, torch.Size(parameter.ds_shape), start, partition, offset, own)
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(name, parameter.shape, 0, 0, 0, 0)
    place = mapping.lp_fragment_address
    return Fragment(
        name,
        parameter.shape,
        place.start,
        mapping.param_group_index,
        mapping.hp_fragment_address.start,
        place.numel,
    )
