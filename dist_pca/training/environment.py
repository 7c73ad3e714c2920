"""The processes of a training run, and how they find each other."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from dist_pca.config import RunConfig
from dist_pca.cores import usable_cores
from dist_pca.distributed import check_gpus, joining, leave_nccl_errors_to_watchdog
from dist_pca.errors import UserError
from dist_pca.resilience.watchdog import Watchdog
from dist_pca.training.deepspeed import deepspeed_plugin, disable_cpu_reduction_kernel
from dist_pca.training.deepspeed_config import LAUNCHER_FIELDS, deepspeed_config


@dataclass(frozen=True)
class DistributedEnvironment:
    """Rank, device and groups of this process."""

    accelerator: Any
    """Accelerate's, which prepares the DeepSpeed engine."""
    rank: int
    world_size: int
    device: torch.device
    node_group: dist.ProcessGroup | None
    """Ranks on this node; None where there is one node."""


def init_distributed(config: RunConfig) -> DistributedEnvironment:
    """Join the processes that `accelerate launch` started; a process that nothing launched is rank 0 of 1.

    Args:
        config: The run as `reconcile_launcher` returned it.

    Raises:
        UserError: the processes that came up are not those that were launched, or have no GPU each.
        LostProcess: not all of them have joined in time.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    disable_cpu_reduction_kernel()
    for name in list(os.environ):
        # The config holds these settings by now; Accelerate refuses to find them in the environment too.
        if name in LAUNCHER_FIELDS or name.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS")):
            del os.environ[name]
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    launched, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    use_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    # Accelerate skips DeepSpeed altogether where this is set; DeepSpeed chooses the CPU by itself.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    # The last resort: the watchdog has ended the run long before.
    backend, timeout = "nccl" if use_cuda else "gloo", timedelta(seconds=2 * config.training.stall_timeout)
    if use_cuda:
        check_gpus(local_size)
        leave_nccl_errors_to_watchdog(timeout.total_seconds())
    else:
        torch.set_num_threads(max(1, usable_cores() // local_size))
    _set_default_timeout(timeout)
    with joining(launched, timeout):
        if _restarts() > 0:
            # The launcher's store still holds the addresses of lost ranks, where new ones would look for each other.
            store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
            store = PrefixStore(f"start{_restarts()}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        accelerator = Accelerator(
            deepspeed_plugin=deepspeed_plugin(deepspeed_config(config)),
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
            mixed_precision="no",
        )
    came_up = dist.get_world_size() if dist.is_initialized() else 1
    if came_up != launched or accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but {came_up} joined the process group; start the run with "
            "`accelerate launch --config_file` and one of the files in launch/accelerate/"
        )
    group = _node_group(launched, local_size, timeout)
    return DistributedEnvironment(accelerator, dist.get_rank(), launched, accelerator.device, group)


def connect_store() -> Store:
    """Open a connection of its own to the rendezvous store, so that no collective can block it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Keys of lost ranks must not be read by those that the launcher started in their place.
    prefix = f"dist_pca/{_restarts()}"
    return PrefixStore(prefix, TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30)))


def watch_ranks(rank: int, world_size: int, timeout: float) -> Watchdog:
    """Make a watchdog of ranks that run a network without training it, each on its own images.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        timeout: Seconds within which every rank has exited after one has died or been stopped.
    """
    return Watchdog(connect_store(), rank, world_size, timeout=timeout, folder=None, same_steps=False)


def _restarts() -> int:
    """Number of times the launcher has restarted these ranks; its store outlives them."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _set_default_timeout(timeout: timedelta) -> None:
    """Set the time-out of process groups that are made without one, as DeepSpeed makes all of its own."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        # The second is None in a PyTorch without NCCL.
        if getattr(distributed_c10d, name, None) is not None:
            setattr(distributed_c10d, name, timeout)


def _node_group(size: int, local_size: int, timeout: timedelta) -> dist.ProcessGroup | None:
    if size == local_size:
        return None
    first = dist.get_rank() // local_size * local_size
    # Ranks of other nodes take no part, so that a start takes no longer with more of them.
    return dist.new_group(  # type: ignore[return-value]
        list(range(first, first + local_size)), timeout=timeout, use_local_synchronization=True
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
