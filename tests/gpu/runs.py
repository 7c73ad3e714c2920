"""Small runs with one rank on a device, for the tests that train."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import launch

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.exhaustive),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def use(device: str, patch: pytest.MonkeyPatch) -> None:
    """Have processes that are started later use a device."""
    if device == "cpu":
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")


def train(folder: Path, name: str, device: str, *more: str, stage: int = 2) -> list[dict[str, Any]]:
    """Train a run with one rank; gives its lines of metrics."""
    launcher = f"accelerate/gpu_zero{stage}" if device == "cuda" else "accelerate/cpu"
    options = ("--num_processes", "1", *(("--zero_stage", str(stage)) if device == "cpu" else ()))
    done = launch(folder, name, f"training.zero_stage={stage}", *more, launcher=launcher, launcher_options=options)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder, name)


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def command(*arguments: object) -> str:
    """Run a `dist-pca` command; gives what it prints."""
    words = [sys.executable, "-m", "dist_pca.cli", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
