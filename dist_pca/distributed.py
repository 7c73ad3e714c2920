"""Ranks, and collectives over them, differentiable where a loss needs it. Needs torch alone."""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_pca.errors import UserError

T = TypeVar("T")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in the group (default: the world); 1 outside of torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def join_ranks() -> tuple[int, int, torch.device]:
    """Join the other processes without DeepSpeed, to run a network but not to train it.

    Returns:
        Rank, world size and device.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), size, device


def rank() -> int:
    """Return the rank of this process; 0 outside of torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank0() -> bool:
    """Whether this is rank 0; true outside of torch.distributed."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks, if there are others. Collective."""
    if world_size() > 1:
        dist.barrier()


def raise_on_all_ranks(message: str | None) -> None:
    """Raise rank 0's message on all ranks, if it has one; other ranks' messages are ignored. Collective.

    Raises:
        UserError: rank 0 has a message.
    """
    messages = [message]
    dist.broadcast_object_list(messages, src=0)
    if messages[0] is not None:
        raise UserError(messages[0])


def gather_objects(value: T) -> list[T]:
    """Gather a picklable value of every rank, in rank order; its own alone outside of torch.distributed. Collective."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce_sum(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum a tensor over ranks into a new tensor, without gradient. Collective."""
    total = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def all_gather(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Concatenate the rows of all ranks in rank order, with gradient. Collective, as is the backward pass.

    The gradients of all ranks' copies of a row are summed on the rank that owns it (reduce-scatter). A loss on
    gathered rows whose gradients are later averaged over W ranks must therefore be `W * local sum / global count`.

    Args:
        x: [n_r, ...] on each rank r; n_r may differ between ranks and be 0.
        group: Ranks to gather from; None is the world.

    Returns:
        [sum of n_r, ...] on every rank.
    """
    if world_size(group) == 1:
        return x
    gathered: torch.Tensor = _AllGather.apply(x, group)
    return gathered


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, with gradient. Collective, as is the backward pass.

    Every rank's loss depends on the sum, so the gradients of all ranks' copies are summed, too.
    """
    if world_size() == 1:
        return x
    total: torch.Tensor = _SumOverRanks.apply(x)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient.contiguous())


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ranks = world_size(group)
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(ranks)]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group=group)
        # A GPU is waited for once, not once for each rank.
        ctx.group, ctx.counts = group, torch.cat(counts).tolist()
        ctx.rank = dist.get_rank(group)
        # Collectives need equal shapes on every rank, so rows are padded to the largest count.
        parts = [x.new_empty((max(ctx.counts), *x.shape[1:])) for _ in range(ranks)]
        dist.all_gather(parts, _padded(x, max(ctx.counts)), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = [_padded(part, max(ctx.counts)) for part in torch.split(gradient, ctx.counts)]
        local = torch.empty_like(parts[0])
        dist.reduce_scatter(local, parts, group=ctx.group)
        return local[: ctx.counts[ctx.rank]], None


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])
