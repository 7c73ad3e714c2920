"""A whole run on a file system that is too small for its second checkpoint."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_pca.evaluation.load import load_run
from dist_pca.resilience.exit_status import ExitCode, read_exit_status
from dist_pca.training.checkpoint import latest_checkpoint
from dist_pca.training.checkpoint_loading import load_model
from tests.support.disk import small_disk
from tests.support.runs import build_streets, overrides


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "runs", "5m") as mounted:
        yield mounted


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_disk_full_at_a_checkpoint_is_one_clear_line_and_with_room_the_run_goes_on(
    tmp_path: Path, disk: Path
) -> None:
    build_streets(tmp_path)
    settings = overrides(tmp_path, "small", "training.checkpoint_every=2")
    command = [sys.executable, "-m", "dist_pca.cli", "train", "demo", *settings]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert refused.returncode == ExitCode.REFUSED, refused.stderr
    (said,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    run = disk / "small"
    outcome = read_exit_status(run)
    assert outcome is None or said == f"error: {outcome.message}"
    assert "step-00000004: cannot be written" in said
    assert "step-00000002 is intact" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    load_model(load_run(run)[2], checkpoint)

    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert "step 3/6" in done.stderr
    assert "step 2/6" not in done.stderr
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"
