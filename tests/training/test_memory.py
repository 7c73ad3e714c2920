"""A long run holds no more memory than a short one."""

import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.runs import build_streets, overrides

STEPS, SETTLED, LOG_EVERY = 2000, 200, 10
SHARE = 0.01
"""Of what all processes hold: what allocators keep of tensors whose sizes differ from step to step."""
LEAK = 8 << 20
"""Bytes of all processes together in the second half, in which allocators have all they need: 10 KiB a step."""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_resident_memory_is_flat_after_the_first_steps(tmp_path: Path) -> None:
    build_streets(tmp_path)
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"
    settings = (
        "data.crop=[32,40]",
        f"training.steps={STEPS}",
        f"training.log_every={LOG_EVERY}",
        # What a checkpoint takes is there before the first measurement.
        "training.checkpoint_every=50",
    )
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *overrides(tmp_path, "long", *settings)]
    resident: list[tuple[int, int]] = []
    members: list[psutil.Process] = []
    # oneDNN keeps a primitive of each of the last 1,024 shapes, and association's differ from step to step.
    environment = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.5)
            made = metrics.read_text().count("\n") * LOG_EVERY if metrics.is_file() else 0
            if made >= SETTLED and not members:
                (launcher,) = psutil.Process(process.pid).children()
                # Ranks and their loader processes.
                members = [rank for rank in launcher.children(recursive=True) if "RANK" in rank.environ()]
            with suppress(psutil.Error):
                resident.append((made, sum(member.memory_info().rss for member in members)))
    assert process.returncode == 0
    assert len(members) >= 4
    early, half, late = (
        statistics.median(held for made, held in resident if first <= made < first + SETTLED)
        for first in (SETTLED, STEPS // 2, STEPS - SETTLED - LOG_EVERY)
    )
    print(f"{early / 2**20:.1f} MiB after {SETTLED} steps, {half / 2**20:.1f} half-way, {late / 2**20:.1f} at the end")
    assert late - early < SHARE * early
    assert late - half < LEAK
