"""Ranks that join to run a network without training it, and what PyTorch is told about errors of NCCL."""

import os
import socket
import subprocess
import sys

import pytest

from dist_pca.distributed import join_ranks, leave_nccl_errors_to_watchdog
from dist_pca.errors import UserError

RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from dist_pca import distributed
from dist_pca.errors import LostProcess
from tests.support.ranks import leave_group
distributed.JOIN_TIMEOUT = timedelta(seconds=float(sys.argv[1]))
try:
    rank, size, device = distributed.join_ranks()
except LostProcess as error:
    sys.exit(str(error))
print(rank, size, device, dist.group.WORLD._get_backend(device).options._timeout.total_seconds())
distributed.barrier()
leave_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(rank: int, port: int, *, seconds: float) -> "subprocess.Popen[str]":
    """One of two ranks on the CPU, which waits so long for the other to join."""
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RANK, str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rank_that_is_done_may_wait_a_day_for_the_slowest() -> None:
    port = free_port()
    ranks = [start(rank, port, seconds=60) for rank in range(2)]
    assert [process.communicate(timeout=120)[0] for process in ranks] == [f"{r} 2 cpu 86400.0\n" for r in range(2)]


def test_a_rank_that_does_not_join_is_missed_soon() -> None:
    alone = start(0, free_port(), seconds=2)
    assert "not all 2 ranks have joined within 2 s" in alone.communicate(timeout=60)[1]


def test_ranks_without_a_gpu_do_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^2 processes .* only 1 visible"):
        join_ranks()


@pytest.mark.parametrize(
    ("given", "expected"),
    # PyTorch's launcher gives 1 to ranks of a user who has set nothing.
    [(None, "0"), ("1", "0"), ("0", "0"), ("2", "2"), ("3", "3")],
)
def test_pytorch_does_not_abort_a_rank_before_the_watchdog_ends_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    handling, monitor = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
    for name, value in ((handling, given), (monitor, None)):
        # Set first, so that what is set by the function is undone.
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    leave_nccl_errors_to_watchdog(2000.5)
    assert (os.environ[handling], os.environ[monitor]) == (expected, "2001")
