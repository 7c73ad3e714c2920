"""Real processes joined by gloo, or by NCCL on GPUs, for tests of what ranks compute together."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PRELOADED = ["hypothesis", "pytest", "torch.distributed", "dist_pca.data.stream", "dist_pca.model.segmenter"]
"""Modules that the server of processes imports once, in place of every rank: seconds each time."""


def run_on_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, backend: str = "gloo"
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in that many processes; gives what each returned, by rank.

    With the backend `nccl` each process has a GPU.

    The function must be importable and return what `torch.load(weights_only=True)` reads.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    multiprocessing.start_processes(
        _run,
        (function, world_size, folder, args, backend, dict(os.environ)),
        nprocs=world_size,
        start_method="forkserver",
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    args: tuple[Any, ...],
    backend: str,
    environment: dict[str, str],
) -> None:
    # The server has the environment of the test that was the first to need it.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), folder / f"{rank}.pt")
    leave_group()


def leave_group() -> NoReturn:
    """End a process of a group once its peers are done too. Collective.

    A gloo thread that still owns a tensor aborts the process if it meets Python's shutdown, so there is none.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
