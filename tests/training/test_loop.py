"""A run asked to stop anywhere goes on as if it had not been: the same lines, the same weights, the same samples."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_pca.resilience.exit_status import ExitCode
from dist_pca.training.metrics import TIMING
from tests.support.runs import build_streets, overrides

SETTINGS = (
    *("training.steps=24", "training.log_every=10", "training.checkpoint_every=24"),
    *("training.ema_decay=0.9", "telemetry.sample_keys=true"),
)


def command(folder: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "dist_pca.cli", "train", "demo", *overrides(folder, name, *SETTINGS)]


def lines(run: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in found]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_told_to_stop_within_a_log_window_is_bit_for_bit_the_one_that_was_not(tmp_path: Path) -> None:
    build_streets(tmp_path)
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    subprocess.run(command(tmp_path, "whole"), capture_output=True, timeout=240, check=True)
    with subprocess.Popen(command(tmp_path, "stopped"), stderr=subprocess.PIPE, start_new_session=True) as process:
        while not (stopped / "metrics.jsonl").is_file() or not (stopped / "metrics.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        # Steps of a tenth of a second and more: the next one, or one after it, is within the window.
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == ExitCode.SAVED
    (saved,) = (stopped / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) in (*range(11, 20), *range(21, 24))
    subprocess.run(command(tmp_path, "stopped"), capture_output=True, timeout=240, check=True)
    assert lines(stopped) == lines(whole)
    assert [line["step"] for line in lines(whole)] == [10, 20, 24]
    for part in ("model", "optimizer", "ema", "statistics"):
        expected, found = (
            load_file(run / "checkpoints" / "step-00000024" / f"{part}.safetensors") for run in (whole, stopped)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), part
    samples = (whole / "samples.jsonl").read_text()
    assert (stopped / "samples.jsonl").read_text() == samples
    first = json.loads(samples.splitlines()[0])
    assert [len(first[domain]) for domain in ("source", "target")] == [4, 4]
