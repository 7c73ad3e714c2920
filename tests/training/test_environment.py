"""How the processes of a run join: their time-outs, and what each needs before it waits for the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_pca.errors import UserError
from dist_pca.training.environment import init_distributed
from tests.test_distributed import free_port
from tests.training.zero_runs import run_config

RANK = """
import json, sys
import torch
import torch.distributed as dist
from deepspeed import comm
from dist_pca.training.environment import init_distributed
from tests.support.ranks import leave_group
from tests.training.zero_runs import run_config
node = init_distributed(run_config(2, "sgd", "training.stall_timeout=4000")).node_group
groups = {"world": dist.group.WORLD, "node": node, "deepspeed": comm.new_group([0, 1])}
device = torch.device("cpu")
seconds = {name: group._get_backend(device).options._timeout.total_seconds() for name, group in groups.items()}
print(json.dumps(seconds))
leave_group()
"""


def test_all_process_groups_of_a_run_have_its_time_out() -> None:
    # Two nodes of one process each, so that there is a group of each node.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    common |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    for process in ranks:
        line = process.communicate(timeout=120)[0].splitlines()[-1]
        assert json.loads(line) == dict.fromkeys(("world", "node", "deepspeed"), 8000.0)


def test_a_rank_without_a_gpu_is_refused_before_the_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^8 processes .* only 4 visible .* CUDA_VISIBLE_DEVICES="):
        init_distributed(run_config(2, "sgd"))
