"""Ranks, and collectives over them, differentiable where a loss needs it. Needs torch alone."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_pca.errors import LostProcess, UserError

T = TypeVar("T")
JOIN_TIMEOUT = timedelta(minutes=10)
"""Time in which all ranks must have joined to run a network without training it."""
WAIT_TIMEOUT = timedelta(days=1)
"""Time for which a rank that has run the network on its images waits for the slowest, while a watchdog is open."""
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_MONITOR_TIMEOUT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
_MONITOR_SECONDS = 480
"""PyTorch's default of `_MONITOR_TIMEOUT`."""


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in the group (default: the world); 1 outside of torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def join_ranks() -> tuple[int, int, torch.device]:
    """Join the other processes without DeepSpeed, to run a network but not to train it.

    Returns:
        Rank, world size and device.

    Raises:
        UserError: this machine has fewer GPUs than processes.
        LostProcess: not all ranks have joined in time.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(device)
    if size == 1:
        return 0, 1, device
    # Not in every build of PyTorch, where this file may still be imported.
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    leave_nccl_errors_to_watchdog()
    with joining(size, JOIN_TIMEOUT):
        store, rank, size = next(iter(rendezvous("env://", timeout=JOIN_TIMEOUT)))
        # The launcher's store outlives ranks that it restarts.
        store = PrefixStore(f"dist_pca/join/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"rank{rank}", "")
        store.wait([f"rank{other}" for other in range(size)], JOIN_TIMEOUT)
        # NCCL looks for rank 0 in the store as late as in the first collective.
        store.set_timeout(WAIT_TIMEOUT)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT_TIMEOUT)
    return rank, size, device


@contextmanager
def joining(ranks: int, timeout: timedelta) -> Iterator[None]:
    """Name ranks that do not join the process group in time as the cause of PyTorch's error.

    Args:
        ranks: Number of ranks.
        timeout: Time that they have.

    Raises:
        LostProcess: not all of them have joined in time.
    """
    try:
        yield
    except RuntimeError as error:
        # PyTorch has no type of its own for it.
        if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            raise
        raise LostProcess(
            f"not all {ranks} ranks have joined within {timeout.total_seconds():.0f} s; find one that is stopped "
            "or cannot be reached, and start the run again"
        ) from error


def check_gpus(processes: int) -> None:
    """Check that each process on this machine has a GPU of its own; else some would fail and others wait for them.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes need a GPU each, with only {gpus} visible on this machine; start {gpus} of them "
            "(--processes, or num_processes in the launcher file), or put CUDA_VISIBLE_DEVICES= before the command to "
            "use the CPU"
        )


def leave_nccl_errors_to_watchdog(seconds: float = 0.0) -> None:
    """Keep PyTorch from aborting this process when NCCL loses a rank: `Watchdog` ends it, and says which rank.

    To be called before a process group is made.

    Args:
        seconds: Time from the error to the abort by PyTorch, the last resort; no less than its default of 8 minutes.
    """
    # PyTorch's launcher sets 1 itself, so only 2 and 3 are known to be the user's.
    if os.environ.get(_ERROR_HANDLING, "1") == "1":
        os.environ[_ERROR_HANDLING] = "0"
    os.environ.setdefault(_MONITOR_TIMEOUT, str(max(_MONITOR_SECONDS, math.ceil(seconds))))


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
