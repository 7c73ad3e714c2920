"""Where a test of this folder runs: on the CPU, which shows that the test itself works, and on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Be a process group of one, of the backend that training uses on this device."""
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(BACKENDS[device], store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
