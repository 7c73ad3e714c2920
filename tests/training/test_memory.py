"""A long run holds no more memory than a short one."""

import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.training.runs import build_streets, overrides

STEPS, SETTLED, LOG_EVERY = 2000, 200, 10
ALLOWED = 16 << 20
"""Bytes; a leak of one small tensor a step would be more."""


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
        "training.checkpoint_every=250",
    )
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *overrides(tmp_path, "long", *settings)]
    resident: list[tuple[int, int]] = []
    members: list[psutil.Process] = []
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
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
    early = statistics.median(held for made, held in resident if SETTLED <= made < 2 * SETTLED)
    late = statistics.median(held for made, held in resident if STEPS - 2 * SETTLED < made < STEPS - 20)
    print(f"{early / 2**20:.1f} MiB after {SETTLED} steps, {late / 2**20:.1f} MiB after {STEPS}")
    assert late - early < ALLOWED
