"""A real launch of four ranks: one is killed, the others end in time, and with a restart allowed the run finishes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.resources import resource
from tests.support.runs import build_streets, overrides

STEPS = 12
IN_TIME = 60
"""Seconds in which ranks end after one of them is lost."""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_one_rank_of_four_is_killed_the_others_end_in_time_and_the_restarted_run_finishes(tmp_path: Path) -> None:
    build_streets(tmp_path)
    run = tmp_path / "runs" / "restarted"
    settings = overrides(
        *(tmp_path, "restarted", f"training.steps={STEPS}", "training.checkpoint_every=2"),
        "training.stall_timeout=40",
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(resource("launch", "accelerate/cpu")), "--num_processes", "4", "--max_restarts", "1"]
    command = [*launcher, "-m", "dist_pca.train", "demo", *settings]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (run / "checkpoints" / "latest").is_file():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        ranks = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
        assert len(ranks) == 4
        (killed,) = [rank for rank in ranks if rank.environ()["RANK"] == "2"]
        killed.kill()
        _ended, left = psutil.wait_procs(ranks, timeout=IN_TIME)
        assert not left
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    outcome = read_exit_status(run)
    assert outcome is not None
    assert outcome.code == ExitCode.DONE
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert (run / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"
