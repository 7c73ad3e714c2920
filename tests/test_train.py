"""What a training process prints before it trains."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.networks import segmenter, write_run
from tests.support.shards import HEIGHT, WIDTH, png, sample_members, write_shards

REFUSED = "config nowhere.yaml: no such file;"


def start(rank: int, *, delay: float, ended_after: float | None = None) -> tuple[int, str]:
    """Start one rank of a run that cannot be; gives its exit code, and what it prints.

    Args:
        rank: The rank.
        delay: Seconds for which another rank than 0 waits before it prints.
        ended_after: Seconds after which the launcher ends the rank with SIGTERM; None does not.
    """
    lines = ["import os, signal, threading", "from dist_pca import train", f"train.ERROR_DELAY = {delay}"]
    if ended_after is not None:
        lines.append(f"threading.Timer({ended_after}, os.kill, (os.getpid(), signal.SIGTERM)).start()")
    lines.append("train.main('nowhere.yaml')")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"RANK": str(rank)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(("rank", "printed"), [(0, f"error: {REFUSED}"), (3, f"error: rank 3: {REFUSED}")])
def test_an_error_is_printed_by_rank_0_and_by_a_rank_that_alone_has_it(rank: int, printed: str) -> None:
    code, said = start(rank, delay=0)
    assert code == 2
    assert said.startswith(printed)
    assert "\n" not in said


def test_a_rank_that_is_ended_because_of_rank_0_prints_nothing() -> None:
    assert start(3, delay=60, ended_after=2) == (2, "")


@pytest.mark.slow
def test_a_class_without_a_pixel_in_a_source_is_one_warning_of_the_first_rank(tmp_path: Path) -> None:
    road_and_sky = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 2
    write_shards(tmp_path / "without", [[sample_members(1) | {"label.png": png(road_and_sky)}]])
    write_shards(tmp_path / "with", [[sample_members(2)]])
    # All steps are done already, so that nothing is trained.
    run = write_run(tmp_path, segmenter())
    data = (
        f"data.source=[{{shards: {tmp_path}/without}}, {{shards: {tmp_path}/with}}]",
        f"data.target={tmp_path}/with",
    )
    ranks = [
        subprocess.run(
            [sys.executable, "-m", "dist_pca.train", str(run / "config.yaml"), *data, "--resume"],
            env=os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stderr
        for rank in ("0", "1")
    ]
    warnings = [[line for line in printed.splitlines() if line.startswith("warning: ")] for printed in ranks]
    assert [len(lines) for lines in warnings] == [1, 0]
    assert warnings[0][0].startswith(f"warning: shards {tmp_path}/without: no label has a pixel of car; ")
    assert "all 1 steps are done already" in ranks[0]
