"""A run whose processes are killed with SIGKILL, and started again."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dist_pca.resilience.launch import launch_command
from dist_pca.resources import resource
from dist_pca.training.checkpoint import latest_checkpoint
from tests.gpu.runs import DEVICES, losses, metrics, train, use
from tests.support.runs import overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 40
KEYS = (f"training.steps={STEPS}", "training.checkpoint_every=4", "training.zero_stage=2")


def kill_once_it_has_saved(folder: Path, name: str, device: str) -> None:
    """Start a run, and kill all its processes as soon as it has a checkpoint."""
    launcher = "accelerate/gpu_zero2" if device == "cuda" else "accelerate/cpu"
    words = launch_command(
        str(resource("configs", "demo")), overrides(folder, name, *KEYS), launcher=launcher, processes=1
    )
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    checkpoints = folder / "runs" / name / "checkpoints"
    end = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end and not (checkpoints / "latest").is_file():
        time.sleep(0.01)
    running = process.poll() is None
    if running:
        launcher_process = psutil.Process(process.pid)
        for member in (launcher_process, *launcher_process.children(recursive=True)):
            member.kill()
    process.wait()
    assert running, "the run ended before it could be killed"
    assert latest_checkpoint(checkpoints) is not None


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_run_resumes_from_its_checkpoint_and_has_the_losses_of_one_that_was_not(
    streets: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(device, monkeypatch)
    whole = losses(train(streets, f"whole_{device}", device, *KEYS))
    kill_once_it_has_saved(streets, f"killed_{device}", device)
    before = losses(metrics(streets, f"killed_{device}"))
    assert len(before) < STEPS
    lines = train(streets, f"killed_{device}", device, *KEYS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    if device == "cpu":
        assert losses(lines) == whole
    else:
        # Kernels of cuDNN add in no fixed order, so runs differ in rounding, which grows.
        torch.testing.assert_close(losses(lines), whole, rtol=0.1, atol=0)
